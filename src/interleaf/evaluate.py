"""Use a stored adapter: open it with its base and task, measure it on data, predict with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from interleaf import store
from interleaf.errors import StoreError
from interleaf.model import adapt
from interleaf.tasks import TASKS
from interleaf.tasks.base import Task


@dataclass
class Opened:
    """A stored adapter on its base, with the task it was trained for."""

    task: Task
    model: Any
    tokenizer: Any
    record: dict[str, Any]

    def evaluate(self, data: str, batch_size: int = 64) -> dict[str, Any]:
        """Return the task's full metrics on labelled data.

        Raises:
            DataError: the data is not of the form the adapter was trained on.
        """
        return self.task.evaluate(self.model, self.tokenizer, self.task.load_one(data), batch_size)

    def predict(self, texts: Iterable[str], batch_size: int = 32) -> Iterator[dict[str, Any]]:
        """Yield the task's prediction for each text, in order."""
        return self.task.predict(self.model, self.tokenizer, texts, batch_size)


def open_adapter(path: str | Path, base: str | None = None) -> Opened:
    """Load an adapter with the base and the task it names.

    Args:
        path: an adapter folder, or a hub name.
        base: where the base is, if not where it was when the adapter was trained.

    Raises:
        StoreError: damaged, made for another base, or stored without a task.
        BaseModelError: the base cannot be found.
    """
    stored = store.read(path)
    described = stored.adaptation.task
    if not described:
        raise StoreError(f"{path} was stored without a task, so nothing is known of its data and labels.")
    if described["name"] not in TASKS:
        raise StoreError(f"{path}: this version has no task {described['name']!r}.")
    task = TASKS[described["name"]].from_state(described["state"])
    base = base or stored.config.base_model_name_or_path
    if not base:
        raise StoreError(f"{path} does not say which base it was trained on. Name it with --base.")
    tokenizer = task.tokenizer(base)
    model = adapt(task.model(base))
    model.load_adapter(stored.path, tokenizer=tokenizer)
    if torch.cuda.is_available():
        model.to("cuda")
    return Opened(task, model.eval(), tokenizer, stored.record)
