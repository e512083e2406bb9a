"""What the kernel enforces on a sandboxed process: resource limits, Landlock (files) and seccomp (system calls).

It runs inside the child, before the program does, and imports as little as it can, to start soon. None of it can be
taken back by the process, needs root, or depends on Python: native code called through ctypes is held just the same.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

ALLOW, NOTIFY, KILL = 0x7FFF0000, 0x7FC00000, 0x80000000
DENY, UNKNOWN = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
NEWEST = 435
"""Calls from this number on are reported as unknown unless listed; the C library then uses an older one."""
THREAD, NAMESPACES = 0x00010000, 0x7E020000
WHOLE = 0xFFFFFFFF
CREATE, TRUNCATE, UNNAMED = os.O_CREAT, os.O_TRUNC, 0x400000

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine: its column in the table below, and the kernel's number for it."""

# name, number on x86_64, number on aarch64 (- where there is none)
TABLE = """
read 0 63, write 1 64, close 3 57, fstat 5 80, newfstatat 262 79, stat 4 -, lstat 6 -, statx 332 291, poll 7 -,
ppoll 271 73, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, mremap 25 216, madvise 28 233,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
rt_sigsuspend 130 133, sigaltstack 131 132, pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -,
faccessat 269 48, faccessat2 439 439, pipe 22 -, pipe2 293 59, select 23 -, pselect6 270 72, sched_yield 24 124,
dup 32 23, dup2 33 -, dup3 292 24, nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113,
clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153, getpid 39 172, gettid 186 178, getppid 110 173,
getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getpgrp 111 -, getpgid 121 155, getsid 124 156,
getgroups 115 158, exit 60 93, exit_group 231 94, uname 63 160, getcwd 79 17, chdir 80 49, fchdir 81 50,
getdents 78 -, getdents64 217 61, readlink 89 -, readlinkat 267 78, fsync 74 82, fdatasync 75 83, ftruncate 77 46,
unlink 87 -, unlinkat 263 35, rmdir 84 -, rename 82 -, renameat 264 38, renameat2 316 276, getrusage 98 165,
sysinfo 99 179, futex 202 98, set_robust_list 273 99, rseq 334 293, getrandom 318 278, sched_getaffinity 204 123,
getcpu 309 168, membarrier 324 283, eventfd2 290 19, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -,
epoll_pwait 281 22, alarm 37 -, setitimer 38 103, getitimer 36 102, pause 34 -, restart_syscall 219 128,
statfs 137 43, fstatfs 138 44, fadvise64 221 223, getpriority 140 141, sched_get_priority_max 146 125,
sched_get_priority_min 147 126, getrlimit 97 163, recvfrom 45 207, shutdown 48 210, getsockopt 55 209,
getsockname 51 204, getpeername 52 205;
open 2 -, openat 257 56, mkdir 83 -, mkdirat 258 34, clone 56 220, kill 62 129, tgkill 234 131, fcntl 72 25,
ioctl 16 29, prctl 157 167, prlimit64 302 261, socketpair 53 199, sendto 44 206;
seccomp 317 277, capset 126 91
"""

Test = tuple[int, int, int]  # 32-bit word of the arguments (2n: argument n, low half), mask, value that it must have
Clause = tuple[list[Test], int]  # tests that must all hold, and what then
Rules = dict[str, list[Clause]]  # system call: clauses, of which the first that holds counts
Instruction = tuple[int, int, int, int]  # operation, jump if true, jump if false, operand
libc = ctypes.CDLL(None, use_errno=True)


def numbers(group: int | None = None) -> dict[str, int]:
    """Return this machine's system call numbers: all of the table, or the calls allowed in any form (group 0)."""
    column = ARCHITECTURES[os.uname().machine][0]
    text = TABLE if group is None else TABLE.split(";")[group]
    rows = (entry.split() for entry in text.replace(";", ",").split(","))
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-"}


def _opening(flags: int) -> list[Clause]:
    """Open anything that Landlock allows, except for what would escape it or the count of created files."""
    unnamed = ([(flags, UNNAMED, UNNAMED)], DENY)
    read_only = ([(flags, TRUNCATE | 3, TRUNCATE)], DENY)  # truncating a file opened to read: unseen by early versions
    neither = ([(flags, TRUNCATE | 3, TRUNCATE | 3)], DENY)
    return [unnamed, read_only, neither, ([], ALLOW)]


def _any(argument: int, values: Iterable[int]) -> list[Clause]:
    return [([(2 * argument, WHOLE, value)], ALLOW) for value in values]


def _null(argument: int) -> list[Test]:
    return [(2 * argument, WHOLE, 0), (2 * argument + 1, WHOLE, 0)]


def conditional() -> Rules:
    """Return the calls that are allowed in some forms only."""
    me = os.getpid()
    return {
        "open": _opening(2),
        "openat": _opening(4),
        # folders stay open to their owner, or nobody could clear them away
        "mkdir": [([(2, 0o700, 0o700)], ALLOW)],
        "mkdirat": [([(4, 0o700, 0o700)], ALLOW)],
        "clone": [([(0, THREAD | NAMESPACES, THREAD)], ALLOW)],
        "kill": _any(0, [me]),
        "tgkill": _any(0, [me]),
        # duplicate, flags, locks; not F_SETOWN and F_SETSIG, which send signals
        "fcntl": _any(1, [0, 1, 2, 3, 4, 5, 6, 7, 1030]),
        # terminal or not, size of window, bytes waiting, close on exec, blocking
        "ioctl": _any(1, [0x5401, 0x5413, 0x541B, 0x5450, 0x5451, 0x5421]),
        "prctl": _any(0, [15]),  # a thread's name
        "prlimit64": [([(0, WHOLE, pid), *_null(2)], ALLOW) for pid in (0, me)],  # read only, its own
        "socketpair": [([(0, WHOLE, 1), (2, 0xF, 1)], ALLOW)],  # connected to itself, as asyncio needs
        "sendto": [(_null(4), ALLOW)],  # without an address
    }


