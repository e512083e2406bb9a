"""Write a report: HTML and Markdown from templates over the same blocks, and JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from interleaf import __version__
from interleaf.files import new_folder
from interleaf.report.blocks import Code, Example, Figure, RunReport, Table


def write(runs: Sequence[RunReport], out: str | Path, overwrite: bool = False) -> Path:
    """Write report.html, report.md with its figures, and report.json into a new folder."""
    with new_folder(out, overwrite) as folder:
        (folder / "report.html").write_text(as_html(runs), "utf-8")
        (folder / "report.json").write_text(
            json.dumps(as_json(runs), indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8"
        )
        (folder / "report.md").write_text(as_markdown(runs), "utf-8")
        (folder / "figures").mkdir()
        for name, figure in _figures(runs).items():
            (folder / "figures" / f"{name}.svg").write_text(figure.svg, "utf-8")
    return Path(out)


def as_html(runs: Sequence[RunReport]) -> str:
    """Return the page; whatever a run holds stands in it as text."""
    environment = _templates(autoescape=True)
    environment.filters["svg"] = lambda figure: Markup(figure.svg)  # drawn by us; its text is escaped
    return environment.get_template("report.html.j2").render(**_content(runs))


def as_markdown(runs: Sequence[RunReport]) -> str:
    """Return the report as Markdown; its figures are files beside it."""
    environment = _templates(autoescape=False)
    names = {id(figure): name for name, figure in _figures(runs).items()}
    environment.filters |= {"md": escaped, "fence": fenced, "file": lambda figure: names[id(figure)]}
    text = environment.get_template("report.md.j2").render(**_content(runs))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _templates(autoescape: bool) -> Environment:
    return Environment(
        loader=PackageLoader("interleaf.report", "."),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _content(runs: Sequence[RunReport]) -> dict[str, Any]:
    return {
        "runs": runs,
        "overview": overview(runs),
        "comparisons": any("arms" in run.record for run in runs),
        "version": __version__,
        "kind": lambda block: type(block).__name__,
        "groups": lambda section: [list(same) for _, same in groupby(section.blocks, type)],
    }


def overview(runs: Sequence[RunReport]) -> Table:
    """Return the table of all runs side by side, one column a run."""
    names = list(dict.fromkeys(name for run in runs for name in run.overview))
    rows = [[name, *[run.overview.get(name, "–") for run in runs]] for name in names]
    return Table(["", *[f"{i}. {run.title}" for i, run in enumerate(runs, 1)]], rows)


def _figures(runs: Sequence[RunReport]) -> dict[str, Figure]:
    found = [block for run in runs for s in run.sections for block in s.blocks if isinstance(block, Figure)]
    return {
        f"{i:02}-{re.sub(r'[^a-z0-9]+', '-', figure.title.lower()).strip('-')}": figure
        for i, figure in enumerate(found, 1)
    }


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", " ".join(str(text).split()))


def fenced(text: str, language: str = "") -> str:
    """Return text in a code block that nothing in the text can close."""
    ticks = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, ticks + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def as_json(runs: Sequence[RunReport]) -> dict[str, Any]:
    """Return what the report shows and what it was made from; what is no number is null."""
    made = [
        {
            "title": run.title,
            "path": run.path,
            "overview": run.overview,
            "sections": [
                {"title": s.title, "text": s.text, "blocks": [_block(block) for block in s.blocks]}
                for s in run.sections
            ],
            "record": run.record,
        }
        for run in runs
    ]
    return dict(_finite({"interleaf": __version__, "runs": made}))


def _block(block: Table | Figure | Code | Example) -> dict[str, Any]:
    values = {k: v for k, v in vars(block).items() if k != "svg"}
    return {"kind": type(block).__name__.lower(), **values}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
