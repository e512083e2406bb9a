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
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from interleaf import sandbox
from interleaf.errors import SandboxError
from interleaf.sandbox import run_program, run_programs
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
    children: set[int]

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
        assert children() - self.children == {self.sibling.pid}
        assert sorted(p.name for p in self.temp.iterdir()) == ["canary", "unix"]


def children() -> set[int]:
    tasks = Path("/proc/self/task").iterdir()
    return {int(child) for task in tasks for child in (task / "children").read_text().split()}


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
    # other tests of this process may have left one, such as multiprocessing's resource tracker
    libc, saved, before = ctypes.CDLL(None), tempfile.tempdir, children()
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
        yield World(names, listening, sibling, {name: Path(name).read_bytes() for name in watched}, temp, before)


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


ORDINARY = {
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def answer():\n    with ThreadPoolExecutor(8) as pool: return sum(pool.map(int, range(10))) - 3"
    ),
    "deep recursion in a thread": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 27)\nfound = []\n"
        "def deep(n): return 0 if n == 0 else 1 + deep(n - 1)\n"
        "thread = threading.Thread(target=lambda: found.append(deep(42_000)))\nthread.start()\nthread.join()\n"
        "def answer(): return found[0] // 1000"
    ),
    "asyncio": "import asyncio\nasync def late(): return 42\ndef answer(): return asyncio.run(late())",
    "doctest": (
        "def answer():\n    '''\n    >>> answer()\n    42\n    '''\n    return 42\n"
        "if __name__ == '__main__':\n    import doctest\n    doctest.testmod()"
    ),
    "files": (
        "import os, pathlib, shutil, tempfile\ndef answer():\n    with tempfile.TemporaryDirectory() as folder:\n"
        "        path = pathlib.Path(folder, 'a')\n        path.write_text('42')\n        path.rename(folder + '/b')\n"
        "        os.makedirs(folder + '/c/d')\n        shutil.copyfile(folder + '/b', folder + '/c/d/e')\n"
        "        found = int(open(folder + '/c/d/e').read())\n"
        "    with tempfile.NamedTemporaryFile() as file: file.write(b'1')\n"
        "    with open('~', 'w') as file: print(os.path.expanduser('~') == os.getcwd(), file=file)\n    return found"
    ),
    "standard library": (
        "import collections, csv, dataclasses, datetime, decimal, fractions, gc, hashlib, heapq, inspect, itertools\n"
        "import json, locale, logging, multiprocessing, pickle, platform, random, re, secrets, signal, sqlite3\n"
        "import ssl, statistics, socket, subprocess, typing, unittest, urllib.request, uuid, warnings, zoneinfo\n"
        "@dataclasses.dataclass\nclass A:\n    x: int = 42\n"
        "def answer():\n    gc.collect(); uuid.uuid4(); datetime.datetime.now().astimezone(); logging.warning('x')\n"
        "    sqlite3.connect(':memory:'); random.random(); secrets.token_hex(); signal.alarm(9)\n"
        "    return pickle.loads(pickle.dumps(A())).x"
    ),
    "no input": "def answer():\n    try: input()\n    except EOFError: return 42",
    "not ASCII": "print('é中')\nopen('é', 'w').write('中')\nzahl_ä = 42\ndef answer(): return zahl_ä",
    "a long program": "x = 0\n" * 100_000 + "def answer(): return 42",
    "errors of its own": "def answer():\n    try: open('/etc/passwd')\n    except OSError: return 42",
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_programs_pass(name: str) -> None:
    outcome = run_program(ORDINARY[name], ANSWER, timeout_s=20.0)
    assert (outcome.passed, outcome.reason) == (True, "passed"), outcome


def test_the_outcome_says_what_happened() -> None:
    outcome = run_program("print('before')\ndef answer(): return 1 / 0", "answer()", timeout_s=20.0)
    assert outcome.reason == "ZeroDivisionError"
    assert outcome.output.startswith("before\nTraceback")
    assert "harness" not in outcome.output
    assert 0 < outcome.seconds < 20
    assert run_program("print('x' * 9_999, 'end')", timeout_s=20.0).output.endswith("x end\n")
    assert run_program("x = '", timeout_s=20.0).reason == "SyntaxError"
    assert run_program("x = '\ud800'", timeout_s=20.0).reason == "SyntaxError"
    assert run_program("", "assert False", timeout_s=20.0).reason == "AssertionError"


