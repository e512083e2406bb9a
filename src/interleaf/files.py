"""Files are written beside their place, synced, then renamed: a reader sees the old or the new, never half."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from interleaf.errors import StoreError


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
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {error.strerror or error}. Nothing was changed.") from error
    except Exception as error:
        # safetensors reports a full disk through an exception of its own
        if "os error" in str(error).lower() or "i/o error" in str(error).lower():
            raise StoreError(f"{target} cannot be written: {error}. Nothing was changed.") from error
        raise
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


def refuse_existing(target: Path, overwrite: bool = False) -> None:
    """Raise unless a folder can be made at `target`.

    Raises:
        StoreError: there is something, and `overwrite` is not set.
    """
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise StoreError(f"{target} exists already. Choose another folder, or allow it to be overwritten.")


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
