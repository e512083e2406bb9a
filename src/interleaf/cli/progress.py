"""A progress bar for training: loss, metric, time left."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


def training_bars(console: Console | None = None) -> Progress:
    """Make the bars that runs show their training in, a line each."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]} {task.fields[metric]}"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )


class RichProgress(TrainerCallback):
    """Shows step, loss, the last dev metric and the time left of a run; prints a line an epoch.

    Args:
        bars: from `training_bars`, shown already if other runs have theirs in it too; its own if None.
        name: what to call the run.
    """

    def __init__(self, bars: Progress | None = None, name: str = "training") -> None:
        self.loss, self.metric, self.name = "", "", name
        self.shown = bars is not None
        self.progress = bars or training_bars()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.shown:
            self.progress.start()
        self.bar = self.progress.add_task(self.name, total=state.max_steps, loss="", metric="")

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
            which = f"{self.name}  " if self.shown else ""
            self.progress.console.print(f"{which}epoch {state.epoch:.0f}  {self.loss}  {self.metric}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.shown:
            self.progress.stop()
