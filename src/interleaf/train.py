"""Train one adapter on one task: a thin layer over the stock Hugging Face Trainer."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import interleaf.adapters  # noqa: F401  (registers the kinds)
from interleaf.adapter import AdapterConfig
from interleaf.depth import Tried, find_layers, wants_probe
from interleaf.errors import ConfigError, StoreError
from interleaf.files import refuse_existing
from interleaf.fit import adapted_model, fit, in_bfloat16
from interleaf.forgetting import ForgetBudget, Memory, memory_of
from interleaf.record import command, curves, environment, side_by_side
from interleaf.settings import TrainSettings
from interleaf.sites import Site
from interleaf.store import Adaptation
from interleaf.summary import AdapterSummary
from interleaf.tasks import TASKS, check_options
from interleaf.tasks.base import Splits, Task
from interleaf.tasks.rows import token_batches
from interleaf.trunk_cache import NoCache, cut_of
from interleaf.widths import Pruning, narrow

CHECKPOINTS = ".checkpoints"
LOGS = "runs"  # where the Trainer has TensorBoard's files


@dataclass(frozen=True)
class Plan:
    """What a run will train, where, and what it will need; known before it starts."""

    base: str
    task: str
    labels: list[str]
    dropped: dict[str, int]
    train_rows: int
    dev_rows: int
    steps: int
    sites: list[str]
    adapter_parameters: int
    head_parameters: int
    base_parameters: int
    memory_bytes: int
    precision: str
    trunk_cache: str
    tried_layers: list[Tried]


@dataclass(frozen=True)
class Result:
    """What a run gave."""

    path: Path | None
    metrics: dict[str, Any]
    trained_parameters: int
    seconds: float
    trunk_cache: str
    saved_s: float
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Run:
    """A run with everything loaded and checked, ready to start."""

    settings: TrainSettings
    task: Task
    model: Any
    tokenizer: Any
    splits: Splits
    tried: list[Tried] = field(default_factory=list)

    def plan(self) -> Plan:
        """Say what will be trained, where, with how many parameters and how much memory."""
        summary = self.summary()
        steps = self._steps_a_pass() * self.settings.epochs
        return Plan(
            base=self.settings.base,
            task=self.task.name,
            labels=list(self.task.labels or []),
            dropped=self.splits.dropped,
            train_rows=len(self.splits.train),
            dev_rows=len(self.splits.dev),
            steps=math.ceil(steps),
            sites=[s.write for s in self.sites()],
            adapter_parameters=summary.adapter_parameters,
            head_parameters=summary.head_parameters,
            base_parameters=summary.base_parameters,
            memory_bytes=self._memory_bytes(summary),
            precision="bfloat16" if in_bfloat16(self.settings.precision) else "float32",
            trunk_cache=self._trunk(),
            tried_layers=self.tried,
        )

    def _steps_a_pass(self) -> int:
        rows, tokens = self.splits.train, self.settings.batch_tokens
        if tokens is None:
            return math.ceil(len(rows) / self.settings.batch_size)
        return len(token_batches(self.task.encode(rows, self.tokenizer), tokens, self.settings.seed))

    def _trunk(self) -> str:
        """Say whether layers below the adapter can be run once."""
        if self.settings.cache == "off":
            return "off"
        try:
            return str(cut_of(self.model))
        except NoCache as reason:
            return f"not used: {reason}"

    def summary(self) -> AdapterSummary:
        """Describe the adapter that will be trained."""
        return next(s for s in self.model.adapter_summary() if s.name == self.settings.name)

    def sites(self) -> list[Site]:
        """List the sites that will be trained."""
        config = self.model.peft_config[self.settings.name]
        return config.sites(self.model) if isinstance(config, AdapterConfig) else []

    def _memory_bytes(self, summary: AdapterSummary) -> int:
        """Estimate the peak: the base's weights, 16 bytes per trained one, and what backward keeps."""
        config = self.model.config.get_text_config()
        width, layers = config.hidden_size, getattr(config, "num_hidden_layers", 1)
        tokens = self.settings.batch_size * min(self.settings.max_length, _longest(self.splits, self.tokenizer))
        kept = 24 * tokens * width * layers * 4  # about 24 values of the model's width a token and layer
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return int(weights + 16 * (summary.adapter_parameters + summary.head_parameters) + kept)

    def train(self, *callbacks: TrainerCallback) -> Result:
        """Train, keep the best epoch, save the adapter.

        Raises:
            TrainingError: the loss became NaN or infinite, or too much was forgotten; nothing was saved.
        """
        start = time.monotonic()
        scratch = Path(self.settings.out + CHECKPOINTS)
        base = self.base_metrics()
        memory = self._memory()
        if memory is not None and self.settings.forget_budget is not None:
            callbacks = (*callbacks, ForgetBudget(memory, self.settings.forget_budget, self.task.best_metric))
        budget, name = self.settings.unit_budget, self.settings.name
        if budget is not None:
            callbacks = (*callbacks, Pruning(self.model, name, budget, self.task.best_metric))
        fitted = fit(self.model, self.task, self.tokenizer, self.splits, self.settings, scratch, callbacks)
        if budget is not None:
            narrow(self.model, name)
        metrics = self.task.evaluate(self.model, self.tokenizer, self.splits.dev, 2 * self.settings.batch_size)
        metrics |= {"base": base} if base else {}
        metrics |= {"forgetting": memory.told(self.model, adapted=True)} if memory else {}
        self.model.peft_config[self.settings.name].base_model_name_or_path = self.settings.base
        path = self.model.save_adapter(
            self.settings.out,
            self.settings.name,
            self._adaptation(metrics, time.monotonic() - start, fitted.history),
            tokenizer=self.tokenizer,
            overwrite=self.settings.overwrite,
        )
        if (scratch / LOGS).is_dir():
            shutil.move(scratch / LOGS, path / LOGS)
        shutil.rmtree(scratch, ignore_errors=True)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        seconds = time.monotonic() - start
        return Result(path, metrics, trained, seconds, fitted.trunk_cache, fitted.saved_s, fitted.history)

    def _memory(self) -> Memory | None:
        ref = self.settings.earlier
        return memory_of(self.model, self.task, self.tokenizer, ref, adapted=True) if ref else None

    def _adaptation(self, metrics: dict[str, Any], seconds: float, history: list[dict[str, Any]]) -> Adaptation:
        return Adaptation(
            task={"name": self.task.name, "state": self.task.state()},
            run=self.settings.as_dict(),
            metrics=metrics,
            plan=asdict(self.plan()),
            seconds=round(seconds, 1),
            history=curves(history),
            examples=self.examples(),
            environment=environment(),
            command=command(),
        )

    def examples(self) -> list[dict[str, Any]]:
        """Answer a few held-out rows with the adapter and, where it can, with the untouched base."""
        count = self.settings.examples
        if not count:
            return []
        rows = self.task.examples(self.model, self.tokenizer, self.splits.dev, count)
        if self._has_head():
            return side_by_side(rows, None)
        with self.model.disable_adapter():
            return side_by_side(rows, self.task.examples(self.model, self.tokenizer, self.splits.dev, count))

    def _has_head(self) -> bool:
        """Say whether there is a head that has to be learnt first, so that the base alone can do nothing."""
        return self.summary().head_parameters > 0

    def base_metrics(self) -> dict[str, Any] | None:
        """Measure the untouched base, where it can do the task."""
        if self._has_head():
            return None
        with self.model.disable_adapter():
            return self.task.evaluate(self.model, self.tokenizer, self.splits.dev, 2 * self.settings.batch_size)


