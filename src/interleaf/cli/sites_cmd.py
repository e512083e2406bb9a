"""`interleaf sites`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from interleaf.cli.app import app, print_json, quiet, table


@app.command(epilog="Example: interleaf sites bundled:minilm --adapter houlsby")
def sites(
    model: Annotated[str, typer.Argument(help="Pretrained model: hub name, folder, bundled:NAME.")],
    adapter: Annotated[str | None, typer.Option(help="Only what this preset would adapt.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List where adapters can go in a model."""
    from interleaf import find_sites
    from interleaf.adapter import as_config
    from interleaf.base import empty_model

    quiet()
    base = empty_model(model)
    found = as_config(adapter).sites(base) if adapter else find_sites(base)
    if json:
        print_json([dataclasses.asdict(site) for site in found])
        return
    rows = [[s.stack, s.layer, s.position, s.read, s.write, s.width] for s in found]
    table(f"{len(found)} sites in {model}", ["stack", "layer", "position", "reads", "writes", "width"], rows)
