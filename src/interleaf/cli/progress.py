"""A progress bar for training: loss, metric, time left."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class RichProgress(TrainerCallback):
    """Shows step, loss, the last dev metric and the time left; prints a line an epoch."""

    def __init__(self, console: Console | None = None) -> None:
        self.loss, self.metric = "", ""
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]} {task.fields[metric]}"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.start()
        self.bar = self.progress.add_task("train", total=state.max_steps, loss="", metric="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.bar, completed=state.global_step, loss=self.loss, metric=self.metric)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.3f}"

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        name = args.metric_for_best_model or "loss"
        value = (metrics or {}).get(f"eval_{name.removeprefix('eval_')}")
        if value is not None:
            self.metric = f"dev {name} {value:.3f}"
            self.progress.console.print(f"epoch {state.epoch:.0f}  {self.loss}  {self.metric}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()
