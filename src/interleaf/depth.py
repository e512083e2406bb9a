"""How many of the upper layers an adapter needs: a short probe with few rows, measured from the top down.

The fewer layers are adapted, the less there is to run backward, and the more the trunk cache saves.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interleaf.blocks import stacks_of
from interleaf.errors import ConfigError
from interleaf.fit import adapted_model, fit
from interleaf.settings import TrainSettings
from interleaf.tasks.base import Splits, Task

AUTO = "auto"
ROWS, HELD_ROWS, EPOCHS = 600, 400, 3


@dataclass(frozen=True)
class Tried:
    """One number of upper layers, with the dev score and the time that it took."""

    layers: int
    score: float
    seconds: float


def wants_probe(settings: TrainSettings) -> bool:
    """Say whether the number of layers is to be found."""
    return settings.adapter_options.get("layers") == AUTO


def find_layers(
    settings: TrainSettings, task: Task, splits: Splits, tokenizer: Any
) -> tuple[TrainSettings, list[Tried]]:
    """Return settings with the smallest number of upper layers whose score is within the tolerance of all layers'.

    Args:
        settings: with `layers: auto` among the adapter's options.

    Raises:
        ConfigError: the model has more than one stack of layers.
    """
    few = Splits(_sample(splits.train, ROWS), _sample(splits.dev, HELD_ROWS))
    depth = _depth(task, settings)
    best = _tried(settings, task, few, tokenizer, depth)
    tried = [best]
    for layers in _ascending(depth):
        tried.append(_tried(settings, task, few, tokenizer, layers))
        if _near(tried[-1].score, best.score, settings.layers_tolerance, task.best_metric):
            return _with_layers(settings, layers), tried
    return _with_layers(settings, depth), tried


def _ascending(depth: int) -> list[int]:
    """Return 1, 2, 4 ... below the depth: what is found is at most twice what is needed."""
    return [2**i for i in range(depth) if 2**i < depth]


def _near(score: float, best: float, tolerance: float, metric: str) -> bool:
    return score <= best * (1 + tolerance) if metric == "loss" else score >= best - tolerance


def _with_layers(settings: TrainSettings, layers: int) -> TrainSettings:
    return dataclasses.replace(settings, adapter_options={**settings.adapter_options, "layers": f"last:{layers}"})


def _depth(task: Task, settings: TrainSettings) -> int:
    stacks = list(stacks_of(task.model(settings.base)))
    if len(stacks) != 1:
        raise ConfigError(f"layers: auto is for models with one stack of layers; this has {len(stacks)}. Name them.")
    return len(stacks[0][1])


def _tried(settings: TrainSettings, task: Task, few: Splits, tokenizer: Any, layers: int) -> Tried:
    start = time.monotonic()
    asked = dataclasses.replace(
        _with_layers(settings, layers), epochs=min(EPOCHS, settings.epochs), report_to=[], resume=False
    )
    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(adapted_model(task, asked), task, tokenizer, few, asked, Path(folder))
    key, sign = f"eval_{task.best_metric}", -1 if task.best_metric == "loss" else 1
    score = max((sign * entry[key] for entry in fitted.history if key in entry), default=math.nan)
    return Tried(layers, sign * score, time.monotonic() - start)


def _sample(rows: Any, count: int) -> Any:
    return rows.shuffle(seed=0).select(range(count)) if len(rows) > count else rows
