"""A report of runs: one page that needs no network, the same as Markdown, and its data as JSON."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interleaf.errors import ConfigError

if TYPE_CHECKING:
    from interleaf.report.blocks import RunReport


def read(paths: Sequence[str | Path]) -> list[RunReport]:
    """Read runs: adapter folders, and folders or files that `interleaf compare` wrote.

    Raises:
        StoreError: a run that is missing or damaged.
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a report needs matplotlib. Run: pip install 'interleaf[report]'")
    from interleaf.report.runs import read_runs

    return read_runs(paths)


def as_json(runs: Sequence[RunReport]) -> dict[str, Any]:
    """Return all that a report shows, and all that it was made from, as plain data."""
    from interleaf.report.render import as_json

    return as_json(runs)


def write(runs: Sequence[RunReport], out: str | Path, overwrite: bool = False) -> Path:
    """Write report.html, report.md with its figures, and report.json into a new folder.

    Raises:
        StoreError: the folder exists, or the disk refuses.
    """
    from interleaf.report.render import write

    return write(runs, out, overwrite)


__all__ = ["as_json", "read", "write"]
