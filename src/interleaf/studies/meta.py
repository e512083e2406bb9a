"""Learn where an adapter should start, over many small tasks, so that a new one takes few steps and few examples.

A task is to tell some classes of one labelled data set apart; the classes of held-out tasks are never seen before. An
episode begins at the initialisation, with a head of noughts, and takes a few steps on a few rows of one task. Reptile
then moves the initialisation towards where the episode ended (Nichol et al. 2018, arXiv 1803.02999); first-order MAML
against the gradient that other rows of the task have there (Finn et al. 2017, 1703.03400). The stock Trainer makes the
steps: its batches are laid out by episodes, and a callback begins and ends each.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerCallback

from interleaf.base import empty_model
from interleaf.errors import ConfigError, DataError
from interleaf.fit import StopOnNaN, adapted_model, training_arguments
from interleaf.record import command, environment
from interleaf.settings import TrainSettings
from interleaf.store import Adaptation
from interleaf.tasks.classification import TextClassification
from interleaf.tasks.rows import model_inputs
from interleaf.train import make_task
from interleaf.trunk_cache import trunk_cache

METHODS = ("reptile", "fomaml")


@dataclasses.dataclass(frozen=True)
class MetaSettings:
    """How tasks are made and learnt from."""

    method: str = "reptile"
    """How episodes move the initialisation: reptile or fomaml."""
    ways: int = 2
    """Classes of a task."""
    shots: int = 8
    """Rows of each class that a step learns from; a held-out task has no others."""
    steps: int = 5
    """Steps of an episode, each on all of its rows."""
    rounds: int = 100
    """Episodes to learn the initialisation from."""
    held_out: int = 7
    """Classes kept for tasks to measure on."""
    words: int | None = None
    """Cut texts into pieces of so many words, each a row."""
    outer_rate: float | None = None
    """How far an episode moves the initialisation: of the way, for Reptile (1); learning rate for fomaml (3e-3)."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method={self.method!r}: expected {' or '.join(METHODS)}.")
        for name in ("ways", "shots", "steps", "rounds"):
            if getattr(self, name) < (2 if name == "ways" else 1):
                raise ConfigError(f"{name}={getattr(self, name)}: too few.")

    @property
    def rate(self) -> float:
        """How far an episode moves the initialisation."""
        return self.outer_rate if self.outer_rate is not None else 1.0 if self.method == "reptile" else 3e-3


