"""`interleaf compare`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from interleaf.cli.app import app, print_json, quiet, table
from interleaf.files import size
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
    from interleaf.files import new_folder, refuse_existing

    quiet()
    if out is not None:
        refuse_existing(out, overwrite)
    found = run(settings, Console(stderr=True).print)
    if out is not None:
        with new_folder(out, overwrite) as folder:
            (folder / "compare.json").write_text(json_module.dumps(found, indent=2) + "\n", "utf-8")
    if json:
        print_json(found)
        return
    for title, columns, rows in tables(found):
        table(title, columns, rows)


def tables(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return the tables of a comparison: quality, cost, forgetting."""
    arms = found["arms"]
    names = list(next(iter(arms.values()))["scores"])
    quality = [[name, *[_interval(arm["scores"][name]) for arm in arms.values()]] for name in names]
    made = [("Quality on held-out data, mean and 95% interval", ["", *arms], quality)]
    costs = {
        "trained parameters": ("trained_parameters", "{:,.0f}".format),
        "bytes stored": ("stored_bytes", size),
        "seconds": ("seconds", "{:.0f}".format),
        "seconds to the best dev score": ("seconds_to_best", "{:.0f}".format),
        "peak memory": ("peak_memory_bytes", size),
        "GFLOP a step": ("flops_per_step", lambda v: f"{v / 1e9:.1f}"),
    }
    cost = [[what, *[show(arm["costs"][key]) for arm in arms.values()]] for what, (key, show) in costs.items()]
    made.append(("Cost", ["", *arms], cost))
    told = {name: arm["forgetting"] for name, arm in arms.items() if arm["forgetting"]}
    if told:
        measure = next(iter(told.values()))["measure"]
        lines = [[key, *[_interval(one[key]) for one in told.values()]] for key in ("before", "on", "lost")]
        off = [
            "off minus before",
            *["" if v["off_minus_before"] is None else str(v["off_minus_before"]) for v in told.values()],
        ]
        made.append((f"Forgetting: {measure}", ["", *told], [*lines, off]))
    return made


def _interval(value: dict[str, float]) -> str:
    half = value["half_width"]
    return f"{value['mean']:.4f}" if half != half else f"{value['mean']:.4f} ± {half:.4f}"
