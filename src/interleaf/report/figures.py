"""The figures of a report: drawn by matplotlib as SVG that stands inside the page and is legible on a phone."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from interleaf.report.blocks import Figure, number, short

WIDTH = 3.6  # inches: drawn across a phone, letters of 9 points come out at 11 to 12 pixels
INK, FAINT = "#1a1a1a", "#c8c8c8"
# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#7a7a7a"
DASHES = ("-", "--", "-.", ":")
STYLE: Any = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label such as $x$ is a label
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Line:
    """A line of a learning curve; lines of one name share a colour and an entry in the legend."""

    name: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Bar:
    """A bar with the half-width of its interval (NaN for none) and what is written at its end."""

    name: str
    value: float
    half_width: float
    text: str


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Canvas, Any]]:
    with rc_context(STYLE), warnings.catch_warnings():
        # the reader's own fonts have the letters that matplotlib's has not
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        yield canvas, canvas.subplots()


def _figure(canvas: Canvas, title: str, alt: str, reading: str) -> Figure:
    """Write the SVG as it stands in a page: no ids but those it refers to, none shared with another figure."""
    file = io.StringIO()
    with rc_context({"svg.hashsalt": f"{title}{alt}"}):
        canvas.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    width, height = canvas.get_size_inches() * 72
    box = f'viewBox="0 0 {width:g} {height:g}"'
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box} role="img" aria-label="{escape(alt)}"'
    svg = re.sub(r"<svg[^>]*>", lambda _: f'{head} xmlns="http://www.w3.org/2000/svg">', svg, count=1)
    return Figure(title, svg.strip(), alt, reading)


def curves(title: str, lines: Sequence[Line], reading: str, across: str = "passes over the training data") -> Figure:
    """Draw lines over the passes through the training data, or over what `across` says."""
    names = list(dict.fromkeys(line.name for line in lines))
    with _drawing(2.5) as (canvas, axes):
        for line in lines:
            i = names.index(line.name)
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
            marker = "o" if len(line.x) <= 30 else None
            shown = None if any(line.name == made.get_label() for made in axes.lines) else line.name
            axes.plot(line.x, line.y, label=shown or "_again", marker=marker, markersize=3.5, **style)
        axes.set_xlabel(across)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=max(x for line in lines for x in line.x) >= 2))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.margins(y=0.1)
        _legend(canvas, len(names), 1.8)
        return _figure(canvas, title, f"{title}. {_last(lines, names)}", reading)


def _legend(canvas: Canvas, count: int, handle: float) -> None:
    columns = 2 if count in (2, 4) else 3
    canvas.legend(loc="outside upper left", ncols=columns, handlelength=handle, columnspacing=1.0, borderpad=0.1)


def _last(lines: Sequence[Line], names: Sequence[str]) -> str:
    ends = {n: [(line.y[0], line.y[-1]) for line in lines if line.name == n and line.y] for n in names}
    told = [f"{n} from {number(v[0][0])} to {number(v[0][1])}" for n, v in ends.items() if v]
    return "; ".join(told) + "."


def bars(title: str, made: Sequence[Bar], reading: str, show: Callable[[float], str] = "{:g}".format) -> Figure:
    """Draw horizontal bars with intervals; over very unlike values on a logarithmic scale.

    Args:
        show: writes a value at the axis.
    """
    log = scale_is_log([bar.value for bar in made])
    with _drawing(0.55 + 0.34 * len(made)) as (canvas, axes):
        low, high = _reach(made, log)
        for i, bar in enumerate(made):
            interval = bar.half_width if bar.half_width == bar.half_width else None
            axes.barh(i, bar.value - (low if log else 0), left=low if log else 0, height=0.62, color=COLOURS[i % 6])
            if interval is not None:
                axes.errorbar(bar.value, i, xerr=interval, color=INK, capsize=3, linewidth=1.1)
            end = bar.value + (interval or 0)
            axes.annotate(bar.text, (max(end, 0), i), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_xscale("log" if log else "linear")
        axes.set_xlim(low, high)
        _rows(axes, [bar.name for bar in made], range(len(made)))
        locator = LogLocator(numticks=4) if log else MaxNLocator(4)
        ends = [bar.value + (0 if math.isnan(bar.half_width) else bar.half_width) for bar in made]
        _ticks(axes, locator.tick_values(low, max(0, *ends)), low, max(0, *ends), show)
        alt = f"{title}: " + ", ".join(f"{bar.name} {bar.text}" for bar in made) + "."
        note = " The scale is logarithmic: a bar twice as long is much more than twice as much." if log else ""
        return _figure(canvas, title, alt, reading + note)


def scale_is_log(values: Sequence[float]) -> bool:
    """Say whether values are so unlike that the small ones would vanish on a plain scale."""
    return min(values) > 0 and max(values) > 20 * min(values)


def _reach(made: Sequence[Bar], log: bool) -> tuple[float, float]:
    """Return the ends of the axis, with room for what is written at the bars' ends."""
    ends = [bar.value + (0 if math.isnan(bar.half_width) else bar.half_width) for bar in made]
    starts = [bar.value - (0 if math.isnan(bar.half_width) else bar.half_width) for bar in made]
    if log:
        low = 10 ** math.floor(math.log10(min(bar.value for bar in made)) - 0.2)
        return low, low * (max(ends) / low) ** 1.5
    low, high = min(0.0, *starts), max(0.0, *ends)
    return low, high + 0.55 * ((high - low) or 1.0)