COUNTED: Rules = {
    "open": [([(2, CREATE, CREATE)], NOTIFY)],
    "openat": [([(4, CREATE, CREATE)], NOTIFY)],
    "mkdir": [([], NOTIFY)],
    "mkdirat": [([], NOTIFY)],
    "clone": [([], NOTIFY)],
}
"""Calls that wait for the parent, which counts them: what they make is not bounded by any resource limit."""


def _block(number: int, clauses: Iterable[Clause], otherwise: int) -> list[Instruction]:
    body: list[Instruction] = []
    for tests, action in clauses:
        for left, (word, mask, value) in zip(range(len(tests) - 1, -1, -1), tests, strict=True):
            body += [(0x20, 0, 0, 16 + 4 * word), (0x54, 0, 0, mask), (0x15, 0, 3 * left + 1, value)]
        body.append((0x06, 0, 0, action))
    body.append((0x06, 0, 0, otherwise))
    return [(0x15, 0, len(body), number), *body]


def _filter(rules: Rules, otherwise: int, unknown: int) -> bytes:
    """Assemble a seccomp filter in classic BPF."""
    known = numbers()
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, ARCHITECTURES[os.uname().machine][1]), (0x06, 0, 0, KILL), (0x20, 0, 0, 0)]
    for name, clauses in rules.items():
        if name in known:
            code += _block(known[name], clauses, otherwise)
    code += [(0x35, 0, 1, NEWEST), (0x06, 0, 0, unknown), (0x06, 0, 0, otherwise)]
    return b"".join(struct.pack("HBBI", *line) for line in code)


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _call(number: int, *arguments: object) -> int:
    as_long = (ctypes.c_long(each) if isinstance(each, int) else each for each in (number, *arguments))
    return int(libc.syscall(*as_long))


def _install(code: bytes, flags: int = 0) -> int:
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    program = Program(len(code) // 8, code)
    return _call(numbers()["seccomp"], 1, flags, ctypes.byref(program))


def landlock_version() -> int:
    """Return the version of Landlock that the kernel offers, or a negative number if it has none."""
    return _call(444, None, 0, 1)


def restrict_files(readable: Iterable[str], folder: str) -> None:
    """Allow to read what lies under some paths, to write under one folder, and nothing else, for good."""
    version = _checked(landlock_version(), "Landlock")
    files = (1 << (13 if version < 2 else 14 if version == 2 else 15 if version < 5 else 16)) - 1
    attributes = struct.pack("QQQ", files, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _checked(_call(444, attributes, len(attributes), 0), "Landlock")
    read, on_files = 1 << 2 | 1 << 3, 1 << 1 | 1 << 2 | 1 << 14
    write = read | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 13 | 1 << 14
    for path, rights in [*((path, read) for path in readable), (folder, write), ("/dev/null", write)]:
        if os.path.exists(path):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights &= files if os.path.isdir(path) else files & on_files
            _checked(_call(445, rules, 1, struct.pack("=Qi", rights, opened), 0), f"Landlock {path}")
            os.close(opened)
    _checked(_call(446, rules, 0), "Landlock")
    os.close(rules)


def restrict_calls(send: int) -> None:
    """Allow only the listed system calls, and hand the parent the descriptor on which it counts some of them."""
    import _socket

    listener = _install(_filter(COUNTED, ALLOW, ALLOW), flags=8)
    # without a listener, as inside a container that has one itself, the counted calls fail: no threads, no new files
    if listener < 0:
        _checked(_install(_filter(COUNTED, ALLOW, ALLOW)), "seccomp")
    sent = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("i", listener))] if listener >= 0 else []
    channel = _socket.socket(fileno=os.dup(send))
    channel.sendmsg([b"!"], sent)
    channel.close()
    if listener >= 0:
        os.close(listener)
    rules: Rules = {name: [([], ALLOW)] for name in numbers(0)}
    _checked(_install(_filter(rules | conditional(), DENY, UNKNOWN)), "seccomp")


def limit(cpu_s: int, memory_bytes: int, file_bytes: int) -> None:
    """Set hard limits on processor time, memory, size of a file, open files, and no core dump."""
    wanted = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def confine(send: int, parent: int, limits: tuple[int, int, int], folder: str) -> None:
    """Take from this process all that the program is not to have.

    Raises:
        OSError: the kernel refuses one of the parts.
    """
    _checked(libc.prctl(1, 9, 0, 0, 0), "prctl")  # dies with its parent
    if os.getppid() != parent:
        os._exit(1)
    limit(*limits)
    os.chdir(folder)
    nothing = struct.pack("IIIIII", 0, 0, 0, 0, 0, 0)
    _checked(_call(numbers()["capset"], struct.pack("Ii", 0x20080522, 0), nothing), "capset")  # root is as anybody
    _checked(libc.prctl(4, 0, 0, 0, 0), "prctl")  # no core dump, no tracer
    _checked(libc.prctl(38, 1, 0, 0, 0), "prctl")  # no new privileges
    library = os.path.join(sys.base_prefix, "lib")
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo"]
    restrict_files([*sys.path, library, *system, "/dev/urandom"], folder)
    restrict_calls(send)
