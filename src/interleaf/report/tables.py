"""The tables of a comparison, for the terminal and for a report: quality, cost, forgetting."""

from __future__ import annotations

from typing import Any

from interleaf.report.blocks import Table, number, pair
from interleaf.report.words import COSTS, FORGETTING_COLUMNS, measure, told


def quality(arms: dict[str, Any]) -> Table:
    """Return each score of each way of training, with half of its 95% interval."""
    names = told(next(iter(arms.values()))["scores"])
    rows = [[measure(n).name, *[pair(arm["scores"][n]) for arm in arms.values()], measure(n).better] for n in names]
    return Table(["measure", *arms, "better when"], rows)


def cost(arms: dict[str, Any]) -> Table:
    """Return what each way of training takes."""
    rows = [[of.name, *[pair(arm["costs"][key], of.show) for arm in arms.values()]] for key, of in COSTS.items()]
    return Table(["", *arms], rows)


def forgetting(arms: dict[str, Any]) -> Table | None:
    """Return what each way of training forgot, if that was measured."""
    rows = [[name, *_forgot(arm["forgetting"])] for name, arm in arms.items() if arm.get("forgetting")]
    return Table(["", *FORGETTING_COLUMNS], rows) if rows else None


def _forgot(of: dict[str, Any]) -> list[str]:
    lost = {key: None if value is None else 100 * value for key, value in of["lost"].items()}
    off = "cannot be" if of["off"] is None else number(of["off"]["mean"])
    return [pair(of["before"]), pair(of["on"]), off, pair(lost, "{:.1f}%".format)]