def test_the_test_is_unknown_until_the_program_has_run() -> None:
    look = (
        "import sys\nframe = sys._getframe(0)\nseen = ''\n"
        "while frame:\n    seen += str(frame.f_locals)\n    frame = frame.f_back"
    )
    assert run_program(look, "assert 'unheard' + '-of' not in seen; 'unheard-of'", timeout_s=20.0).passed


def test_many_programs_keep_their_order() -> None:
    seen = []
    programs = [(f"def answer(): return {n}", "assert answer() % 3") for n in range(7)]
    outcomes = run_programs(programs, workers=3, timeout_s=20.0, progress=lambda *counts: seen.append(counts))
    assert [outcome.passed for outcome in outcomes] == [n % 3 > 0 for n in range(7)]
    assert seen == [(n, 7) for n in range(1, 8)]
    assert run_programs([]) == []
    with pytest.raises(SandboxError, match="timeout_s is 0"):
        run_programs(programs, timeout_s=0)


def test_programs_die_with_the_process_that_runs_them(world: World) -> None:
    code = "from interleaf.sandbox import run_program; run_program('import time; time.sleep(99)', timeout_s=99)"
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(world.temp)})
    own = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    program = ""
    # the first is the probe; a second one that is still there a moment later is the program
    while not (program and program == own.read_text()):
        program = own.read_text()
        time.sleep(0.5)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(int(program), os.WNOHANG) == (0, 0):
            assert time.monotonic() < deadline
    for left in world.temp.glob("interleaf-sandbox-*"):  # this much is left of a process that was killed
        left.rmdir()
    world.unharmed()


@pytest.mark.parametrize("limits", [{"timeout_s": -1}, {"timeout_s": float("inf")}, {"memory_bytes": 1 << 20}])
def test_impossible_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(SandboxError, match=r"_s is|_bytes is"):
        run_program("", **limits)  # type: ignore[arg-type]


@pytest.fixture
def afresh() -> Iterator[None]:
    """Let the sandbox be tried anew, before and after."""
    sandbox._features.cache_clear()
    yield
    sandbox._features.cache_clear()


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("sys.platform", "darwin", "no sandbox for darwin: it needs Linux"),
        ("interleaf.sandbox.kernel.landlock_version", lambda: -1, "no Landlock"),
        ("interleaf.sandbox._PROBE", "print('{\"no_network\": false}')", "does not hold here: no_network"),
        ("interleaf.sandbox._PROBE", "raise OSError('no threads')", "cannot run a program here .OSError"),
        ("interleaf.sandbox._START", "raise OSError('no seccomp')", "could not be set up: .*no seccomp"),
    ],
)
@pytest.mark.usefixtures("afresh")
def test_a_machine_that_cannot_hold_a_program_runs_none(
    monkeypatch: pytest.MonkeyPatch, attribute: str, value: object, said: str
) -> None:
    monkeypatch.setattr(attribute, value)
    with pytest.raises(SandboxError, match=f"(?s){said}"):
        run_program("")


def test_features_are_as_seen() -> None:
    found = sandbox.sandbox_features()
    assert found.pop("landlock") >= 1
    assert found == dict.fromkeys(
        ["no_network", "no_foreign_files", "no_processes", "no_signals", "files", "threads"], True
    )


def test_where_seccomp_is_listened_to_already_programs_make_no_threads_and_files() -> None:
    code = (
        "from interleaf.sandbox import kernel as k, run_program, sandbox_features\n"
        "k.libc.prctl(38, 1, 0, 0, 0)\nassert k._install(k._filter({}, k.ALLOW, k.ALLOW), flags=8) >= 0\n"
        "print(sandbox_features())\nprint(run_program('x = 1', 'assert x', timeout_s=20.0).reason)\n"
        'print(run_program(\'open("x", "w")\', timeout_s=20.0).reason)'
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'no_processes': True, 'no_signals': True, 'files': False, 'threads': False" in told
    assert told.splitlines()[1:] == ["passed", "OSError"]
