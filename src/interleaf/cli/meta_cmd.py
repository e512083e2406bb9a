"""`interleaf meta`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from interleaf.cli.app import app, print_json, quiet, table
from interleaf.settings import read_settings


@app.command(epilog="Example: interleaf meta configs/meta.yaml --method reptile")
def meta(
    config: Annotated[Path, typer.Argument(help="YAML file of a classification; its `out` gets the initialisation.")],
    method: Annotated[str, typer.Option(help="reptile or fomaml.")] = "reptile",
    ways: Annotated[int, typer.Option(help="Classes of a task.")] = 2,
    shots: Annotated[int, typer.Option(help="Rows of each class to learn a task from.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps to learn a task in.")] = 5,
    rounds: Annotated[int, typer.Option(help="Tasks to learn the initialisation from.")] = 100,
    held_out: Annotated[int, typer.Option(help="Classes kept for tasks to measure on.")] = 7,
    words: Annotated[int | None, typer.Option(help="Cut texts into pieces of so many words, each a row.")] = None,
    outer_rate: Annotated[float | None, typer.Option(help="How far a task moves the initialisation.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of classes, tasks and rows.")] = None,
    overwrite: Annotated[bool | None, typer.Option(help="Replace what is at the config's `out`.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Learn where an adapter should start, over many small tasks; measure it on tasks of classes never seen."""
    settings = read_settings(config, {"seed": seed, "overwrite": overwrite})
    quiet()
    from interleaf.cli.progress import RichProgress
    from interleaf.files import refuse_existing
    from interleaf.studies import meta as study

    refuse_existing(Path(settings.out), settings.overwrite)
    how = study.MetaSettings(method, ways, shots, steps, rounds, held_out, words, outer_rate)
    shown = [] if json else [RichProgress(name=method)]
    found = study.study(settings, how, *shown)
    if json:
        print_json({"path": settings.out, "tasks": found.tasks, "accuracy": found.accuracy})
        return
    rows = [[name, *map(_shown, by_steps.values())] for name, by_steps in found.accuracy.items()]
    counted = [f"{count} steps" for count in next(iter(found.accuracy.values()))]
    table(f"Accuracy on {len(found.tasks)} tasks of classes never seen", ["start", *counted], rows)
    print(f"the initialisation is in {settings.out}; begin a run there with `start: {settings.out}`")


def _shown(scores: list[float]) -> str:
    """Return the mean over tasks and its 95% interval."""
    from interleaf.metrics import interval

    found = interval(scores)
    return f"{found['mean']:.3f}" + ("" if found["half_width"] is None else f" ± {found['half_width']:.3f}")
