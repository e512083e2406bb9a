"""The same task and budget with an adapter, full fine-tuning, LoRA and the head alone: quality, cost, forgetting.

Every arm and seed runs in a process of its own, so that peak memory is its own and nothing is carried over.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import TrainerCallback, set_seed

from interleaf.depth import wants_probe
from interleaf.errors import ConfigError, DataError, TrainingError
from interleaf.fit import fit
from interleaf.forgetting import memory_of
from interleaf.metrics import interval
from interleaf.record import command, curves, environment
from interleaf.settings import TrainSettings
from interleaf.store import WEIGHTS
from interleaf.tasks.base import Splits
from interleaf.train import Run, prepare
from interleaf.tuner import task_head

if TYPE_CHECKING:
    from datasets import Dataset

ARMS = ("adapter", "lora", "full", "head")
COSTS = ("seconds", "seconds_to_best", "peak_memory_bytes", "flops_per_step", "stored_bytes", "trained_parameters")


@dataclass(frozen=True)
class CompareSettings:
    """What `interleaf compare` does with the settings of a run."""

    arms: list[str] = field(default_factory=lambda: list(ARMS))
    """Ways of training: adapter, lora, full, head."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of split, initialisation and order."""
    learning_rates: dict[str, float] = field(default_factory=lambda: {"full": 5e-5, "head": 1e-2})
    """Peak learning rates of the arms whose best is not the run's own."""
    lora: dict[str, Any] = field(default_factory=lambda: {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"})
    """Settings of PEFT's LoraConfig."""

    def __post_init__(self) -> None:
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise ConfigError(f"compare: there is no arm {unknown[0]!r}. There are: {', '.join(ARMS)}.")
        if not self.arms or not self.seeds:
            raise ConfigError("compare: name one arm and one seed at least.")


def compare_settings(settings: TrainSettings) -> CompareSettings:
    """Read the `compare` section of a run's settings.

    Raises:
        ConfigError: an unknown key or arm.
    """
    known = {f.name for f in dataclasses.fields(CompareSettings)}
    if unknown := sorted(settings.compare.keys() - known):
        raise ConfigError(f"compare: unknown setting {unknown[0]!r}. Known: {', '.join(sorted(known))}.")
    if wants_probe(settings):
        raise ConfigError("compare: `layers: auto` would choose by rows that are measured. Name the layers.")
    if settings.forget_budget is not None:
        raise ConfigError("compare: forget_budget would stop some ways of training and not others. Leave it out.")
    asked = dict(settings.compare)
    try:
        if "learning_rates" in asked:
            asked["learning_rates"] = {arm: float(rate) for arm, rate in asked["learning_rates"].items()}
        if "seeds" in asked:
            asked["seeds"] = [int(seed) for seed in asked["seeds"]]
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"compare: {error}.") from error
    return CompareSettings(**asked)


@dataclass(frozen=True)
class ArmRun:
    """What one arm gave and cost with one seed."""

    arm: str
    seed: int
    metrics: dict[str, Any]
    trained_parameters: int
    stored_bytes: int
    seconds: float
    seconds_to_best: float
    peak_memory_bytes: int
    flops_per_step: int
    forgetting: dict[str, Any] | None
    history: list[dict[str, Any]]


def compare(settings: TrainSettings, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Run every arm with every seed, arm after arm within a seed, and return all that was measured.

    Raises:
        TrainingError: an arm that failed, with its reason.
    """
    asked = compare_settings(settings)
    arms = [arm for arm in asked.arms if arm != "head" or settings.task == "classification"]
    runs: list[ArmRun] = []
    for seed in asked.seeds:
        for arm in arms:
            say(f"{arm}, seed {seed}")
            runs.append(_in_own_process(settings, asked, arm, seed))
    return {
        "settings": settings.as_dict(),
        "environment": environment(),
        "command": command(),
        "arms": {arm: summary([run for run in runs if run.arm == arm]) for arm in arms},
        "runs": [dataclasses.asdict(run) for run in runs],
    }


def _in_own_process(settings: TrainSettings, asked: CompareSettings, arm: str, seed: int) -> ArmRun:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        process = multiprocessing.get_context("spawn").Process(
            target=_child, args=(settings, asked, arm, seed, str(result))
        )
        process.start()
        process.join()
        told = json.loads(result.read_text("utf-8")) if result.exists() else {}
        if "error" in told or process.exitcode:
            raise TrainingError(f"{arm}, seed {seed}: {told.get('error', f'exit code {process.exitcode}')}")
        return ArmRun(**told)


def _child(settings: TrainSettings, asked: CompareSettings, arm: str, seed: int, result: str) -> None:
    try:
        found: dict[str, Any] = dataclasses.asdict(run_arm(settings, asked, arm, seed))
    except Exception as error:  # to the parent, who reports it
        found = {"error": f"{type(error).__name__}: {error}"}
    Path(result).write_text(json.dumps(found), "utf-8")


def run_arm(settings: TrainSettings, asked: CompareSettings, arm: str, seed: int) -> ArmRun:
    """Train one arm with one seed and measure it."""
    rate = asked.learning_rates.get(arm, settings.learning_rate)
    scratch = Path(tempfile.mkdtemp())
    settings = dataclasses.replace(settings, seed=seed, learning_rate=rate, out=str(scratch / "out"), report_to=[])
    try:
        run = prepare(settings)
        attach(arm, run, asked)
        splits, held = halves(run.splits, seed)
        adapted, ref = arm in ("adapter", "lora"), settings.earlier
        memory = memory_of(run.model, run.task, run.tokenizer, ref, adapted) if ref else None
        flops = step_flops(run)
        set_seed(seed)
        clock = Clock(run.task.best_metric)
        start = time.monotonic()
        fitted = fit(run.model, run.task, run.tokenizer, splits, settings, scratch / "run", (clock,))
        seconds = time.monotonic() - start
        return ArmRun(
            arm=arm,
            seed=seed,
            metrics=run.task.evaluate(run.model, run.tokenizer, held, 2 * settings.batch_size),
            trained_parameters=sum(p.numel() for p in run.model.parameters() if p.requires_grad),
            stored_bytes=_stored_bytes(arm, run, scratch),
            seconds=seconds,
            seconds_to_best=clock.best()[1],
            peak_memory_bytes=peak_memory_bytes(),
            flops_per_step=flops,
            forgetting=memory.told(run.model, adapted) if memory else None,
            history=curves(fitted.history),
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def attach(arm: str, run: Run, asked: CompareSettings) -> None:
    """Make the arm's weights, and nothing else, train."""
    if arm == "adapter":
        return
    name, model = run.settings.name, run.model
    model.delete_adapter(name)
    heads = task_head(model)
    set_seed(run.settings.seed)
    if arm == "lora":
        model.add_adapter(name, LoraConfig(modules_to_save=heads or None, **asked.lora))
        model.train_adapter(name)
        return
    for parameter in model.parameters():
        parameter.requires_grad = arm == "full"
    for head in heads:
        model.get_submodule(head).requires_grad_(True)


def halves(splits: Splits, seed: int) -> tuple[Splits, Dataset]:
    """Divide the held-out rows: one half chooses the best epoch, the other, which nothing has seen, is measured.

    Raises:
        DataError: fewer than two rows are held out.
    """
    if len(splits.dev) < 2:
        raise DataError("a comparison needs two held-out rows at least: one to choose by, one to measure.")
    parts = splits.dev.train_test_split(test_size=0.5, seed=seed, keep_in_memory=True)
    return dataclasses.replace(splits, dev=parts["train"]), parts["test"]


def _stored_bytes(arm: str, run: Run, scratch: Path) -> int:
    """Store what the task needs, and return its size on disk."""
    if arm == "adapter":
        return (run.model.save_adapter(scratch / "stored", run.settings.name) / WEIGHTS).stat().st_size
    tensors = {n: p.detach().cpu().contiguous() for n, p in run.model.named_parameters() if p.requires_grad}
    save_file(tensors, scratch / "stored.safetensors")
    return (scratch / "stored.safetensors").stat().st_size


def step_flops(run: Run) -> int:
    """Count the floating-point operations of one training step, forward and backward, on a typical batch."""
    from torch.utils.flop_counter import FlopCounterMode

    count = min(run.settings.batch_size, len(run.splits.train))
    rows = run.task.encode(run.splits.train.select(range(count)), run.tokenizer)
    batch = {k: v.to(run.model.device) for k, v in run.task.collator(run.tokenizer)(list(rows)).items()}
    training = run.model.training
    run.model.train()
    with FlopCounterMode(display=False) as counter:
        run.model(**batch).loss.backward()
    run.model.train(training)
    run.model.zero_grad()
    return int(counter.get_total_flops())


def peak_memory_bytes() -> int:
    """Return this process's peak memory: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Clock(TrainerCallback):
    """Notes when each dev score was reached, in seconds from the start, evaluation included.

    Args:
        metric: the dev metric; `loss` is better when lower.
    """

    def __init__(self, metric: str) -> None:
        self.metric, self.start = metric, time.monotonic()
        self.reached: list[tuple[float, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.monotonic()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.reached.append((float(metrics[f"eval_{self.metric}"]), time.monotonic() - self.start))

    def best(self) -> tuple[float, float]:
        """Return the best score and when it was first reached."""
        sign = -1 if self.metric == "loss" else 1
        return max(self.reached, key=lambda pair: (sign * pair[0], -pair[1]))


def summary(runs: Sequence[ArmRun]) -> dict[str, Any]:
    """Return means over the seeds with the 95% confidence interval of the mean (Student's t)."""
    scores = [k for k, v in runs[0].metrics.items() if isinstance(v, float)]
    return {
        "seeds": [run.seed for run in runs],
        "scores": {name: interval([run.metrics[name] for run in runs]) for name in scores},
        "costs": {name: interval([getattr(run, name) for run in runs]) for name in COSTS},
        "forgetting": _mean_forgetting([run.forgetting for run in runs if run.forgetting is not None]),
    }


def _mean_forgetting(told: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not told:
        return None
    off = [one["off"] for one in told if one["off"] is not None]
    changes = [one["off"] - one["before"] for one in told if one["off"] is not None]
    return {
        "measure": told[0]["measure"],
        **{name: interval([one[name] for one in told]) for name in ("before", "on", "lost")},
        "off": interval(off) if off else None,
        "off_minus_before": max(changes, key=abs) if off else None,
    }
