"""Run the stock Trainer over whatever of a model trains: its arguments, its checkpoints, what stops it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from interleaf import store
from interleaf.adapter import as_config
from interleaf.adapters import FusionConfig
from interleaf.compose import Fuse, Stack
from interleaf.errors import ConfigError, StoreError, TrainingError
from interleaf.files import disk_trouble
from interleaf.model import AdaptedModel, adapt
from interleaf.settings import TrainSettings
from interleaf.tasks.base import Splits, Task
from interleaf.tasks.rows import model_inputs, padding, shortest_first, token_batches
from interleaf.trunk_cache import NoCache, cut_of, trunk_cache

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Fitted:
    """What the Trainer logged, whether the layers below were cached, and about how many seconds that saved."""

    history: list[dict[str, Any]]
    trunk_cache: str
    saved_s: float


def adapted_model(task: Task, settings: TrainSettings) -> Any:
    """Load a base and put the adapter in that is to be trained; head and adapter start from the run's seed.

    Raises:
        ConfigError: unknown or contradictory settings of the adapter.
        StoreError: a stored adapter to start from, or to train onto, that does not fit.
    """
    set_seed(settings.seed)
    model: Any = adapt(task.model(settings.base))
    name = settings.name
    if settings.start is not None:
        begin_from(model, settings.start, name)
        model.train_adapter(name)
    elif settings.onto or settings.adapter == "fusion":
        _train_onto(model, settings)
    else:
        model.add_adapter(name, as_config(settings.adapter, **settings.adapter_options))
        model.train_adapter(name)
    return model.to(PartialState().device)  # the Trainer's: what is done before it is done there too


def begin_from(model: Any, path: str, name: str) -> None:
    """Add an adapter with the weights of a stored one, and with a fresh head."""
    config: Any = store.read(path).config
    config.modules_to_save, config.inference_mode = None, False
    model.add_adapter(name, config)
    model.load_adapter(path, name, with_head=False)


def _train_onto(model: Any, settings: TrainSettings) -> None:
    names = [str(store.read(path).record.get("name", "default")) for path in settings.onto]
    if twice := [name for name in names if [*names, settings.name].count(name) > 1]:
        raise ConfigError(f"onto: two adapters are called {twice[0]!r}. Train them with a `name` of their own.")
    for path in settings.onto:
        model.load_adapter(path, with_head=False)
    if settings.adapter != "fusion":
        model.add_adapter(settings.name, as_config(settings.adapter, **settings.adapter_options))
        model.train_adapter(settings.name, within=Stack(*names, settings.name))
        return
    if len(names) < 2:
        raise ConfigError("adapter: fusion: name two stored adapters or more in `onto`, for it to fuse.")
    model.add_adapter(settings.name, FusionConfig(children=names, **settings.adapter_options))
    model.train_adapter(Fuse(*names, name=settings.name))


def fit(
    model: AdaptedModel | Any,
    task: Task,
    tokenizer: Any,
    splits: Splits,
    settings: TrainSettings,
    scratch: Path,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> Fitted:
    """Run the Trainer over whatever of `model` trains; its best epoch is loaded at the end."""
    train = model_inputs(task.encode(splits.train, tokenizer), model)
    dev = shortest_first(model_inputs(task.encode(splits.dev, tokenizer), model))
    collate = task.collator(tokenizer)
    with suppress(NoCache):  # the same batches with the cache and without it
        cut_of(model)
        collate.pad_to_multiple_of = padding(tokenizer)
    with trunk_cache(model, train, dev, collate, settings) as rows:
        trainer = Trainer(
            model=model,
            args=training_arguments(settings, scratch, task),
            train_dataset=_batched(rows.train, settings),
            eval_dataset=rows.dev,
            data_collator=_collating(rows.collate),
            compute_metrics=task.compute_metrics,
            callbacks=[StopOnNaN(), *_patience(settings), *callbacks],
        )
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        _train(trainer, scratch, settings.resume)
        saved_s = max(0.0, (trainer.state.epoch or 0) - 1) * rows.pass_s
        return Fitted(trainer.state.log_history, rows.cached, saved_s)


def _batched(rows: Dataset, settings: TrainSettings) -> Any:
    """Return rows, or batches of as many tokens as are asked for, which the Trainer takes for rows."""
    if settings.batch_tokens is None:
        return rows
    batches = token_batches(rows, settings.batch_tokens, settings.seed)
    return [[rows[number] for number in batch] for batch in batches]


def _collating(collate: Callable[[list[dict[str, Any]]], Any]) -> Callable[[list[Any]], Any]:
    return lambda given: collate(given[0] if isinstance(given[0], list) else given)


def _patience(settings: TrainSettings) -> list[TrainerCallback]:
    return [] if settings.patience is None else [EarlyStoppingCallback(settings.patience)]


def _train(trainer: Trainer, scratch: Path, resume: bool) -> None:
    try:
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(scratch) if resume else None)
    except TrainingError:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    except Exception as error:
        if (reason := disk_trouble(error)) is not None:
            kept = last_whole_checkpoint(scratch)
            if kept is None:
                shutil.rmtree(scratch, ignore_errors=True)
            then = "Nothing was saved." if kept is None else "Make room, then go on with --resume."
            raise StoreError(f"{scratch} cannot be written: {reason}. {then}") from error
        raise


def last_whole_checkpoint(scratch: Path) -> str | None:
    """Return the last checkpoint that was written to its end; a killed run can leave half of one."""
    found = sorted(scratch.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    # the Trainer writes its state last
    whole = [path for path in found if _is_json(path / "trainer_state.json")]
    return str(whole[-1]) if whole else None


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text("utf-8")), dict)
    except (OSError, ValueError):
        return False


def training_arguments(settings: TrainSettings, scratch: Path, task: Task) -> TrainingArguments:
    """Turn settings into the Trainer's arguments."""
    by_rows = settings.batch_tokens is None
    return TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size if by_rows else 1,
        per_device_eval_batch_size=2 * settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length" if by_rows else "random",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=task.best_metric,
        greater_is_better=task.best_metric != "loss",
        prediction_loss_only=task.compute_metrics is None,
        logging_steps=10,
        logging_nan_inf_filter=False,
        report_to=settings.report_to,
        disable_tqdm=True,
        seed=settings.seed,
        bf16=in_bfloat16(settings.precision),
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        activation_checkpointing=settings.activation_checkpointing,
        remove_unused_columns=False,  # rows hold what the model takes, and the number of their states
    )


def in_bfloat16(precision: str) -> bool:
    """Say whether to train in bfloat16: if asked for, or where the device is faster so.

    A CPU with AMX is; one that has bfloat16 among its vector instructions alone is slower than in float32, since
    every pass turns the frozen weights into bfloat16 anew.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


class StopOnNaN(TrainerCallback):
    """Stops a run whose loss is no number any more, before such weights are written."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for key in ("loss", "eval_loss"):
            value = (logs or {}).get(key)
            if value is not None and not math.isfinite(value):
                raise TrainingError(
                    f"the {key} became {value} at step {state.global_step}. Nothing was saved. "
                    "Try a lower learning_rate, and look for odd rows in the data."
                )
