"""Packages of public registries, pinned and checksummed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from interleaf.errors import StoreError


@dataclass(frozen=True)
class PipPackage:
    """A Python package that pip downloads."""

    requirement: str
    sha256: str
    flags: tuple[str, ...] = ()

    def download(self, scratch: Path) -> Path:
        """Download it into an empty folder and return the archive.

        Raises:
            StoreError: pip could not.
        """
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = _run([*pip, *self.flags, "--dest", str(scratch), self.requirement])
        hint = "pip, setuptools and wheel are needed: pip install 'interleaf[demo]'"
        return _only_archive(scratch, self.requirement, done, "ERROR", hint)


@dataclass(frozen=True)
class NpmPackage:
    """A package of npm."""

    requirement: str
    sha256: str

    def download(self, scratch: Path) -> Path:
        """Download it into an empty folder and return the archive.

        Raises:
            StoreError: there is no npm here, or it could not.
        """
        if (npm := shutil.which("npm")) is None:
            raise StoreError(
                f"{self.requirement} comes from npm, which is not installed. Install Node.js with its npm."
            )
        done = _run([npm, "pack", self.requirement, "--silent", "--pack-destination", str(scratch)])
        return _only_archive(scratch, self.requirement, done, "npm", "is the network there?")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def _only_archive(
    scratch: Path, requirement: str, done: subprocess.CompletedProcess[str], mark: str, hint: str
) -> Path:
    archives = list(scratch.iterdir())
    if done.returncode == 0 and len(archives) == 1:
        return archives[0]
    lines = [line for line in done.stderr.splitlines() if line.startswith(mark)] or ["no reason was given"]
    raise StoreError(f"{requirement} could not be downloaded: {lines[-1]} ({hint})")