def prepare(settings: TrainSettings) -> Run:
    """Load base and data, add the adapter, and check all that can be checked before a run.

    Raises:
        InterleafError: what is wrong, before anything was written.
    """
    refuse_existing(Path(settings.out), settings.overwrite)
    _check_scratch(settings)
    _check_loggers(settings.report_to)
    task = make_task(settings)
    splits = task.load(
        settings.train, settings.dev, dev_fraction=settings.dev_fraction, seed=settings.seed, limit=settings.limit
    )
    tokenizer = task.tokenizer(settings.base)
    tried: list[Tried] = []
    if wants_probe(settings):
        settings, tried = find_layers(settings, task, splits, tokenizer)
    return Run(settings, task, adapted_model(task, settings), tokenizer, splits, tried)


def make_task(settings: TrainSettings) -> Task:
    """Make the task object of a run.

    Raises:
        ConfigError: an unknown task, or a setting that the task does not have.
    """
    check_options(settings.task, settings.task_options)
    made: Task = TASKS[settings.task](**settings.task_arguments())
    return made


def _check_scratch(settings: TrainSettings) -> None:
    scratch = Path(settings.out + CHECKPOINTS)
    if scratch.exists() and not (settings.resume or settings.overwrite):
        raise StoreError(f"{scratch} holds an unfinished run. Continue it with --resume, or drop it with --overwrite.")
    if scratch.exists() and not settings.resume:
        shutil.rmtree(scratch)
    if settings.resume and not scratch.exists():
        raise ConfigError(f"there is nothing to resume: {scratch} does not exist.")


def _check_loggers(names: list[str]) -> None:
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    try:
        for logger in get_reporting_integration_callbacks(names):
            logger()
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"report_to={names}: {error}") from error


def _longest(splits: Splits, tokenizer: Any) -> int:
    texts = [t for column in splits.train.column_names if column.startswith("text") for t in splits.train[column]]
    longest = max(texts, key=len, default="")
    return len(tokenizer(longest, truncation=False)["input_ids"])


__all__ = ["Plan", "Result", "Run", "prepare"]
