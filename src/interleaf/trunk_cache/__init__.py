"""Run the frozen layers below the lowest adapter once, keep what they give on disk, and train the layers above.

Between epochs nothing changes below the lowest adapted layer. So its hidden states are stored, one row after the
other, and the layers below pass them on instead of running. No model is known by name: what a layer returns is
recorded, and the cached pass is compared with a whole one before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interleaf.errors import StoreError
from interleaf.tasks.rows import model_inputs
from interleaf.trunk_cache.cut import Cut, NoCache, cut_of
from interleaf.trunk_cache.skip import STATES, Skip, check
from interleaf.trunk_cache.states import ROW, stored_states

if TYPE_CHECKING:
    from datasets import Dataset

    from interleaf.settings import TrainSettings

__all__ = ["Cut", "NoCache", "Rows", "cut_of", "trunk_cache"]


@dataclass(frozen=True)
class Rows:
    """What a Trainer reads: rows to train on, rows held out, what makes a batch of them, and what was cached."""

    train: Dataset
    dev: Dataset
    collate: Callable[[list[dict[str, Any]]], Any]
    cached: str
    pass_s: float = 0.0
    """Seconds that the cached layers take for all rows."""


@contextmanager
def trunk_cache(model: Any, train: Dataset, dev: Dataset, collate: Any, settings: TrainSettings) -> Iterator[Rows]:
    """Let the frozen layers below run once, for as long as the block lasts; where that cannot be, say why.

    Dropout below the lowest adapter is off when its layers are cached.

    Args:
        train: encoded rows.
        dev: encoded rows.
        collate: makes a batch of encoded rows.
    """
    if settings.cache == "off":
        yield Rows(train, dev, collate, "off")
        return
    skip, reason = None, ""
    try:
        cut = cut_of(model)
        rows, distinct = _numbered(model, train, dev)
        states = stored_states(model, cut, distinct, collate, settings)
        skip = Skip(model, cut)
        check(model, cut, skip, states, distinct, collate)
    except BaseException as error:
        if skip is not None:
            skip.remove()
        if not isinstance(error, NoCache | OSError | StoreError):
            raise
        reason = str(error)
    if reason or skip is None:
        yield Rows(train, dev, collate, f"not used: {reason}")
        return

    def with_states(features: list[dict[str, Any]]) -> Any:
        batch = collate([{k: v for k, v in one.items() if k != ROW} for one in features])
        return {**batch, STATES: states.batch([one[ROW] for one in features], batch["attention_mask"])}

    count = len(train)
    try:
        parts = rows.select(range(count)), rows.select(range(count, len(rows)))
        yield Rows(*parts, with_states, f"{cut} ({states.size_bytes / 1e6:,.0f} MB)", pass_s=states.seconds)
    finally:
        skip.remove()


def _numbered(model: Any, train: Dataset, dev: Dataset) -> tuple[Dataset, Dataset]:
    """Put all rows together, with the columns that the model takes and the number that their states have.

    Returns:
        the rows, and those that differ by number: other splits of the same rows number them alike.
    """
    from datasets import concatenate_datasets

    rows = model_inputs(concatenate_datasets([train, dev]), model)
    if not {"input_ids", "attention_mask"} <= set(rows.column_names):
        raise NoCache("the model takes no input_ids with an attention_mask")
    inputs = [c for c in rows.column_names if c != "labels"]
    contents = [json.dumps(row) for row in zip(*(rows[c][:] for c in inputs), strict=True)]
    first = {content: i for i, content in reversed(list(enumerate(contents)))}
    numbers = {content: number for number, content in enumerate(sorted(first))}
    rows = rows.add_column(ROW, [numbers[content] for content in contents])
    return rows, rows.select([first[content] for content in numbers])