class Episodes(TrainerCallback):
    """Begins every episode at the initialisation, with a head of noughts and a fresh optimizer, and ends it.

    Args:
        adapter: the weights whose initialisation it is.
        head: the head's weights, nought at each begin.
        length: steps of an episode.
        end: told at its end, after the last step, with the weights where it began; may write to these.
        query: told instead before the last step, when the gradients are those of its batch, which then changes nothing.
    """

    def __init__(
        self,
        adapter: Sequence[Tensor],
        head: Sequence[Tensor],
        length: int,
        end: Callable[[list[Tensor]], None] | None = None,
        query: Callable[[list[Tensor]], None] | None = None,
    ) -> None:
        self.adapter, self.head, self.length, self.end, self.query = list(adapter), list(head), length, end, query
        self.start = [weights.detach().clone() for weights in adapter]

    def _reset(self, optimizer: Any) -> None:
        with torch.no_grad():
            for weights, kept in zip(self.adapter, self.start, strict=True):
                weights.copy_(kept)
            for weights in self.head:
                weights.zero_()
        _inner(optimizer).state.clear()

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.length == 0:
            self._reset(optimizer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self.query is not None and (state.global_step + 1) % self.length == 0:
            self.query(self.start)
            for weights in (*self.adapter, *self.head):
                weights.grad = None

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.length == 0:
            if self.end is not None:
                self.end(self.start)
            self._reset(optimizer)


def _inner(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def reptile(adapter: Sequence[Tensor], rates: Iterator[float]) -> Callable[[list[Tensor]], None]:
    """Return Reptile's outer step: `start + rate * (end - start)`, each time with the next rate."""

    def step(start: list[Tensor]) -> None:
        rate = next(rates)
        for kept, ended in zip(start, adapter, strict=True):
            kept.add_(ended.detach() - kept, alpha=rate)

    return step


def fomaml(adapter: Sequence[Tensor], rate: float) -> Callable[[list[Tensor]], None]:
    """Return first-order MAML's outer step: Adam at the start, with the gradient at the episode's end."""
    optimizer: list[torch.optim.Optimizer] = []

    def step(start: list[Tensor]) -> None:
        if not optimizer:
            optimizer.append(torch.optim.Adam(start, lr=rate))
        for kept, ended in zip(start, adapter, strict=True):
            kept.grad = None if ended.grad is None else ended.grad.detach().clone()
        optimizer[0].step()

    return step


@dataclasses.dataclass
class Pool:
    """Encoded rows by class, and which classes are kept for tasks to measure on."""

    task: TextClassification
    tokenizer: Any
    rows: dict[str, list[dict[str, Any]]]
    seen: list[str]
    held_out: list[str]

    def tasks(self, ways: int) -> list[tuple[str, ...]]:
        """Return all held-out tasks."""
        return list(itertools.combinations(self.held_out, ways))

    def episode(self, classes: Sequence[str], count: int, rng: random.Random) -> list[dict[str, Any]]:
        """Draw rows of some classes, `count` each, labelled by the classes' order in the task."""
        drawn = [(rng.sample(self.rows[name], count), label) for label, name in enumerate(classes)]
        rows = [{**row, "labels": label} for found, label in drawn for row in found]
        rng.shuffle(rows)
        return rows


def prepare_pool(settings: TrainSettings, meta: MetaSettings) -> Pool:
    """Read the rows and divide the classes.

    Raises:
        ConfigError: another task than classification.
        DataError: too few classes, or rows of one.
    """
    task = make_task(settings)
    if not isinstance(task, TextClassification):
        raise ConfigError(f"meta: tasks are made of the classes of a classification, not of {settings.task}.")
    data = task.load_all(settings.train)
    if meta.words is not None:
        data = data.map(lambda rows: _pieces(rows, meta.words), batched=True, keep_in_memory=True)
    tokenizer = task.tokenizer(settings.base)
    labels = task.labels or []
    names = random.Random(settings.seed).sample(labels, len(labels))
    held_out, seen = sorted(names[: meta.held_out]), sorted(names[meta.held_out :])
    if min(len(seen), len(held_out)) < meta.ways:
        raise DataError(
            f"{settings.train} has {len(labels)} classes: with {meta.held_out} held out there are not {meta.ways} for "
            "a task on either side."
        )
    encoded = model_inputs(task.encode(data, tokenizer), empty_model(settings.base))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in labels}
    for row in encoded:
        rows[labels[row.pop("labels")]].append(row)
    needed = 2 * meta.shots
    if few := [name for name in labels if len(rows[name]) < needed]:
        raise DataError(f"class {few[0]!r} of {settings.train} has {len(rows[few[0]])} rows; a task needs {needed}.")
    task.labels = [f"class {number}" for number in range(meta.ways)]
    return Pool(task, tokenizer, rows, seen, held_out)


def _pieces(rows: dict[str, list[Any]], words: int) -> dict[str, list[Any]]:
    """Cut texts into pieces of so many words; what is left at the end is dropped."""
    found: dict[str, list[Any]] = {"text": [], "labels": []}
    for text, label in zip(rows["text"], rows["labels"], strict=True):
        every = text.split()
        pieces = [" ".join(every[at : at + words]) for at in range(0, len(every) - words + 1, words)]
        found["text"] += pieces
        found["labels"] += [label] * len(pieces)
    return found


def _trained(model: Any, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return the adapter's weights and its head's."""
    parts = model.parts(name)
    heads = [p for place, part in parts.items() if not place.endswith(".adapters") for p in part.parameters()]
    return [p for place, part in parts.items() if place.endswith(".adapters") for p in part.parameters()], heads


Batches = list[list[dict[str, Any]]]


def _run(model: Any, pool: Pool, settings: TrainSettings, batches: Batches, collate: Any, *callbacks: Any) -> None:
    arguments = dataclasses.replace(
        training_arguments(settings, Path(settings.out + ".log"), pool.task),
        num_train_epochs=1,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta1=0.0,  # an episode is too short for a memory of directions
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=batches,
        data_collator=lambda given: collate(given[0]),
        callbacks=[StopOnNaN(), *callbacks],
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()


def fresh(pool: Pool, settings: TrainSettings) -> Any:
    """Return the model with a fresh adapter."""
    return adapted_model(pool.task, settings)


def pretrain(pool: Pool, settings: TrainSettings, meta: MetaSettings, *callbacks: TrainerCallback) -> Any:
    """Train the adapter to tell all seen classes apart, for as many steps of as many rows: multi-task pretraining.

    Returns:
        the model, whose adapter has what was learnt.
    """
    rng = random.Random(settings.seed)
    task = copy.copy(pool.task)
    task.labels = pool.seen
    model = adapted_model(task, settings)
    every = [{**row, "labels": label} for label, name in enumerate(pool.seen) for row in pool.rows[name]]
    batches = [rng.sample(every, meta.ways * meta.shots) for _ in range(meta.rounds * meta.steps)]
    _run(model, pool, settings, batches, pool.task.collator(pool.tokenizer), *callbacks)
    found = fresh(pool, settings)
    with torch.no_grad():
        for weights, learnt in zip(_trained(found, settings.name)[0], _trained(model, settings.name)[0], strict=True):
            weights.copy_(learnt)
    return found


def learn(pool: Pool, settings: TrainSettings, meta: MetaSettings, *callbacks: TrainerCallback) -> Any:
    """Learn an initialisation over episodes of the seen classes.

    Returns:
        the model, whose adapter has it.
    """
    rng = random.Random(settings.seed)
    model = fresh(pool, settings)
    adapter, head = _trained(model, settings.name)
    batches: list[Any] = []
    for _ in range(meta.rounds):
        classes = rng.sample(pool.seen, meta.ways)
        if meta.method == "reptile":  # what helps other rows is learnt from steps on different ones
            batches += [pool.episode(classes, meta.shots, rng) for _ in range(meta.steps)]
        else:  # and here from the last, on others
            batches += [pool.episode(classes, meta.shots, rng)] * meta.steps
            batches.append(pool.episode(classes, meta.shots, rng))
    length = len(batches) // meta.rounds
    if meta.method == "reptile":
        rates = (meta.rate * (1 - done / meta.rounds) for done in range(meta.rounds))
        outer = Episodes(adapter, head, length, end=reptile(adapter, rates))
    else:
        outer = Episodes(adapter, head, length, query=fomaml(adapter, meta.rate))
    _run(model, pool, settings, batches, pool.task.collator(pool.tokenizer), outer, *callbacks)
    return model


def measure(model: Any, pool: Pool, settings: TrainSettings, meta: MetaSettings, steps: int) -> list[float]:
    """Return the accuracy on each held-out task after some steps on its few rows, from the model's adapter.

    The tasks, their rows and the rows that are asked about are the same whatever the model.
    """
    rng = random.Random(settings.seed + 1)
    adapter, head = _trained(model, settings.name)
    found: list[float] = []
    shown, asked = [], []
    for classes in pool.tasks(meta.ways):
        count = min(len(pool.rows[name]) for name in classes)
        rows = pool.episode(classes, min(count, meta.shots + 50), rng)
        learnt: list[dict[str, Any]] = []
        for label in range(meta.ways):
            learnt += [row for row in rows if row["labels"] == label][: meta.shots]
        known = {id(row) for row in learnt}
        asked.append([row for row in rows if id(row) not in known])
        shown.append(learnt)
    # the same few rows again and again: the frozen layers run once for each
    train, dev = (Dataset.from_list([row for batch in every for row in batch]) for every in (shown, asked))
    with trunk_cache(model, train, dev, pool.task.collator(pool.tokenizer), settings) as cached:
        questions = _divided(cached.dev, asked)
        batches = [rows for rows in _divided(cached.train, shown) for _ in range(steps)]

        def score(start: list[Tensor]) -> None:
            batch = cached.collate(questions[len(found)])
            model.eval()
            with torch.inference_mode():
                said = model(**{k: v.to(model.device) for k, v in batch.items() if k != "labels"}).logits.argmax(-1)
            model.train()
            found.append(float((said.cpu() == batch["labels"]).float().mean()))

        _run(model, pool, settings, batches, cached.collate, Episodes(adapter, head, steps, end=score))
    return found


def _divided(rows: Dataset, batches: Batches) -> Batches:
    """Return rows in batches of the sizes of others."""
    every = iter(rows.to_list())
    return [list(itertools.islice(every, len(batch))) for batch in batches]


@dataclasses.dataclass(frozen=True)
class Found:
    """The held-out tasks, and the accuracy on each, by start and number of steps."""

    tasks: list[tuple[str, ...]]
    accuracy: dict[str, dict[int, list[float]]]


def study(settings: TrainSettings, meta: MetaSettings, *callbacks: TrainerCallback) -> Found:
    """Learn an initialisation, measure it beside a random one and multi-task pretraining, and save it.

    Raises:
        TrainingError: the loss became NaN or infinite; nothing was saved.
    """
    pool = prepare_pool(settings, meta)
    learnt = learn(pool, settings, meta, *callbacks)
    starts = {"random": fresh(pool, settings), "multi-task": pretrain(pool, settings, meta), meta.method: learnt}
    counts = sorted({1, meta.steps, 4 * meta.steps})
    found = {
        name: {count: measure(model, pool, settings, meta, count) for count in counts} for name, model in starts.items()
    }
    learnt.peft_config[settings.name].base_model_name_or_path = settings.base
    run = {**settings.as_dict(), "meta": dataclasses.asdict(meta)}
    told = {f"accuracy, {count} steps": statistics.fmean(scores) for count, scores in found[meta.method].items()}
    adaptation = Adaptation(run=run, metrics=told, environment=environment(), command=command())
    learnt.save_adapter(settings.out, settings.name, adaptation, tokenizer=pool.tokenizer, overwrite=settings.overwrite)
    return Found(pool.tasks(meta.ways), found)
