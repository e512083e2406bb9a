"""`interleaf explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from interleaf.cli.app import app, layers, print_json, quiet, table


@app.command(epilog="Example: interleaf explain out/movies bundled:tweets --limit 200 --out out/explained")
def explain(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub name, or a composition: stack(out/a, out/b).")],
    data: Annotated[str, typer.Argument(help="Labelled data: file, folder, hub name, bundled:NAME.")],
    other: Annotated[str | None, typer.Option(help="Another adapter of the same base, to compare with.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a page that needs no network, with figures.")] = None,
    limit: Annotated[int, typer.Option(help="Look at so many rows, evenly spread.")] = 200,
    attribute: Annotated[int, typer.Option(help="Trace the answers to so many rows to their tokens.")] = 4,
    skip_layers: Annotated[str | None, typer.Option(help="Layers to run without adapters.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the units that are removed at random.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at OUT.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what an adapter does: where it writes, what depends on it, what its units answer to."""
    from rich.console import Console

    from interleaf.evaluate import open_adapter, spread
    from interleaf.files import refuse_existing
    from interleaf.report import write
    from interleaf.report.blocks import Table
    from interleaf.studies.explain import Subject, compare_two, explain
    from interleaf.studies.explain_page import page

    quiet()
    if out is not None:
        refuse_existing(out, overwrite)
    opened = open_adapter(adapter, skip_layers=layers(skip_layers))
    subject = Subject(opened, spread(opened.task.load_one(data), limit))
    with Console(stderr=True).status("looking at the adapter"):
        found = explain(subject, attribute, seed)
        if other is not None:
            found["two"] = compare_two(adapter, other, subject)
    if json:
        print_json(found)
    told = page(adapter, data, found)
    if out is not None:
        write([told], out, overwrite)
    if json:
        return
    for section in told.sections:
        print(f"\n{section.title}. {section.text}")
        for block in section.blocks:
            if isinstance(block, Table):
                table(None, block.columns, block.rows)
    if out is not None:
        print(f"the page is {out}/report.html")
