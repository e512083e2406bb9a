"""Train several tasks at once over one frozen base: an adapter that they share, and above it one of each task's own.

Each batch is of one task. How often a task comes is its number of rows to the power of 1 / temperature, as in Raffel et
al. 2020 (arXiv 1910.10683, 3.5.2); one that does not get better any more leaves the mixture.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, set_seed

from interleaf.adapter import as_config
from interleaf.compose import Stack
from interleaf.errors import ConfigError
from interleaf.files import refuse_existing
from interleaf.fit import StopOnNaN, training_arguments
from interleaf.model import adapt, adapter_tensors
from interleaf.record import command, curves, environment
from interleaf.settings import TrainSettings
from interleaf.store import Adaptation
from interleaf.tasks.base import Splits, Task
from interleaf.tasks.rows import model_inputs
from interleaf.train import make_task
from interleaf.tuner import task_head


@dataclasses.dataclass
class Part:
    """One task of the mixture."""

    settings: TrainSettings
    task: Task
    splits: Splits
    tokenizer: Any
    rows: Any = None
    running: bool = True
    scores: list[float] = dataclasses.field(default_factory=list)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.settings.name

    def better(self, score: float, than: float) -> bool:
        """Say whether a dev score is better than another."""
        return score < than if self.task.best_metric == "loss" else score > than

    def stale(self) -> bool:
        """Say whether the last `patience` passes gave nothing better."""
        patience = self.settings.patience
        if patience is None or len(self.scores) <= patience:
            return False
        best = min(self.scores) if self.task.best_metric == "loss" else max(self.scores)
        return self.scores.index(best) < len(self.scores) - patience


class Mixture(Dataset[list[dict[str, Any]]]):
    """Batches of one task each, drawn by temperature among the tasks that still run; each goes through all its rows.

    Args:
        parts: the tasks, their rows encoded.
        temperature: 1 draws by the number of rows, a large one draws all alike.
        seed: of the draws and the rows' order.
    """

    def __init__(self, parts: Sequence[Part], temperature: float, seed: int) -> None:
        self.parts, self.temperature, self.random = parts, temperature, random.Random(seed)
        self.left: dict[str, list[int]] = {part.name: [] for part in parts}

    def __len__(self) -> int:
        return sum(-(-len(part.rows) // part.settings.batch_size) for part in self.parts)

    def shares(self) -> dict[str, float]:
        """Return each running task's chance."""
        weights = {part.name: len(part.rows) ** (1 / self.temperature) for part in self.parts if part.running}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def __getitem__(self, number: int) -> list[dict[str, Any]]:
        shares = self.shares()
        name = self.random.choices(list(shares), list(shares.values()))[0]
        part = next(part for part in self.parts if part.name == name)
        size = min(part.settings.batch_size, len(part.rows))
        if len(self.left[name]) < size:
            self.left[name] = self.random.sample(range(len(part.rows)), len(part.rows))
        batch, self.left[name] = self.left[name][:size], self.left[name][size:]
        return [{**part.rows[row], "task": name} for row in batch]


