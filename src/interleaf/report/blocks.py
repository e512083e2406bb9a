"""What a report is made of; HTML, Markdown and JSON are written from the same blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """Cells of text; the first column names the rows."""

    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Figure:
    """A drawing, its content in words, and one sentence on how to read it."""

    title: str
    svg: str
    alt: str
    reading: str


@dataclass(frozen=True)
class Code:
    """Text to copy, with the language it is in."""

    text: str
    language: str


@dataclass(frozen=True)
class Example:
    """One held-out row: named texts, and a verdict where there is one."""

    texts: dict[str, str]
    verdict: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a report under a heading; a folded one is opened by hand."""

    title: str
    text: str
    blocks: list[Table | Figure | Code | Example]
    folded: bool = False


@dataclass(frozen=True)
class RunReport:
    """What is told of one run."""

    title: str
    path: str
    overview: dict[str, str]
    """Its cells in the table of all runs."""
    record: dict[str, Any]
    """All that was read, as it was."""
    sections: list[Section] = field(default_factory=list)


def number(value: Any) -> str:
    """Return a figure for people: four digits that count, thousands apart, nothing where there is nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, int) or value == 0 or 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.4f}"


def pair(value: dict[str, Any], show: Callable[[float], str] = number) -> str:
    """Return a mean with the half-width of its interval, if it has one."""
    mean, half = value["mean"], value["half_width"]
    if mean is None:
        return number(None)
    alone = half is None or half <= 1e-9 * abs(mean)
    return str(show(mean)) if alone else f"{show(mean)} ± {show(half)}"


def duration(seconds: float) -> str:
    """Return a time for people."""
    if math.isnan(seconds):
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def short(text: str, length: int = 16) -> str:
    """Return a label that fits into a figure: one line of things that can be seen."""
    line = "".join(c if c.isprintable() else " " for c in str(text)).strip()
    return line if len(line) <= length else line[: length - 1] + "…"
