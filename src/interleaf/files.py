"""Files are written beside their place, synced, then renamed: a reader sees the old or the new, never half."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interleaf.errors import StoreError

COMPARISON = "compare.json"  # what `interleaf compare` writes and a report reads


def cache_folder() -> Path:
    """Return where models, data and stored states are kept: `INTERLEAF_CACHE`, or the usual place."""
    return Path(os.environ.get("INTERLEAF_CACHE") or Path.home() / ".cache" / "interleaf")


@contextlib.contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends well.

    Raises:
        StoreError: `path` is in the way, or the disk refuses; what was there stays.
    """
    target = Path(path)
    refuse_existing(target, overwrite)
    draft: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield draft
        draft.chmod(0o755)
        _sync(draft)
        _replace(draft, target)
    except Exception as error:
        if (reason := disk_trouble(error)) is not None:
            raise StoreError(f"{target} cannot be written: {reason}. Nothing was changed.") from error
        raise
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


def disk_trouble(error: Exception) -> str | None:
    """Return what the disk refused, or None: safetensors and torch wrap it in errors of their own."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    wrapped = ("os error", "i/o error", "pytorchstreamwriter", "inline_container")
    text = " ".join(str(error).split())
    return text if any(word in text.lower() for word in wrapped) else None


def refuse_existing(target: Path, overwrite: bool = False) -> None:
    """Raise unless a folder can be made at `target`.

    Raises:
        StoreError: there is something, and `overwrite` is not set.
    """
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise StoreError(f"{target} exists already. Choose another folder, or allow it to be overwritten.")


def documents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read an adapter folder's two JSON files; torch is not needed for that.

    Raises:
        StoreError: a file is missing or damaged.
    """
    return read_json(path / "adapter_config.json"), read_json(path / "interleaf.json")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of an adapter folder.

    Raises:
        StoreError: it is missing or damaged.
    """
    try:
        values: Any = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing: {path.parent} is no adapter folder.") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is corrupt: {error}.") from error
    if not isinstance(values, dict):
        raise StoreError(f"{path} is corrupt: it holds no JSON object.")
    return values


def size(count: float) -> str:
    """Return a byte count for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(draft: Path, target: Path) -> None:
    if not target.exists():
        os.rename(draft, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)) / "old"
    os.rename(target, old)
    try:
        os.rename(draft, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old.parent, ignore_errors=True)
