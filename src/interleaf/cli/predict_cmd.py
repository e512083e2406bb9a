"""`interleaf predict`."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from interleaf.cli.app import app, layers, quiet


@app.command(epilog="Example: echo 'A joy to watch.' | interleaf predict out/movies -")
def predict(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub name, or a composition: stack(out/a, out/b).")],
    texts: Annotated[str, typer.Argument(help="File of texts (a line each, or a table), or - for standard input.")],
    base: Annotated[str | None, typer.Option(help="Where the base is, if not where it was.")] = None,
    skip_layers: Annotated[
        str | None, typer.Option(help="Layers to run without adapters: first:2, last:2, 0,1.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column of the text, in a table.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 32,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """Predict with a stored adapter, or a composition of several: a line for each text."""
    from interleaf.evaluate import open_adapter
    from interleaf.tasks.rows import read_texts

    quiet()
    rows = read_texts(texts, column)
    for row in open_adapter(adapter, base, layers(skip_layers)).predict(rows, batch_size):
        if json:
            print(json_module.dumps(row, ensure_ascii=False))
        elif "answer" in row:
            print(row["answer"], flush=True)
        else:
            print(f"{row['label']}\t{row['score']:.3f}\t{row['text']}")
