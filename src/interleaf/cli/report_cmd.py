"""`interleaf report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from interleaf.cli.app import app, print_json


@app.command(epilog="Example: interleaf report out/movies out/compare --out out/report")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Adapter folders, and what `interleaf compare` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.md and report.json.")] = Path("report"),
    overwrite: Annotated[bool, typer.Option(help="Replace what is at OUT.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print report.json.")] = False,
) -> None:
    """Write one page on runs, readable on a phone and without a network: figures, examples, command, versions."""
    from interleaf import report as made
    from interleaf.files import refuse_existing

    refuse_existing(out, overwrite)
    found = made.read(runs)
    folder = made.write(found, out, overwrite)
    if json:
        print_json(made.as_json(found))
        return
    print(f"wrote {folder / 'report.html'}")
