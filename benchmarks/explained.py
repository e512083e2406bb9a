"""Whether `interleaf explain` names what matters: its check, over several adapters; the table in docs/explain.md.

python benchmarks/explained.py           # three seeds, some minutes on two cores
python benchmarks/explained.py --page    # the table again, from the stored figures
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from interleaf.cli.app import quiet
from interleaf.evaluate import open_adapter, spread
from interleaf.metrics import interval
from interleaf.record import environment
from interleaf.settings import TrainSettings
from interleaf.studies.explain import Subject, explain
from interleaf.train import prepare

ROOT = Path(__file__).parent.parent
PAGE, STORED = ROOT / "docs" / "explain.md", ROOT / "benchmarks" / "results" / "explained.json"
SEEDS = (0, 1, 2)
HEADING = "## Does it name what matters?"


def measured(seed: int) -> dict[str, Any]:
    """Train an adapter on 1,000 reviews, and explain it on 300 held-out ones."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            base="bundled:minilm",
            train="bundled:movie-reviews",
            out=f"{folder}/adapter",
            adapter="houlsby",
            adapter_options={"reduction_factor": 8, "layers": "last:3"},
            limit=1000,
            max_length=64,
            learning_rate=2e-3,
            epochs=3,
            seed=seed,
            examples=0,
        )
        run = prepare(settings)
        run.train()
        subject = Subject(open_adapter(settings.out), spread(run.splits.dev, 300))
        found = explain(subject, attributed=0, seed=seed)
    return {key: found[key] for key in ("loss", "faithful", "layers", "writes")}


def section(stored: dict[str, Any]) -> str:
    """Return the part of the page that the figures are in."""
    runs, made = stored["seeds"], stored["environment"]
    lines = [
        HEADING,
        "",
        "`python benchmarks/explained.py`: three adapters in the upper three layers of MiniLM, each trained on 1,000 "
        "movie reviews with a seed of its own and explained on 300 held-out ones. What the loss grows by when units "
        "that are named first are taken out, beside as many at random (three draws each); mean and 95% interval.",
        "",
        "| units taken out | loss with all | cost of those named first | cost at random | seeds in which it is more |",
        "|---|---|---|---|---|",
    ]
    for number, check in enumerate(runs[0]["faithful"]):
        first = interval([run["faithful"][number]["important"] for run in runs])
        drawn = interval([sum(run["faithful"][number]["random"]) / len(check["random"]) for run in runs])
        loss = interval([run["loss"] for run in runs])
        more = sum(run["faithful"][number]["important"] > max(run["faithful"][number]["random"]) for run in runs)
        cells = [f"{check['share']:.0%} ({check['units']})", *(shown(one) for one in (loss, first, drawn))]
        cells.append(f"{more} of {len(runs)}")
        lines.append(f"| {' | '.join(cells)} |")
    layers = [
        f"layer {row['layer']}: {shown(interval([run['layers'][i]['cost'] for run in runs]))}"
        for i, row in enumerate(runs[0]["layers"])
    ]
    lines += ["", f"Without the adapter in one layer, the loss grows by: {', '.join(layers)}.", ""]
    versions = ", ".join(f"{name} {made[name]}" for name in ("torch", "transformers", "peft"))
    return "\n".join([*lines, f"{made['cores']} cores, {made['device']}; {versions}; seeds 0, 1, 2."]) + "\n"


def shown(one: dict[str, Any]) -> str:
    """Return a mean with the half-width of its interval."""
    return f"{one['mean']:.3f} ± {one['half_width']:.3f}"


def page(stored: dict[str, Any]) -> str:
    """Return the whole page, with its figures anew."""
    return PAGE.read_text("utf-8").partition(HEADING)[0].rstrip() + "\n\n" + section(stored)


def main() -> None:
    """Measure, store, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="run nothing, write the table from the stored figures")
    if not parser.parse_args().page:
        quiet()
        found = {"seeds": [measured(seed) for seed in SEEDS], "environment": environment()}
        STORED.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(json.loads(STORED.read_text("utf-8"))), "utf-8")


if __name__ == "__main__":
    main()
