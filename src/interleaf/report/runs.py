"""Read what a report is made from: an adapter folder, or what `interleaf compare` measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from interleaf.errors import InterleafError, StoreError
from interleaf.files import COMPARISON, documents, read_json
from interleaf.report.blocks import RunReport
from interleaf.report.compared import compared
from interleaf.report.trained import trained


def read_run(path: str | Path) -> RunReport:
    """Read one run: an adapter folder, a folder with compare.json, or that file itself.

    Raises:
        StoreError: it is none of these, or damaged.
    """
    place = Path(path)
    file = place / COMPARISON if place.is_dir() else place
    try:
        if file.is_file():
            return compared(str(path), read_json(file))
        if not (place / "interleaf.json").is_file():
            raise StoreError(f"{path} is no run: it holds neither interleaf.json nor {COMPARISON}.")
        config, record = documents(place)
        weights = place / "adapter_model.safetensors"
        return trained(str(path), config, record, weights.stat().st_size if weights.exists() else None)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, InterleafError):
            raise
        raise StoreError(f"{path} is damaged: {type(error).__name__} {error} while its figures were read.") from error


def read_runs(paths: Sequence[str | Path]) -> list[RunReport]:
    """Read runs in the order given."""
    return [read_run(path) for path in paths]
