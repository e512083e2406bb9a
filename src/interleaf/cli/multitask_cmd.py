"""`interleaf multitask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from interleaf.cli.app import app, print_json, quiet, table
from interleaf.settings import read_settings


@app.command(
    epilog="Example: interleaf multitask configs/topics.yaml configs/classification.yaml --out out/shared --limit 500"
)
def multitask(
    configs: Annotated[list[Path], typer.Argument(help="YAML files of runs with one base, one a task.")],
    out: Annotated[str, typer.Option(help="Folder of the shared adapter; each task's goes to its config's `out`.")],
    temperature: Annotated[float, typer.Option(help="1 draws tasks by their rows, a large one all alike.")] = 2.0,
    limit: Annotated[int | None, typer.Option(help="Use only so many training rows of each task.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over as many rows as all tasks have.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Passes without a better score after which a task stops.")
    ] = None,
    overwrite: Annotated[bool | None, typer.Option(help="Replace what is at the folders.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train several tasks at once: an adapter that they share, and above it one of each task's own."""
    flags = {"limit": limit, "epochs": epochs, "patience": patience, "overwrite": overwrite}
    settings = [read_settings(config, flags) for config in configs]
    quiet()
    from interleaf.cli.progress import RichProgress
    from interleaf.metrics import headline
    from interleaf.studies.multitask import prepare_multitask, train_multitask

    parts = prepare_multitask(settings, out)
    found = train_multitask(parts, out, temperature, [] if json else [RichProgress()])
    if json:
        print_json({part.name: {"path": part.settings.out, **found[part.name]} for part in parts})
        return
    measured = [(part, headline(found[part.name])) for part in parts]
    columns = list(dict.fromkeys(key for _, metrics in measured for key in metrics))[:3]
    rows = [[p.name, p.settings.out, *(f"{m[key]:.4f}" if key in m else "" for key in columns)] for p, m in measured]
    table("Held-out data", ["task", "saved", *columns], rows)
    print(f"the shared adapter is in {out}; a task's finds it there")
