"""Code generation: a prompt, such as a signature with its docstring, is completed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from interleaf.errors import ConfigError
from interleaf.metrics import code_metrics, exact_match, valid_syntax
from interleaf.sandbox import run_programs
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
        drawn = {"do_sample": True, "temperature": self.temperature} if self.samples > 1 else {}
        columns = rows.to_dict()
        draws = [list(self.generate(model, tokenizer, columns, batch_size, **drawn)) for _ in range(self.samples)]
        first = draws[0]
        programs = [prompt + answer for prompt, answer in zip(columns["text"], first, strict=True)]
        found = {
            "exact_match": exact_match(first, columns["target"]),
            "valid_syntax": sum(valid_syntax(programs)) / len(programs),
        }
        return found | self._passed(columns, draws) if "test" in columns else found

    def _passed(self, columns: dict[str, list[str]], draws: list[list[str]]) -> dict[str, Any]:
        """Run every answer with its tests, in the sandbox."""
        names = columns.get("entry_point", [""] * len(columns["text"]))
        tests = [f"{test}\ncheck({name})" if name else test for test, name in zip(columns["test"], names, strict=True)]
        programs = [
            (prompt + draw[i], test)
            for i, (prompt, test) in enumerate(zip(columns["text"], tests, strict=True))
            for draw in draws
        ]
        outcomes = [outcome.passed for outcome in run_programs(programs, timeout_s=self.timeout_s)]
        by_row = [outcomes[i : i + len(draws)] for i in range(0, len(outcomes), len(draws))]
        return code_metrics(by_row, [k for k in (1, 10, 100) if k <= len(draws)])
