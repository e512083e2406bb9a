"""Runs a program and its test inside a confined process, and proves to the parent that the test's end was reached.

It runs in the child and imports as little as it can, to start soon. The proof is a secret that no Python code can
reach before the end: it lies neither in a variable nor in a container, but among the arguments of a call whose last
argument is still being computed while the program runs.
"""

from __future__ import annotations

import builtins
import os
import sys
import types
from _functools import partial  # type: ignore[import-not-found]  # functools imports much
from _operator import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Namespace = dict[str, Any]

CHANGES = {
    "os.chmod",
    "os.chown",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "shutil.rmtree",
}
"""Audit events that change files by path."""
FORBIDDEN = {
    "gc.get_objects",
    "gc.get_referents",
    "gc.get_referrers",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.posix_spawn",
    "os.system",
    "pty.spawn",
    "resource.prlimit",
    "resource.setrlimit",
    "signal.pthread_kill",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyaddr",
    "socket.gethostbyname",
    "socket.sendmsg",
    "socket.sendto",
    "subprocess.Popen",
}
"""Audit events that no program under test has reason to cause."""
TRACING = {"sys.setprofile", "sys.settrace"}
"""Audit events that could make a test skip lines; before the test they are allowed, for doctest's sake."""


def watch(say: Callable[[str], None], folder: str) -> Callable[[], None]:
    """Fail a program that tries, from Python, what it must not, even if it hides the error; return what forbids more.

    The parent ends it as soon as it hears of it. This is for the verdict only: that nothing comes of such tries is the
    kernel's work.
    """
    changes, forbidden, tracing = frozenset(CHANGES), set(FORBIDDEN), frozenset(TRACING)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    inside, abspath, fsdecode = folder + os.sep, os.path.abspath, os.fsdecode

    def foreign(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        full = abspath(fsdecode(path))
        return full not in (folder, os.devnull) and not full.startswith(inside)

    def refuse(what: str) -> None:
        say(what)
        raise PermissionError(f"{what} is not allowed here")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in forbidden:
            refuse(event)
        if event == "open" and arguments[2] & writing and foreign(arguments[0]):
            refuse("writing outside its folder")
        if event in changes and any(foreign(path) for path in arguments[:2]):
            refuse(f"{event} outside its folder")

    def no_tracing() -> None:
        forbidden.update(tracing)

    sys.addaudithook(hook)
    return no_tracing


def take(request: int, size: int) -> bytes:
    """Read so many bytes of the request."""
    parts = []
    while size:
        parts.append(os.read(request, size))
        size -= len(parts[-1])
    return b"".join(parts)


def imported(source: bytes) -> list[types.ModuleType]:
    """Import now what a test will import, while it is still as it should be."""
    if b"import" not in source:
        return []
    import ast

    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return []
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    for name in names - {""}:
        try:
            __import__(name)
        except ImportError:  # the test itself will say so
            continue
    return [sys.modules[name] for name in names if name in sys.modules and name != "__main__"]


def set_back(modules: list[types.ModuleType]) -> Callable[[], None]:
    """Return what gives modules, and the classes in them, their present contents again."""
    contents = [(vars(module).update, dict(vars(module))) for module in (sys, *modules)]
    contents.append((sys.modules.update, {module.__name__: module for module in modules}))
    classes = {each for module in modules for each in vars(module).values() if isinstance(each, type)}
    # bit 9: made by Python code; bit 8: cannot be changed
    changeable = [each for each in classes if each.__flags__ & 1 << 9 and not each.__flags__ & 1 << 8]
    members = [(each, name, value) for each in changeable for name, value in vars(each).items()]
    members = [(each, name, value) for each, name, value in members if name not in ("__dict__", "__weakref__")]
    assign = setattr

    def again() -> None:
        for update, saved in contents:
            update(saved)
        for each, name, value in members:
            assign(each, name, value)

    return again


def prepare(source: bytes, no_tracing: Callable[[], None]) -> Callable[[Namespace, None, None], None]:
    """Return what runs a test after a program, with built-ins and modules as they were before the program."""
    again, pristine = set_back([builtins, *imported(source)]), dict(vars(builtins))
    # names of its own: the program may have replaced the built-in ones
    translate, run = compile, exec

    def test(namespace: Namespace, _: None, __: None) -> None:
        no_tracing()
        again()
        namespace["__builtins__"] = pristine
        run(translate(source, "<test>", "exec", dont_inherit=True), namespace)

    return test


def execute(source: bytes, request: int) -> Namespace:
    """Run the program as the module `__main__`, and return its names."""
    os.close(request)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    namespace = vars(module)
    exec(compile(source, "<program>", "exec", dont_inherit=True), namespace)
    return namespace


def fail(error: BaseException, say: Callable[[str], None]) -> None:
    """Print the error without the harness's own frames, name it to the parent, and end."""
    try:
        sys.stdout.flush()
        import traceback

        frames = error.__traceback__
        while frames and frames.tb_frame.f_globals is globals():
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames)
    finally:
        say(type(error).__name__)
        os._exit(1)


def main(confine: Callable[[int, int, tuple[int, int, int], str], None]) -> None:
    """Confine this process, then run what the request holds."""
    send, request, parent, cpu_s, memory_bytes, file_bytes, of_test, of_program = map(int, sys.argv[1:9])
    folder, leave, write, flush = sys.argv[9], os._exit, os.write, sys.stdout.flush
    sys.argv = [""]
    os.environ.update(HOME=folder, TMPDIR=folder)
    confine(send, parent, (cpu_s, memory_bytes, file_bytes), folder)

    def say(text: str) -> None:
        write(send, text.encode("ascii", "replace")[:80] + b"\n")

    def finish(proof: bytes, _: None) -> None:
        flush()
        write(send, proof)
        leave(0)

    # what is made from here on has built-ins of its own
    globals()["__builtins__"] = dict(vars(builtins))
    try:
        # Evaluated from left to right: the proof and the test wait on the stack of this call while the program runs.
        # After it, tracing is switched off from C: a line of Python in between could be skipped by a trace function.
        finish(
            take(request, 32),
            prepare(take(request, of_test), watch(say, folder))(
                *map(
                    call,
                    (
                        partial(execute, take(request, of_program), request),
                        partial(sys.setprofile, None),
                        partial(sys.settrace, None),
                    ),
                )
            ),
        )
    except BaseException as error:
        fail(error, say)
    leave(1)
