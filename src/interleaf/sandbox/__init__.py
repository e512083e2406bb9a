"""Runs programs that nobody has read, such as a model's answers: each in a process that can harm nothing.

The kernel enforces it (Landlock and seccomp, Linux 5.13 or newer; neither root nor a container is needed), so native
code is held as well as Python. A program has the standard library to read, one empty folder to write to, processor
time, memory and output up to a limit; no network, no other files, no other processes, no signals to them.

That a program passed is less certain than that it does no harm. It passes if its test ran to the end without an
error; leaving early proves nothing, and built-ins and modules that the test imports are set back before the test.
It can still deceive by what the test itself calls: objects that are equal to everything, changes to the test's frame
or modules while one of its functions runs, and native code that searches the memory of its own process for the proof.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import math
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from interleaf.errors import SandboxError
from interleaf.sandbox import harness, kernel

MIB = 1 << 20
TIMEOUT_S = 5.0
MEMORY_BYTES = 512 * MIB
FILE_BYTES = MIB
"""Largest file that a program may write."""
OUTPUT_BYTES = MIB
"""Output at which a program is ended."""
KEPT_BYTES = 4096
"""The end of the output that is kept."""
CREATIONS = 256
"""How many threads, files and folders, taken together, a program may make."""

# ioctl numbers of seccomp's listener, and the answer that lets a call happen
_RECEIVE, _ANSWER, _CONTINUE = 0xC0502100, 0xC0182101, 1
_ADVICE = "Run it in a Linux container or virtual machine with a newer kernel."
_START = (
    f"import sys; sys.path.insert(0, {str(Path(harness.__file__).parent)!r}); import kernel, harness; "
    "del sys.path[0], sys.modules['kernel'], sys.modules['harness']; harness.main(kernel.confine)"
)
_PROBE = """
import ctypes, errno, json, os, threading
libc = ctypes.CDLL(None, use_errno=True)
def refused(call, *arguments):
    result = getattr(libc, call)(*arguments)
    if call == "fork" and result == 0:
        os._exit(0)
    return result < 0 and ctypes.get_errno() in (errno.EPERM, errno.EACCES, errno.ENOSYS)
def possible(act, *arguments):
    try:
        act(*arguments)
    except (OSError, RuntimeError):
        return False
    return True
print(json.dumps({
    "no_network": refused("socket", 2, 1, 0) and refused("socket", 1, 1, 0),
    "no_foreign_files": refused("open", b"/etc/passwd", 0) and refused("mkdir", os.getcwdb() + b"-beside", 0o700),
    "no_processes": refused("fork") and refused("execv", b"/bin/true", None),
    "no_signals": refused("kill", os.getppid(), 0),
    "files": possible(os.mkdir, "folder"),
    "threads": possible(threading.Thread(target=int).start),
}))
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    passed: bool
    """It and its test ran to the end."""
    reason: str
    """`passed`, or why not: an exception's name, a limit, a signal, something forbidden that it tried."""
    seconds: float
    """Time from start to end."""
    output: str
    """The last 4 KiB that it printed."""


def sandbox_features() -> dict[str, bool | int]:
    """Return what the sandbox was seen to enforce on this machine; it is tried once.

    Returns: version of Landlock; no network, foreign files, processes or signals, which all are true; whether programs
    can start threads and make files, which they cannot inside a container that listens to seccomp itself.

    Raises:
        SandboxError: this machine cannot enforce what is needed, so that no program is run.
    """
    return dict(_features())


