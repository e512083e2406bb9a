"""Code generation: a prompt, such as a signature with its docstring, is completed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from interleaf.errors import ConfigError
from interleaf.tasks.generation import Generation

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Code(Generation):
    """Reads prompts with their completions; measured by exact match, syntax, and tests where the data has them."""

    stop: list[str] = field(default_factory=lambda: ["\ndef ", "\nclass ", "\nif __name__", "\nprint(", "\n#", "\n```"])
    """Texts that end a completion."""
    samples: int = 1
    """Completions of each prompt; more than one are drawn at random, for pass@k."""
    temperature: float = 0.8
    """Temperature of the samples, if more than one."""
    timeout_s: float = 5.0
    """Seconds that a completion's tests may take."""

    name: ClassVar[str] = "code"
    text_columns: ClassVar[tuple[str, ...]] = ("prompt", "source", "text", "instruction")
    answer_columns: ClassVar[tuple[str, ...]] = ("completion", "target", "canonical_solution", "answer", "code")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ConfigError(f"samples={self.samples}: expected 1 or more.")
        if self.temperature <= 0 or self.timeout_s <= 0:
            raise ConfigError("temperature and timeout_s: expected more than 0.")

    def extra_columns(self) -> tuple[str, ...]:
        return ("test", "entry_point")

    def unfit(self, text: str, target: str) -> str | None:
        return None

    def tokenizer(self, base: str) -> Any:
        return self.load_tokenizer(base)

    def generation(self, tokenizer: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"stop_strings": self.stop, "tokenizer": tokenizer} if self.stop else {}
        return found

    def finish(self, text: str) -> str:
        ends = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        return text[: min(ends)] if ends else text

    def measure(self, model: Any, tokenizer: Any, rows: Dataset, batch_size: int) -> dict[str, Any]:
        from interleaf.metrics import code_metrics

        drawn = {"do_sample": True, "temperature": self.temperature} if self.samples > 1 else {}
        columns = rows.to_dict()
        answers: list[list[str]] = [[] for _ in range(len(rows))]
        for _ in range(self.samples):
            for mine, answer in zip(
                answers, self.generate(model, tokenizer, columns, batch_size, **drawn), strict=True
            ):
                mine.append(answer)
        return code_metrics(columns, answers, self.timeout_s)
