"""Translation, by an encoder-decoder or by a decoder with a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from interleaf.errors import ConfigError
from interleaf.metrics import translation_metrics
from interleaf.tasks.generation import Generation

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Translation(Generation):
    """Reads parallel sentences; measured by BLEU, chrF and TER."""

    source_lang: str | None = None
    """Code of the language translated from, for models that want one (mBART, NLLB, M2M)."""
    target_lang: str | None = None
    """Code of the language translated into: these models are made to begin with it."""
    min_words: int = 1
    """Rows with a shorter side are left out of training."""
    max_words: int = 100
    """Rows with a longer side are left out of training."""
    max_ratio: float = 3.0
    """Rows with one side so many times longer, in characters, are left out of training."""

    name: ClassVar[str] = "translation"
    text_columns: ClassVar[tuple[str, ...]] = ("source", "src", "text", "en")
    answer_columns: ClassVar[tuple[str, ...]] = ("target", "tgt", "translation", "reference")

    def unfit(self, text: str, target: str) -> str | None:
        words = [len(side.split()) for side in (text, target)]
        if min(words) < self.min_words:
            return "too short"
        if max(words) > self.max_words:
            return "too long"
        longer, shorter = max(len(text), len(target)), min(len(text), len(target))
        # a few characters more say nothing of short texts
        return "too unlike in length" if longer > self.max_ratio * shorter + 10 else None

    def tokenizer(self, base: str) -> Any:
        found = self.load_tokenizer(base)
        for setting, code in (("src_lang", self.source_lang), ("tgt_lang", self.target_lang)):
            if code is None:
                continue
            if not hasattr(found, setting):
                raise ConfigError(f"the tokenizer of {base} knows no languages: leave out source_lang and target_lang.")
            try:
                known = self._language_id(found, code) != found.unk_token_id
                setattr(found, setting, code)
            except KeyError:
                known = False
            if not known:
                raise ConfigError(f"the tokenizer of {base} does not know the language {code!r}.")
        return found

    @staticmethod
    def _language_id(tokenizer: Any, code: str) -> int:
        named: Callable[[str], int] | None = getattr(tokenizer, "get_lang_id", None)
        return (named or tokenizer.convert_tokens_to_ids)(code)

    def generation(self, tokenizer: Any) -> dict[str, Any]:
        if self.target_lang is None or not self.encoder_decoder:
            return {}
        return {"forced_bos_token_id": self._language_id(tokenizer, self.target_lang)}

    def finish(self, text: str) -> str:
        # a decoder that goes on after the translation begins a new line
        return text.strip() if self.encoder_decoder else text.strip().partition("\n")[0].strip()

    def measure(self, model: Any, tokenizer: Any, rows: Dataset, batch_size: int) -> dict[str, Any]:
        answers = list(self.generate(model, tokenizer, rows.to_dict(), batch_size))
        return translation_metrics(answers, rows["target"])