@functools.cache
def _features() -> dict[str, bool | int]:
    machine = os.uname().machine if sys.platform == "linux" else sys.platform
    if machine not in kernel.ARCHITECTURES:
        raise SandboxError(f"there is no sandbox for {machine}: it needs Linux on x86_64 or aarch64. {_ADVICE}")
    version = kernel.landlock_version()
    if version < 1:
        raise SandboxError(f"this kernel has no Landlock: the sandbox needs Linux 5.13 with it switched on. {_ADVICE}")
    probe = _run(_PROBE, "", 30.0, MEMORY_BYTES)
    if not probe.passed:
        raise SandboxError(f"the sandbox cannot run a program here ({probe.reason}): {probe.output.strip()}")
    found: dict[str, bool | int] = {"landlock": version, **json.loads(probe.output)}
    if missing := [name for name, value in found.items() if name.startswith("no_") and not value]:
        raise SandboxError(f"the sandbox does not hold here: {', '.join(missing)}. {_ADVICE}")
    return found


def run_program(
    source: str,
    test: str = "",
    *,
    timeout_s: float = TIMEOUT_S,
    memory_bytes: int = MEMORY_BYTES,
) -> Outcome:
    """Run a program, then a test of it, in a process of their own that can harm nothing.

    Args:
        source: the program, run as `__main__`.
        test: run after it among its names, and unknown to it until then. To fail, it raises; to pass, it ends, so end
            it with `unittest.main(exit=False)` rather than `unittest.main()`.
        timeout_s: time on the clock, the start of Python included.
        memory_bytes: address space, of which Python takes about 30 MB.

    Raises:
        SandboxError: this machine cannot enforce what is needed, or a limit is out of range.
    """
    if not 0 < timeout_s < math.inf:
        raise SandboxError(f"timeout_s is {timeout_s}; it is a number of seconds above 0.")
    if memory_bytes < 64 * MIB:
        raise SandboxError(f"memory_bytes is {memory_bytes}; Python itself needs {64 * MIB}.")
    _features()
    return _run(source, test, timeout_s, memory_bytes)


def run_programs(
    programs: Iterable[tuple[str, str]],
    *,
    workers: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    timeout_s: float = TIMEOUT_S,
    memory_bytes: int = MEMORY_BYTES,
) -> list[Outcome]:
    """Run many programs with their tests, several at a time, and return their outcomes in the same order.

    Args:
        programs: pairs of program and test.
        workers: how many at a time; by default one a processor. More make slow programs time out.
        progress: called with the number done and the number of all, after each.
        timeout_s, memory_bytes: see `run_program`.

    Raises:
        SandboxError: as `run_program`.
    """
    rows = list(programs)
    outcomes = []
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        run = functools.partial(run_program, timeout_s=timeout_s, memory_bytes=memory_bytes)
        try:
            for done, outcome in enumerate(pool.map(lambda row: run(*row), rows), 1):
                outcomes.append(outcome)
                if progress:
                    progress(done, len(rows))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return outcomes


def _run(source: str, test: str, timeout_s: float, memory_bytes: int) -> Outcome:
    started, proof = time.monotonic(), secrets.token_bytes(32)
    parts = proof, test.encode("utf-8", "surrogatepass"), source.encode("utf-8", "surrogatepass")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="interleaf-sandbox-"))
        words, of_child = (stack.enter_context(each) for each in socket.socketpair())
        request = stack.enter_context(os.fdopen(os.memfd_create("request"), "w+b"))
        request.write(b"".join(parts))
        request.seek(0)
        limits = math.ceil(timeout_s) + 1, memory_bytes, FILE_BYTES
        numbers = of_child.fileno(), request.fileno(), os.getpid(), *limits, len(parts[1]), len(parts[2])
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _START, *map(str, numbers), os.path.realpath(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
            cwd="/",
            pass_fds=numbers[:2],
            start_new_session=True,
        )
        of_child.close()
        request.close()
        stack.enter_context(child)
        stack.callback(child.kill)
        problem, watcher = _attend(child, words, proof, started + timeout_s)
        passed = not problem and child.returncode == 0 and watcher.said == watcher.proof
        output = watcher.kept.decode("utf-8", "replace")
        if not watcher.said and not problem:
            raise SandboxError(f"the sandbox could not be set up: {output.strip()}")
        reason = "passed" if passed else problem or _ending(child.returncode)
        return Outcome(passed, reason, time.monotonic() - started, output)


