"""What every task is: one object that train, evaluate and predict share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Splits:
    """Rows to train on and rows held out; `dropped` counts the rows that were left out, by the reason."""

    train: Dataset
    dev: Dataset
    dropped: dict[str, int] = field(default_factory=dict)


class Task(Protocol):
    """One object that knows a task's data, model, metrics and predictions."""

    name: ClassVar[str]
    best_metric: ClassVar[str]
    """What the Trainer chooses the best epoch by; `loss` is the only one that is better when lower."""
    labels: list[str] | None

    def load(
        self, train: str, dev: str | None = None, *, dev_fraction: float = 0.1, seed: int = 0, limit: int | None = None
    ) -> Splits:
        """Read and check the rows; make a held-out split if none is given."""

    def load_one(self, ref: str) -> Dataset:
        """Read and check rows to evaluate on."""

    def tokenizer(self, base: str) -> Any:
        """Load the base's tokenizer."""

    def model(self, base: str) -> Any:
        """Load the base with this task's head."""

    def encode(self, data: Dataset, tokenizer: Any) -> Dataset:
        """Turn rows into model inputs."""

    def collator(self, tokenizer: Any) -> Any:
        """Return what makes a batch of encoded rows."""

    @property
    def compute_metrics(self) -> Callable[[Any], dict[str, float]] | None:
        """What the Trainer measures after an epoch; None: the loss alone."""

    def evaluate(self, model: Any, tokenizer: Any, data: Dataset, batch_size: int = 64) -> dict[str, Any]:
        """Return all metrics on rows."""

    def predict(
        self, model: Any, tokenizer: Any, texts: Iterable[str], batch_size: int = 32
    ) -> Iterator[dict[str, Any]]:
        """Yield a prediction a text, in order."""

    def examples(self, model: Any, tokenizer: Any, data: Dataset, count: int) -> list[dict[str, Any]]:
        """Return a few rows to look at, with the keys input, expected and answer; of a classifier also `score`."""

    def state(self) -> dict[str, Any]:
        """Return what is stored with the adapter."""
