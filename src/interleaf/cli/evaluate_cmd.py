"""`interleaf evaluate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from interleaf.cli.app import app, layers, options, print_json, quiet, table


@app.command(epilog="Example: interleaf evaluate out/movies bundled:tweets --json")
def evaluate(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub name, or a composition: stack(out/a, out/b).")],
    data: Annotated[str, typer.Argument(help="Labelled data: file, folder, hub name, bundled:NAME.")],
    base: Annotated[str | None, typer.Option(help="Where the base is, if not where it was.")] = None,
    skip_layers: Annotated[
        str | None, typer.Option(help="Layers to run without adapters: first:2, last:2, 0,1.")
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Switch the adapter off: measure the base alone.")] = False,
    limit: Annotated[int | None, typer.Option(help="Measure on so many rows only, evenly spread.")] = None,
    task_set: Annotated[
        list[str] | None, typer.Option(help="Task setting as key=value, for example num_beams=4 or samples=10.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 64,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a stored adapter, or a composition of several, on labelled data."""
    from interleaf.evaluate import open_adapter

    quiet()
    opened = open_adapter(adapter, base, layers(skip_layers), options(task_set))
    metrics = opened.evaluate(data, batch_size, limit=limit, off=off)
    if json:
        print_json(metrics)
        return
    from interleaf.metrics import headline

    table(
        f"{'the base of ' if off else ''}{adapter} on {data}",
        ["metric", "value"],
        [[k, f"{v:.4f}"] for k, v in headline(metrics).items()],
    )
    if "per_class" in metrics:
        show_classes(metrics)


def show_classes(metrics: dict[str, Any]) -> None:
    """Print what a classifier does with each class."""
    columns = ["label", "precision", "recall", "f1", "support"]
    rows = [[name, *[_cell(v) for v in row.values()]] for name, row in metrics["per_class"].items()]
    table("Per class", columns, rows)
    labels = list(metrics["per_class"])
    confusion = [[label, *row] for label, row in zip(labels, metrics["confusion_matrix"], strict=True)]
    table("Confusion matrix (row: true, column: predicted)", ["", *labels], confusion)


def _cell(value: float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
