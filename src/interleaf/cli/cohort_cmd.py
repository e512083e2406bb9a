"""`interleaf cohort`."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any

import typer

from interleaf.cli.app import app, options, print_json, quiet, table
from interleaf.errors import ConfigError
from interleaf.settings import TrainSettings, read_settings, typed


@app.command(epilog="Example: interleaf cohort configs/classification.yaml --vary learning_rate=[1e-3,3e-3]")
def cohort(
    configs: Annotated[list[Path], typer.Argument(help="YAML files of runs with one base, each with its own `out`.")],
    vary: Annotated[
        list[str] | None,
        typer.Option(help="Train every config with each of these values: key=[a,b] of a run or of its adapter."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use only so many training rows.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training data.")] = None,
    overwrite: Annotated[bool | None, typer.Option(help="Replace what is at the runs' `out`.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train several adapters at once over one frozen base: other tasks, seeds or settings."""
    flags = {"limit": limit, "epochs": epochs, "overwrite": overwrite}
    settings = [one for config in configs for one in varied(read_settings(config, flags), options(vary))]
    from interleaf.cohort import prepare_cohort, train_cohort

    quiet()
    runs = prepare_cohort(settings)
    if json:
        print_json([dataclasses.asdict(result) for result in train_cohort(runs)])
        return
    from interleaf.cli.progress import RichProgress, training_bars
    from interleaf.metrics import headline

    with training_bars() as bars:
        results = train_cohort(runs, lambda number: (RichProgress(bars, Path(settings[number].out).name),))
    measured = [headline(result.metrics) for result in results]
    columns = list(dict.fromkeys(key for metrics in measured for key in metrics))
    rows = [
        [str(result.path), *(f"{metrics[key]:.4f}" if key in metrics else "" for key in columns)]
        for result, metrics in zip(results, measured, strict=True)
    ]
    table("Held-out data", ["saved", *columns], rows)


def varied(settings: TrainSettings, values: dict[str, Any]) -> list[TrainSettings]:
    """Return settings once for each combination of values, each with a folder of its own within `out`.

    Raises:
        ConfigError: a value that is no list.
    """
    known = {field.name for field in dataclasses.fields(TrainSettings)} - {"adapter_options", "task_options", "compare"}
    for key, given in values.items():
        if not isinstance(given, list) or not given:
            raise ConfigError(f"vary {key}={given}: expected a list, such as {key}=[1,2].")
    if not values:
        return [settings]
    made = []
    for chosen in itertools.product(*values.values()):
        pairs = dict(zip(values, chosen, strict=True))
        own = {key: typed(key, value) for key, value in pairs.items() if key in known}
        adapter = {key: value for key, value in pairs.items() if key not in known}
        name = ",".join(f"{key}={value}" for key, value in pairs.items()).replace("/", "_")
        made.append(
            dataclasses.replace(
                settings,
                **{"out": str(Path(settings.out) / name), **own},
                adapter_options={**settings.adapter_options, **adapter},
            )
        )
    return made
