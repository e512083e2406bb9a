"""`interleaf compare`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from interleaf.cli.app import app, print_json, quiet, table
from interleaf.settings import read_settings


@app.command(epilog="Example: interleaf compare configs/classification.yaml --out out/compare")
def compare(
    config: Annotated[Path, typer.Argument(help="YAML file of a run; its `compare` section says what is compared.")],
    out: Annotated[Path | None, typer.Option(help="Folder for compare.json, which `interleaf report` reads.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only so many training rows.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training data.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at OUT.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print all that was measured as JSON.")] = False,
) -> None:
    """Compare an adapter with full fine-tuning, LoRA and the head alone: quality, cost, forgetting."""
    settings = read_settings(config, {"limit": limit, "epochs": epochs})
    from rich.console import Console

    from interleaf.compare import compare as run
    from interleaf.files import COMPARISON, new_folder, refuse_existing
    from interleaf.report import tables

    quiet()
    if out is not None:
        refuse_existing(out, overwrite)
    found = run(settings, Console(stderr=True).print)
    if out is not None:
        with new_folder(out, overwrite) as folder:
            (folder / COMPARISON).write_text(json_module.dumps(found, indent=2, allow_nan=False) + "\n", "utf-8")
    if json:
        print_json(found)
        return
    arms = found["arms"]
    shown = {
        "Quality on held-out data, mean and 95% interval": tables.quality(arms),
        "Cost": tables.cost(arms),
        "Forgetting": tables.forgetting(arms),
    }
    for title, made in shown.items():
        if made is not None:
            table(title, made.columns, made.rows)
