"""Parts that the report of an adapter and that of a comparison have in common."""

from __future__ import annotations

import json
from typing import Any

from interleaf.report.blocks import Code, Section, Table
from interleaf.report.figures import Line


def facts(rows: dict[str, Any]) -> Table:
    """Return a table of names and values without those that are not known."""
    return Table(["", ""], [[k, str(v)] for k, v in rows.items() if v not in (None, "", [], {})])


def again(command: str | None, environment: dict[str, Any]) -> Section:
    """Say how the run is made again: the command and the versions."""
    versions = Table(["", "version"], [[k, str(v)] for k, v in environment.items()])
    blocks: list[Any] = [Code(command, "sh")] if command else []
    text = "The command, and the versions and hardware that the figures were made with."
    if not command and not environment:
        text = "The run was stored by a version that kept neither its command nor its versions."
    return Section("How to make it again", text, [*blocks, *([versions] if environment else [])])


def settings(parts: dict[str, Any]) -> list[Section]:
    """Return all settings, to be opened by hand."""
    return [
        Section(title, "", [Code(json.dumps(values, indent=2, ensure_ascii=False), "json")], folded=True)
        for title, values in parts.items()
        if values
    ]


def line(name: str, history: list[dict[str, Any]], key: str) -> Line:
    """Take one line of a learning curve out of a log."""
    points = [(float(e["epoch"]), float(e[key])) for e in history if isinstance(e.get(key), int | float)]
    return Line(name, [x for x, _ in points], [y for _, y in points])


def held_out(run: dict[str, Any]) -> str | None:
    """Say which rows were held out."""
    if not run:
        return None
    groups = (run.get("task_options") or {}).get("dev_groups")
    share = f"{run['dev_fraction']:.0%} of the training data"
    return run.get("dev") or (f"the groups {', '.join(groups)} of the training data" if groups else share)