def _attend(
    child: subprocess.Popen[bytes], words: socket.socket, proof: bytes, deadline: float
) -> tuple[str, _Watcher]:
    """Attend to a child until it has ended, by itself or by us; return why by us, and what is known of it."""
    try:
        assert child.stdout
        watcher = _Watcher(child.pid, child.stdout.fileno(), words, proof)
        problem = watcher.until(deadline)
    finally:
        child.kill()
        child.wait()
    last = watcher.close()
    return problem or last, watcher


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else "ended before its test did"


def _legible(text: bytes) -> str:
    """Make a reason of what the harness said, or perhaps the program in its place."""
    line = text.decode("ascii", "replace").partition("\n")[0]
    return line if line.isprintable() and line else "said something else than its proof"


class _Watcher:
    """Attends to one child: takes its output and words, counts what it makes, sees when it oversteps or ends."""

    def __init__(self, child: int, output: int, words: socket.socket, proof: bytes) -> None:
        self.child, self.output, self.words, self.listener = os.pidfd_open(child), output, words, -1
        self.printed, self.made, self.kept, self.said, self.proof = 0, 0, b"", b"", b"!" + proof
        self.poll = select.poll()
        self.attend = {output: self.read_output, words.fileno(): self.read_words}
        for each in self.attend:
            os.set_blocking(each, False)
            self.poll.register(each, select.POLLIN)
        self.poll.register(self.child, select.POLLIN)

    def until(self, deadline: float) -> str:
        """Attend until the child has ended, and return an empty text, or until it has to be ended, and say why."""
        while (left := deadline - time.monotonic()) > 0:
            ready = dict(self.poll.poll(left * 1000 + 1))
            ended = ready.pop(self.child, None)
            for fd, event in ready.items():
                if not event & select.POLLIN:  # closed at the other end
                    self.poll.unregister(fd)
                elif problem := self.attend[fd]():
                    return problem
            if ended:
                return ""
        return "timed out"

    def read_output(self) -> str:
        """Keep the end of what was printed."""
        text = _read(self.poll, self.output, lambda: os.read(self.output, 1 << 16))
        self.printed += len(text)
        self.kept = (self.kept + text)[-KEPT_BYTES:]
        return "too much output" if self.printed > OUTPUT_BYTES else ""

    def read_words(self) -> str:
        """Take the listener, which comes first, then what the harness says: its proof, or why there will be none."""
        if self.said:
            text = _read(self.poll, self.words.fileno(), lambda: self.words.recv(256))
            self.said += text
            return "" if not text or self.proof.startswith(self.said) else _legible(text)
        with contextlib.suppress(BlockingIOError):
            self.said, descriptors, _, _ = socket.recv_fds(self.words, 1, 1)
            self.listener = descriptors[0] if descriptors else -1
        if self.listener >= 0:
            self.attend[self.listener] = self.count
            self.poll.register(self.listener, select.POLLIN)
        return ""

    def count(self) -> str:
        """Let the child make one more thread, file or folder."""
        self.made += 1
        if self.made > CREATIONS:
            return "too many threads and files"
        notice = bytearray(80)
        with contextlib.suppress(OSError):  # the child was ended meanwhile
            fcntl.ioctl(self.listener, _RECEIVE, notice)
            fcntl.ioctl(self.listener, _ANSWER, struct.pack("=8sqiI", bytes(notice[:8]), 0, 0, _CONTINUE))
        return ""

    def close(self) -> str:
        """Take what a child that has ended left behind, close all, and return its last words if they are no proof."""
        before = -1
        while before < self.printed <= OUTPUT_BYTES:
            before = self.printed
            self.read_output()
        words = self.read_words()
        for each in (self.child, self.listener):
            if each >= 0:
                os.close(each)
        return words


def _read(poll: select.poll, fd: int, read: Callable[[], bytes]) -> bytes:
    try:
        text = read()
    except BlockingIOError:
        return b""
    if not text:
        with contextlib.suppress(KeyError):
            poll.unregister(fd)
    return text
