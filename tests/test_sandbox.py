"""The sandbox: hostile programs harm nothing and count as failed; ordinary ones pass."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from interleaf.sandbox import run_program
from tests.hostile import ANSWER, CHEATS, HARMFUL

PRELUDE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def answer(): return 42
"""


@dataclass
class World:
    """All that a program may aim at, and how it was before."""

    names: dict[str, object]
    listening: list[socket.socket]
    sibling: subprocess.Popen[bytes]
    files: dict[str, bytes]
    temp: Path

    def unharmed(self) -> None:
        """Look at everything."""
        assert {name: Path(name).read_bytes() for name in self.files} == self.files
        assert [os.stat(name).st_mode & 0o777 for name in self.files if name.endswith("canary")] == [0o600] * 3
        assert self.sibling.poll() is None
        assert os.getpriority(os.PRIO_PROCESS, 0) == self.names["NICE"]
        for each in self.listening:
            with pytest.raises(BlockingIOError):
                each.recv(1) if each.type == socket.SOCK_DGRAM else each.accept()
        # orphans come to this process, so that its children are all there are
        assert children() == [self.sibling.pid]
        assert sorted(p.name for p in self.temp.iterdir()) == ["canary", "unix"]


def children() -> list[int]:
    tasks = Path("/proc/self/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def listen(family: int, kind: int, address: object) -> socket.socket:
    opened = socket.socket(family, kind)
    opened.bind(address)  # type: ignore[arg-type]
    if kind == socket.SOCK_STREAM:
        opened.listen()
    opened.setblocking(False)
    return opened


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Canaries in home, checkout and the temporary folder; a sibling process; sockets that wait for a connection."""
    libc, saved = ctypes.CDLL(None), tempfile.tempdir
    with contextlib.ExitStack() as stack:
        stack.callback(libc.prctl, 36, 0, 0, 0, 0)
        libc.prctl(36, 1, 0, 0, 0)
        temp = tmp_path_factory.mktemp("temp")
        stack.callback(setattr, tempfile, "tempdir", saved)
        tempfile.tempdir = str(temp)
        home, repo = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".canary-", dir=parent)))
            for parent in (Path.home(), Path(__file__).parent)
        )
        for folder in (home, repo, temp):
            (folder / "canary").write_text("alive")
            (folder / "canary").chmod(0o600)
        abstract = f"\0interleaf-{os.getpid()}"
        listening = [
            stack.enter_context(listen(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))),
            stack.enter_context(listen(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))),
            stack.enter_context(listen(socket.AF_UNIX, socket.SOCK_STREAM, str(temp / "unix"))),
            stack.enter_context(listen(socket.AF_UNIX, socket.SOCK_STREAM, abstract)),
            stack.enter_context(listen(socket.AF_UNIX, socket.SOCK_DGRAM, abstract + "d")),
        ]
        sibling = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(3600)"])
        stack.callback(sibling.wait)
        stack.callback(sibling.kill)
        names = {
            "HOME": str(home),
            "REPO": str(repo),
            "FILES": [str(folder / "canary") for folder in (home, repo, temp)],
            "PORT": listening[0].getsockname()[1],
            "UDP": listening[1].getsockname()[1],
            "UNIX": str(temp / "unix"),
            "ABSTRACT": abstract,
            "PARENT": os.getpid(),
            "SIBLING": sibling.pid,
            "X86": os.uname().machine == "x86_64",
            "NICE": os.getpriority(os.PRIO_PROCESS, 0),
        }
        watched = [*(str(folder / "canary") for folder in (home, repo, temp)), os.__file__, __file__]
        yield World(names, listening, sibling, {name: Path(name).read_bytes() for name in watched}, temp)


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_programs_harm_nothing_and_fail(world: World, name: str) -> None:
    program, expected = HARMFUL[name]
    values = "".join(f"{key} = {value!r}\n" for key, value in world.names.items())
    timeout_s, before = 0.7 if expected == "timed out" else 10.0, memory_bytes()
    outcome = run_program(PRELUDE + values + program, ANSWER, timeout_s=timeout_s, memory_bytes=128 << 20)
    assert memory_bytes() < before + (16 << 20)
    world.unharmed()
    assert not outcome.passed
    assert re.search(expected, outcome.reason), outcome
    assert outcome.seconds < timeout_s + 5
    assert len(outcome.output) <= 4096
    assert "alive" not in outcome.output


@pytest.mark.parametrize("name", CHEATS)
def test_programs_without_an_answer_do_not_pass(world: World, name: str) -> None:
    program, test = CHEATS[name]
    outcome = run_program(program, test, timeout_s=2.0)
    assert not outcome.passed
    world.unharmed()


@pytest.mark.parametrize("test", sorted({test for _, test in CHEATS.values()}))
def test_an_answer_passes_the_same_tests(test: str) -> None:
    assert run_program("def answer(): return 42", test).passed