class MultitaskTrainer(Trainer):
    """The stock Trainer, with each batch through its task's adapters and head, and each task's own dev score."""

    control: Any

    def __init__(self, parts: Sequence[Part], shared: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.parts, self.shared = {part.name: part for part in parts}, shared
        self.best: tuple[float, dict[str, torch.Tensor]] | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        run_task(model, self.shared, self.parts[inputs.pop("task")])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for part in self.parts.values():
            part.metrics = measured(self.model, self.shared, part)
            part.scores.append(float(part.metrics[part.task.best_metric]))
            found[f"eval_{part.name}"] = part.scores[-1]
            part.running = part.running and not part.stale()
        self.model.train()
        mean = statistics.fmean(p.scores[-1] * (-1 if p.task.best_metric == "loss" else 1) for p in self.parts.values())
        if self.best is None or mean > self.best[0]:
            names = [self.shared, *self.parts]
            self.best = mean, {k: v.clone() for name in names for k, v in _live(self.model, name).items()}
        if not any(part.running for part in self.parts.values()):
            self.control.should_training_stop = True
        found["eval_mean"] = mean
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def take_best(self) -> None:
        """Give the adapters the weights that were best on average over the tasks."""
        if self.best is not None:
            for name in [self.shared, *self.parts]:
                for key, tensor in _live(self.model, name).items():
                    tensor.copy_(self.best[1][key])


def _live(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {f"{name}: {key}": tensor.detach() for key, tensor in adapter_tensors(model, name).items()}


def run_task(model: Any, shared: str, part: Part) -> None:
    """Make a task's adapters and head the running ones; its loss is over its own labels."""
    model.set_adapter(Stack(shared, part.name))
    if part.task.labels is not None:
        model.config.num_labels = len(part.task.labels)
        model.num_labels = len(part.task.labels)


def measured(model: Any, shared: str, part: Part) -> dict[str, Any]:
    """Return a task's metrics on its held-out rows."""
    model.eval()
    run_task(model, shared, part)
    return part.task.evaluate(model, part.tokenizer, part.splits.dev, 2 * part.settings.batch_size)


def prepare_multitask(settings: Sequence[TrainSettings], out: str) -> list[Part]:
    """Load and check the tasks of some runs, which share one base.

    Args:
        settings: the runs; each task's adapter, name, `patience`, batch size and folder are its run's, the seed, the
            shared adapter, the learning rate and `epochs` the first's.
        out: folder of the shared adapter.

    Raises:
        ConfigError: fewer than two, another base or kind of task, or a name or folder for two.
        InterleafError: what is wrong with one of them.
    """
    if len(settings) < 2:
        raise ConfigError("multitask: name two configs or more, one a task.")
    unnamed = TrainSettings.name
    settings = [dataclasses.replace(s, name=Path(s.out).name) if s.name == unnamed else s for s in settings]
    first = settings[0]
    for one in settings:
        if (one.base, one.task) != (first.base, first.task):
            raise ConfigError(f"multitask: {one.out} is {one.task} on {one.base}; expected {first.task}, {first.base}.")
    for what, values in (("name", [s.name for s in settings]), ("folder", [Path(s.out).resolve() for s in settings])):
        if len({*values, "shared" if what == "name" else Path(out).resolve()}) <= len(values):
            raise ConfigError(f"multitask: two adapters have one {what}. Give each config its own; `shared` is taken.")
    parts = []
    for one in settings:
        refuse_existing(Path(one.out), one.overwrite)
        task = make_task(one)
        splits = task.load(one.train, one.dev, dev_fraction=one.dev_fraction, seed=one.seed, limit=one.limit)
        parts.append(Part(one, task, splits, task.tokenizer(one.base)))
    refuse_existing(Path(out), first.overwrite)
    return parts


def _model(parts: Sequence[Part], shared: str) -> Any:
    first = parts[0]
    set_seed(first.settings.seed)
    model: Any = adapt(first.task.model(first.settings.base))
    model.add_adapter(shared, _config(first.settings, modules_to_save=[]))
    for part in parts:
        model.add_adapter(part.name, _config(part.settings))
        own = first.task.model(first.settings.base) if part is first else part.task.model(part.settings.base)
        for head in task_head(own):  # of as many labels as the task has
            model.get_submodule(head).modules_to_save[part.name] = own.get_submodule(head)
    model.train_adapter(Stack(shared, *[part.name for part in parts]))
    return model.to(PartialState().device)


def _config(settings: TrainSettings, **more: Any) -> Any:
    return as_config(settings.adapter, **settings.adapter_options, **more)


def train_multitask(
    parts: Sequence[Part], out: str, temperature: float = 2.0, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, dict[str, Any]]:
    """Train, take the pass that was best on average, and save the shared adapter and each task's.

    `interleaf evaluate` and `predict` put a task's adapter onto the shared one, whose folder it remembers.

    Returns:
        each task's metrics.

    Raises:
        TrainingError: the loss became NaN or infinite; nothing was saved.
    """
    start, shared, first = time.monotonic(), "shared", parts[0]
    model = _model(parts, shared)
    for part in parts:
        part.rows = model_inputs(part.task.encode(part.splits.train, part.tokenizer), model)
    collate: dict[str, Callable[..., Any]] = {p.name: p.task.collator(p.tokenizer) for p in parts}
    arguments = dataclasses.replace(
        training_arguments(first.settings, Path(out + ".log"), first.task),
        save_strategy="no",
        metric_for_best_model="mean",
        greater_is_better=True,
        load_best_model_at_end=False,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
    )
    trainer = MultitaskTrainer(
        parts,
        shared,
        model=model,
        args=arguments,
        train_dataset=Mixture(parts, temperature, first.settings.seed),
        eval_dataset=first.splits.dev,
        data_collator=lambda given: _collated(given[0], collate),
        callbacks=[StopOnNaN(), *callbacks],
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.take_best()
    seconds = time.monotonic() - start
    model.save_adapter(out, shared, overwrite=first.settings.overwrite)
    for part in parts:
        metrics = measured(model, shared, part)
        adaptation = Adaptation(
            task={"name": part.task.name, "state": part.task.state()},
            run=part.settings.as_dict() | {"onto": [out]},
            metrics=metrics,
            seconds=round(seconds, 1),
            history=curves(trainer.state.log_history),
            environment=environment(),
            command=command(),
        )
        part.metrics = metrics
        model.peft_config[part.name].base_model_name_or_path = part.settings.base
        model.save_adapter(
            part.settings.out, part.name, adaptation, tokenizer=part.tokenizer, overwrite=part.settings.overwrite
        )
    return {part.name: part.metrics for part in parts}


def _collated(rows: list[dict[str, Any]], collate: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    name = rows[0]["task"]
    batch = collate[name]([{k: v for k, v in row.items() if k != "task"} for row in rows])
    return {**batch, "task": name}
