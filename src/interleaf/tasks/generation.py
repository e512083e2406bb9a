"""What the tasks share whose answer is a text: translation, code generation."""

from __future__ import annotations

import dataclasses
import math
import random
import string
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from interleaf.base import load_base
from interleaf.errors import ConfigError, DataError
from interleaf.tasks.base import Splits
from interleaf.tasks.rows import find_column, no_gaps, read_pairs, shortest_first

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100  # a label that no loss counts


@dataclass
class Generation(ABC):
    """Reads pairs of texts, trains on the answer alone, generates and measures answers."""

    text: str | None = None
    """Column of the input; found if not given."""
    label: str | None = None
    """Column of the answer; found if not given."""
    max_length: int = 128
    """Longest input in tokens; longer ones are cut."""
    max_new_tokens: int = 128
    """Longest answer in tokens."""
    prompt: str = "{text}"
    """What the model is given: a template of the row's columns, `text` being the input."""
    chat: bool = False
    """Put the prompt into the tokenizer's chat template."""
    chat_template: str | None = None
    """The chat template itself, kept with the adapter; the tokenizer's if not given."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    group: str | None = None
    """Column by which rows are split, so that what belongs together is not in both parts; `group` if there is one."""
    dev_groups: list[str] = field(default_factory=list)
    """Groups held out; by default a share of them."""
    dev_rows: int = 500
    """Rows held out at most, a seeded sample."""
    encoder_decoder: bool | None = None
    """Whether the base is one; found when it is loaded."""

    best_metric: ClassVar[str] = "loss"
    name: ClassVar[str]
    text_columns: ClassVar[tuple[str, ...]]
    answer_columns: ClassVar[tuple[str, ...]]
    labels = None
    compute_metrics = None

    def __post_init__(self) -> None:
        if "{text}" not in self.prompt:
            raise ConfigError(f"prompt={self.prompt!r}: the template has no {{text}}.")
        for name in ("max_length", "max_new_tokens", "num_beams", "dev_rows"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 1 or more.")

    # ---- data

    def load(
        self, train: str, dev: str | None = None, *, dev_fraction: float = 0.1, seed: int = 0, limit: int | None = None
    ) -> Splits:
        """Read the rows, clean them, hold groups or a share out, and drop from train what is held out too.

        Raises:
            DataError: a missing column, an empty cell, or nothing left.
        """
        rows, dropped = self._clean(self._rows(train), train)
        held = self._rows(dev) if dev else None
        if held is None:
            rows, held = self._split(rows, dev_fraction, seed, train)
        held = _sample(held, self.dev_rows, seed)
        seen = {_folded(text) for text in held["text"]}
        kept = [i for i, text in enumerate(rows["text"]) if _folded(text) not in seen]
        dropped["in the held-out rows too"] = len(rows) - len(kept)
        if not kept:
            raise DataError(f"{train}: every row is among the held-out rows: there is nothing to learn from.")
        return Splits(
            _sample(rows.select(kept), limit or len(kept), seed), held, {k: n for k, n in dropped.items() if n}
        )

    def load_one(self, ref: str) -> Dataset:
        """Read and check rows to evaluate on."""
        return self._rows(ref)

    def _rows(self, ref: str) -> Dataset:
        """Read a table into the columns text and target, beside those that the prompt and the metrics name."""
        data = read_pairs(ref)
        target = find_column(data, self.label, self.answer_columns, "label")
        text = find_column(data, self.text, self.text_columns, "text", [target])
        group = self.group or ("group" if "group" in data.column_names else None)
        others = [*self._template_columns(), *self.extra_columns(), *([group] if group else [])]
        if missing := [c for c in others if c not in data.column_names and c not in self.extra_columns()]:
            raise DataError(f"{ref} has no column {missing[0]!r}. The columns are: {', '.join(data.column_names)}.")
        for column in (text, target):
            no_gaps(data[column], column, ref)
        kept = {"text": text, "target": target, **{c: c for c in others if c in data.column_names}}
        if group:
            kept["group"] = kept.pop(group)
        from datasets import Dataset

        return Dataset.from_dict({name: [str(v) for v in data[column]] for name, column in kept.items()})

    def _template_columns(self) -> list[str]:
        named = [name for _, name, _, _ in string.Formatter().parse(self.prompt) if name is not None]
        return [name for name in named if name != "text"]

    def extra_columns(self) -> tuple[str, ...]:
        """Return columns that the metrics use where the data has them."""
        return ()

    def _clean(self, rows: Dataset, ref: str) -> tuple[Dataset, dict[str, int]]:
        """Drop rows that are not fit to learn from, and count them by the reason."""
        dropped: dict[str, int] = {}
        kept, seen = [], set()
        for i, (text, target) in enumerate(zip(rows["text"], rows["target"], strict=True)):
            why = self.unfit(text, target)
            why = why or ("repeated" if (text, target) in seen else None)
            seen.add((text, target))
            if why is None:
                kept.append(i)
            else:
                dropped[why] = dropped.get(why, 0) + 1
        if not kept:
            reasons = ", ".join(f"{n} {why}" for why, n in dropped.items())
            raise DataError(f"{ref}: no row is left to learn from ({reasons}).")
        return rows.select(kept), dropped

    @abstractmethod
    def unfit(self, text: str, target: str) -> str | None:
        """Say why a row is not fit to learn from, or None."""

    def _split(self, rows: Dataset, fraction: float, seed: int, ref: str) -> tuple[Dataset, Dataset]:
        groups = rows["group"] if "group" in rows.column_names else None
        if self.dev_groups:
            there = set(groups or [])
            if missing := [name for name in self.dev_groups if name not in there]:
                raise DataError(f"{ref} has no group {missing[0]!r}. It has: {', '.join(sorted(there)) or 'none'}.")
            out = [i for i, name in enumerate(groups or []) if name in self.dev_groups]
        else:
            out = _held_out(groups or rows["text"], fraction, seed)
        held = set(out)
        kept = [i for i in range(len(rows)) if i not in held]
        if not kept or not out:
            raise DataError(f"{ref}: its {len(rows)} rows cannot be divided into two parts. Give dev data of its own.")
        return rows.select(kept), rows.select(out)

    # ---- model and inputs

    @abstractmethod
    def tokenizer(self, base: str) -> Any:
        """Load the base's tokenizer, set for this task."""

    def load_tokenizer(self, base: str) -> Any:
        """Load the base's tokenizer, with the chat template.

        Raises:
            BaseModelError: there is no such model.
            ConfigError: `chat` with a tokenizer that has no chat template.
        """
        from transformers import AutoConfig, AutoTokenizer

        found = load_base(base, AutoTokenizer.from_pretrained)
        self.encoder_decoder = bool(load_base(base, AutoConfig.from_pretrained).is_encoder_decoder)
        if found.pad_token is None:
            found.pad_token = found.eos_token
        if self.chat:
            self.chat_template = self.chat_template or found.chat_template
            if not self.chat_template:
                raise ConfigError(f"chat: the tokenizer of {base} has no chat template. Give a `chat_template`.")
            found.chat_template = self.chat_template
        return found

    def model(self, base: str) -> Any:
        """Load the base with its language-model head.

        Raises:
            BaseModelError: there is no such model, or none that generates.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        both = bool(load_base(base, AutoConfig.from_pretrained).is_encoder_decoder)
        auto: Any = AutoModelForSeq2SeqLM if both else AutoModelForCausalLM
        return load_base(base, auto.from_pretrained)

    def given(self, rows: Mapping[str, Sequence[str]], tokenizer: Any) -> list[str]:
        """Return what the model is given for each row."""
        names = ["text", *self._template_columns()]
        filled = [
            self.prompt.format(**dict(zip(names, values, strict=True)))
            for values in zip(*(rows[n] for n in names), strict=True)
        ]
        if not self.chat:
            return filled
        asked = [[{"role": "user", "content": text}] for text in filled]
        return list(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))

    def encode(self, data: Dataset, tokenizer: Any) -> Dataset:
        """Turn rows into token ids; of a decoder's the answer alone has labels."""
        one = self._both_sides if self.encoder_decoder else self._one_sequence
        return data.map(
            lambda batch: one(batch, tokenizer), batched=True, remove_columns=data.column_names, keep_in_memory=True
        )

    def _both_sides(self, batch: dict[str, list[str]], tokenizer: Any) -> dict[str, Any]:
        found = dict(tokenizer(self.given(batch, tokenizer), truncation=True, max_length=self.max_length))
        answers = tokenizer(text_target=batch["target"], truncation=True, max_length=self.max_new_tokens)
        return {**found, "labels": answers["input_ids"]}

    def _one_sequence(self, batch: dict[str, list[str]], tokenizer: Any) -> dict[str, Any]:
        prompts = self._prompt_ids(self.given(batch, tokenizer), tokenizer)
        answers = tokenizer(batch["target"], add_special_tokens=False)["input_ids"]
        found: dict[str, Any] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, answer in zip(prompts, answers, strict=True):
            answer = [*answer[: self.max_new_tokens - 1], tokenizer.eos_token_id]
            found["input_ids"].append([*prompt, *answer])
            found["attention_mask"].append([1] * (len(prompt) + len(answer)))
            found["labels"].append([IGNORED] * len(prompt) + answer)
        return found

    def _prompt_ids(self, prompts: list[str], tokenizer: Any) -> list[list[int]]:
        """Encode prompts, the start of those that are too long cut: what is next to the answer matters most."""
        special = not self.chat  # a chat template writes its own
        ids = tokenizer(prompts, add_special_tokens=special)["input_ids"]
        if special and ids and ids[0] and ids[0][-1] == tokenizer.eos_token_id:
            ids = [one[:-1] for one in ids]  # the answer goes on where the prompt ends
        return [one[-self.max_length :] for one in ids]

    def collator(self, tokenizer: Any) -> Any:
        """Return what pads encoded rows to the longest of a batch."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    # ---- answers

    def generate(
        self, model: Any, tokenizer: Any, rows: Mapping[str, Sequence[str]], batch_size: int = 32, **options: Any
    ) -> Iterator[str]:
        """Yield an answer a row, in order; `options` are those of transformers' `generate`."""
        import torch

        training = model.training
        model.eval()
        try:
            for start in range(0, len(rows["text"]), batch_size):
                part = {name: column[start : start + batch_size] for name, column in rows.items()}
                batch = self._padded(self.given(part, tokenizer), tokenizer).to(model.device)
                with torch.inference_mode():
                    ids = model.generate(**batch, **{**self._options(tokenizer), **options})
                if not self.encoder_decoder:
                    ids = ids[:, batch["input_ids"].shape[1] :]
                for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
                    yield self.finish(text)
        finally:
            model.train(training)

    def _padded(self, prompts: list[str], tokenizer: Any) -> Any:
        if self.encoder_decoder:
            return tokenizer(prompts, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt")
        ids = self._prompt_ids(prompts, tokenizer)
        return tokenizer.pad({"input_ids": ids}, padding=True, padding_side="left", return_tensors="pt")

    def _options(self, tokenizer: Any) -> dict[str, Any]:
        common = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams, "do_sample": False}
        return {**common, "pad_token_id": tokenizer.pad_token_id, **self.generation(tokenizer)}

    @abstractmethod
    def generation(self, tokenizer: Any) -> dict[str, Any]:
        """Return this task's own options of transformers' `generate`."""

    @abstractmethod
    def finish(self, text: str) -> str:
        """Return the answer in what was generated."""

    def predict(
        self, model: Any, tokenizer: Any, texts: Iterable[str], batch_size: int = 32
    ) -> Iterator[dict[str, Any]]:
        """Yield the answer to each text, in order.

        Raises:
            DataError: a prompt that wants more than a text.
        """
        if more := self._template_columns():
            raise DataError(f"the prompt wants the column {more[0]!r} too, so texts alone cannot be answered.")
        source = iter(texts)
        while chunk := list(islice(source, batch_size)):
            answers = self.generate(model, tokenizer, {"text": chunk}, batch_size)
            yield from ({"text": text, "answer": answer} for text, answer in zip(chunk, answers, strict=True))

    def examples(self, model: Any, tokenizer: Any, data: Dataset, count: int) -> list[dict[str, Any]]:
        """Return rows spread over the data, with the model's answers to them."""
        count = min(count, len(data))
        rows = data.select([i * len(data) // count for i in range(count)]).to_dict()
        answers = self.generate(model, tokenizer, rows)
        names = ("input", "expected", "answer")
        return [dict(zip(names, row, strict=True)) for row in zip(rows["text"], rows["target"], answers, strict=True)]

    # ---- measures

    def evaluate(self, model: Any, tokenizer: Any, data: Dataset, batch_size: int = 32) -> dict[str, Any]:
        """Return all metrics on rows: the loss of the true answers, and what the generated ones are worth."""
        order = sorted(range(len(data)), key=lambda i: len(data[i]["text"]))
        rows = data.select(order)
        loss = self.loss(model, tokenizer, rows, batch_size)
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "rows": len(rows)}
        return found | self.measure(model, tokenizer, rows, batch_size)

    @abstractmethod
    def measure(self, model: Any, tokenizer: Any, rows: Dataset, batch_size: int) -> dict[str, Any]:
        """Return what generated answers are worth."""

    def loss(self, model: Any, tokenizer: Any, data: Dataset, batch_size: int) -> float:
        """Return the mean loss of a token of the true answers."""
        import torch

        rows = shortest_first(self.encode(data, tokenizer))
        loader = torch.utils.data.DataLoader(rows, batch_size=batch_size, collate_fn=self.collator(tokenizer))
        total, count = 0.0, 0
        training = model.training
        model.eval()
        with torch.inference_mode():
            for batch in loader:
                batch = {k: v.to(model.device) for k, v in batch.items()}
                labels = batch["labels"] if self.encoder_decoder else batch["labels"][:, 1:]
                tokens = int((labels != IGNORED).sum())
                total += float(model(**batch).loss) * tokens
                count += tokens
        model.train(training)
        return total / max(1, count)

    def state(self) -> dict[str, Any]:
        """Return what is stored with the adapter."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Any:
        """Make the task again from what was stored."""
        return cls(**state)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _sample(rows: Dataset, count: int, seed: int) -> Dataset:
    if count >= len(rows):
        return rows
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), count)))


def _held_out(groups: Sequence[str], fraction: float, seed: int) -> list[int]:
    """Hold out whole groups, about the given share of the rows."""
    from sklearn.model_selection import GroupShuffleSplit

    if len(set(groups)) < 2:
        return []
    split = GroupShuffleSplit(1, test_size=fraction, random_state=seed)
    return [int(i) for i in next(split.split(groups, groups=groups))[1]]
