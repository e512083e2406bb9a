"""`interleaf demo`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from interleaf.cli.app import app, print_json, quiet, table
from interleaf.files import size


@app.command(epilog="Example: interleaf demo --seed 1")
def demo(
    out: Annotated[str, typer.Option(help="Folder for the adapter.")] = "out/demo",
    rows: Annotated[int, typer.Option(help="Training rows.")] = 3000,
    epochs: Annotated[float, typer.Option(help="Passes over the training data.")] = 3,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds to run; give several times for several.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a real encoder on real movie reviews: a head alone, then with an adapter."""
    from interleaf import demo as study
    from interleaf.cli.progress import RichProgress

    quiet()
    found = []
    for number in seed or [0]:
        say = None if json else (lambda text: print(text, flush=True))
        callbacks = (lambda: ()) if json else (lambda: (RichProgress(),))
        found.append(study.run(number, rows, epochs, out, callbacks, say))
    if json:
        print_json([dataclasses.asdict(one) for one in found])
        return
    for one in found:
        table(f"Held-out movie reviews, seed {one.seed}", COLUMNS, [_row(arm) for arm in one.arms])
        for arm in one.arms:
            print(f"{arm.name}: {arm.trunk_cache}; about {arm.saved_s:.0f} s saved")
    table("Sentences that are not in the data", ["label", "score", "text"], [_prediction(p) for p in found[-1].said])
    print(f"The adapter is in {out}. Try: echo 'Pure joy.' | interleaf predict {out} -")


COLUMNS = ["", "accuracy", "F1 (macro)", "trainable parameters", "bytes on disk", "seconds"]


def _row(arm: Any) -> list[Any]:
    return [
        arm.name,
        f"{arm.accuracy:.4f}",
        f"{arm.f1_macro:.4f}",
        f"{arm.trainable_parameters:,}",
        f"{arm.size_bytes:,} ({size(arm.size_bytes)})",
        f"{arm.seconds:.0f}",
    ]


def _prediction(row: dict[str, Any]) -> list[Any]:
    return [row["label"], f"{row['score']:.3f}", row["text"]]