def _ticks(axes: Any, values: Sequence[float], low: float, high: float, show: Callable[[float], str]) -> None:
    """Number the axis as far as there is anything to measure; the rest is room for words."""
    kept = [float(v) for v in values if low <= v <= 1.03 * high]
    told = [show(v).replace(".0 ", " ") for v in kept]
    axes.set_xticks(kept, [EngFormatter(sep="")(v) if len(t) > 7 else t for v, t in zip(kept, told, strict=True)])
    axes.set_xticks([], minor=True)


def _rows(axes: Any, names: Sequence[str], places: Sequence[float]) -> None:
    axes.set_yticks(places, [short(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.invert_yaxis()


def grouped(title: str, groups: dict[str, dict[str, float]], reading: str) -> Figure:
    """Draw a group of bars for each name: groups[name][kind] is a bar's length."""
    kinds = list(dict.fromkeys(kind for group in groups.values() for kind in group))
    colours = dict(zip(kinds, (GREY, *reversed(COLOURS)), strict=False))
    count = sum(len(group) for group in groups.values())
    with _drawing(0.8 + 0.22 * count + 0.12 * len(groups)) as (canvas, axes):
        at, ticks = 0.0, []
        for group in groups.values():
            ticks.append(at + (len(group) - 1) / 2)
            for kind, value in group.items():
                shown = kind if not any(c.get_label() == kind for c in axes.containers) else "_again"
                axes.barh(at, value, height=0.85, color=colours[kind], label=shown)
                axes.annotate(
                    number(value), (max(value, 0), at), (4, 0), textcoords="offset points", va="center", fontsize=8.5
                )
                at += 1
            at += 0.6
        values = [v for group in groups.values() for v in group.values()]
        low, high = min(0.0, *values), max(0.0, *values) or 1.0
        axes.set_xlim(low, 1.3 * high)
        _rows(axes, list(groups), ticks)
        _ticks(axes, MaxNLocator(4).tick_values(low, high), low, high, "{:g}".format)
        _legend(canvas, len(kinds), 1.2)
        told = "; ".join(f"{n}: " + ", ".join(f"{k} {number(v)}" for k, v in g.items()) for n, g in groups.items())
        return _figure(canvas, title, f"{title}. {told}.", reading)


def confusion(title: str, labels: Sequence[str], matrix: Sequence[Sequence[int]], reading: str) -> Figure:
    """Draw a confusion matrix; each row's shade is its share of the true label's rows."""
    shares = [[cell / (sum(row) or 1) for cell in row] for row in matrix]
    count = len(labels)
    names = [short(label, 12 if count > 4 else 16) for label in labels]
    with _drawing(min(3.6, 1.6 + 0.4 * count)) as (canvas, axes):
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="none", aspect="auto")
        axes.grid(False)
        step = max(1, -(-count // 24))
        axes.set_xticks(range(0, count, step), names[::step], rotation=0 if count <= 3 else 90)
        axes.set_yticks(range(0, count, step), names[::step])
        axes.set_xlabel("predicted label")
        axes.set_ylabel("true label")
        if count <= 8:
            for i, row in enumerate(matrix):
                for j, cell in enumerate(row):
                    ink = "white" if shares[i][j] > 0.55 else INK
                    axes.text(j, i, f"{cell:,}", ha="center", va="center", color=ink, fontsize=9)
        right = sum(matrix[i][i] for i in range(count))
        alt = f"{title}: {right:,} of {sum(map(sum, matrix)):,} rows lie on the diagonal, where both labels agree."
        return _figure(canvas, title, alt, reading)


def points(
    title: str, groups: dict[str, list[tuple[float, float]]], axes_named: tuple[str, str], reading: str
) -> Figure:
    """Draw points by group; the first group is grey, the horizontal axis logarithmic where the values are far apart."""
    shown = {name: found for name, found in groups.items() if found}
    across = [x for found in shown.values() for x, _ in found]
    with _drawing(2.6) as (canvas, axes):
        for place, (name, found) in enumerate(shown.items()):
            colour = GREY if place == 0 and len(shown) > 1 else COLOURS[place % len(COLOURS)]
            size = 20 if place < 2 else 70
            axes.scatter(*zip(*found, strict=True), s=size, color=colour, label=name, alpha=0.85)
        if scale_is_log(across):
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(axes_named[0])
        axes.set_ylabel(axes_named[1])
        _legend(canvas, len(shown), 2.6)
        told = "; ".join(f"{n}: " + ", ".join(f"{number(x)} gives {number(y)}" for x, y in f) for n, f in shown.items())
        return _figure(canvas, title, f"{title}. {told}.", reading)
