"""Programs that mean harm, and programs that want to pass without an answer. See test_sandbox.py."""

from __future__ import annotations

# each is run after `def answer(): return 42`, with names for what it may aim at; the text says why it has to fail
HARMFUL = {
    # processes
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "os.fork"),
    "fork bomb in native code": ("while True: libc.fork()", "timed out"),
    "fork once, in native code": ("assert libc.fork() >= 0", "AssertionError"),
    "fork by system call": ("assert libc.syscall(57 if X86 else 220, 0, 0, 0, 0, 0) >= 0", "AssertionError"),
    "fork by a new system call": (
        "assert libc.syscall(435, ctypes.create_string_buffer(88), 88) >= 0",
        "AssertionError",
    ),
    "daemon": (
        "import os\nos.setsid()\nif os.fork() == 0 and os.fork() == 0:\n    while True: pass",
        "PermissionError",
    ),
    "zombies": ("import subprocess\nheld = [subprocess.Popen(['/bin/true']) for _ in range(99)]", "subprocess.Popen"),
    "shell": ("import os\nos.execv('/bin/sh', ['sh', '-c', f'rm -rf {HOME}'])", "os.exec"),
    "shell in native code": ("assert libc.execv(b'/bin/true', None) == 0", "AssertionError"),
    "os.system": ("import os\nassert os.system(f'rm -rf {HOME}') == 0", "os.system"),
    "multiprocessing": ("import multiprocessing\nmultiprocessing.Process(target=print).start()", "os.fork"),
    "thread bomb": (
        "import threading, time\nthreading.stack_size(32768)\nwhile True:\n"
        "    threading.Thread(target=time.sleep, args=(99,)).start()",
        "too many threads and files",
    ),
    # memory
    "memory: bytes": ("held = []\nwhile True: held.append(b'x' * 10_000_000)", "MemoryError"),
    "memory: list": ("held = [0]\nwhile True: held += held", "MemoryError"),
    "memory: one number": ("held = 1 << 8_000_000_000", "MemoryError"),
    "memory: mapped": ("import mmap\nheld = []\nwhile True: held.append(mmap.mmap(-1, 1 << 26))", "OSError"),
    "memory: hidden in a file without a name": ("import os\nos.memfd_create('x')", "PermissionError"),
    "memory: error caught": (
        "held = []\nwhile True:\n    try: held.append(b'x' * 10_000_000)\n    except MemoryError: pass",
        "timed out",
    ),
    "recursion": ("def deeper(): return deeper()\ndeeper()", "RecursionError"),
    "recursion without a limit": (
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        "SIGSEGV|MemoryError|RecursionError",
    ),
    "links to outside": ("assert libc.symlink(HOME.encode(), b'link') == 0", "AssertionError"),
    "hard links to outside": ("assert libc.link(FILES[2].encode(), b'link') == 0", "AssertionError"),
    "nested source": ("eval('(' * 100_000 + ')' * 100_000)", "MemoryError|SyntaxError|SIGSEGV"),
    "bad pointer": ("ctypes.string_at(0)", "SIGSEGV"),
    "limits taken back": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "resource.setrlimit"),
    "limits taken back in native code": (
        "assert libc.prlimit(0, 9, ctypes.byref((ctypes.c_uint64 * 2)(1 << 40, 1 << 40)), None) == 0",
        "AssertionError",
    ),
    "limits of the parent": (
        "import resource\nresource.prlimit(PARENT, resource.RLIMIT_CPU, (1, 1))",
        "resource.prlimit",
    ),
    # time
    "endless loop": ("while True: pass", "timed out"),
    "sleep": ("import time\ntime.sleep(999)", "timed out"),
    "deaf to signals": (
        "import signal, time\nfor each in set(signal.valid_signals()) - {9, 19}:\n"
        "    try: signal.signal(each, signal.SIG_IGN)\n    except OSError: pass\ntime.sleep(999)",
        "timed out",
    ),
    "stops itself": ("libc.kill(os.getpid(), 19)", "timed out"),
    "catches everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "timed out",
    ),
    "slow expression": ("import re\nre.match('(a+)+b', 'a' * 99)", "timed out"),
    # output
    "endless output": ("while True: print('x' * 1000)", "too much output"),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "too much output"),
    "endless output of system calls": ("import os\nwhile True: os.write(1, bytes(1 << 20))", "too much output"),
    "endless talk to the parent": (
        "while True:\n    for fd in range(3, 999):\n"
        "        try: os.write(fd, bytes(1 << 16))\n        except OSError: pass",
        "said something else",
    ),
    # files
    "deletes home": ("import shutil\nshutil.rmtree(HOME, ignore_errors=True)", "shutil.rmtree"),
    "deletes the checkout, error hidden": (
        "import shutil\ntry: shutil.rmtree(REPO)\nexcept Exception: pass",
        "shutil.rmtree outside its folder",
    ),
    "deletes temporary files": (
        "import os\nfor name in FILES:\n    try: os.remove(name)\n    except OSError: pass",
        "os.remove outside its folder",
    ),
    "deletes in native code": ("assert [libc.unlink(f.encode()) for f in FILES] == [0] * len(FILES)", "AssertionError"),
    "overwrites": ("for name in FILES:\n    try: open(name, 'w')\n    except OSError: pass", "writing outside"),
    "overwrites in native code": ("assert min(libc.open(name.encode(), 513) for name in FILES) >= 0", "AssertionError"),
    "truncates by reading": ("assert min(libc.open(name.encode(), 512) for name in FILES) >= 0", "AssertionError"),
    "truncates by neither": ("assert min(libc.open(name.encode(), 515) for name in FILES) >= 0", "AssertionError"),
    "truncates": ("assert min(libc.truncate(name.encode(), 0) for name in FILES) == 0", "AssertionError"),
    "renames": ("assert min(libc.rename(name.encode(), b'mine') for name in FILES) == 0", "AssertionError"),
    "hides by rights": ("assert min(libc.chmod(name.encode(), 0) for name in FILES) == 0", "AssertionError"),
    "overwrites the library": ("import os\nopen(os.__file__, 'a').write('#')", "writing outside its folder"),
    "plants a start-up file": (
        "import os\nopen(os.path.dirname(os.__file__) + '/sitecustomize.py', 'w')",
        "writing outside",
    ),
    "leaves its folder by a link": (
        "import os\nos.symlink(HOME, 'link')\nopen('link/new', 'w')",
        "os.symlink outside its folder",
    ),
    "leaves its folder by ..": ("import os\nos.chdir('..')\nos.mkdir('left')", "os.mkdir outside its folder"),
    "unlocks its folder": ("import os\nos.mkdir('locked', 0)", "PermissionError"),
    "changes its root": ("import os\nos.chroot('.')", "PermissionError"),
    "huge file": ("with open('big', 'wb') as out:\n    while True: out.write(bytes(1 << 20))", "OSError"),
    "huge sparse file": ("open('big', 'wb').truncate(1 << 40)", "OSError"),
    "many files": ("n = 0\nwhile True:\n    open(str(n), 'w').close()\n    n += 1", "too many threads and files"),
    "many folders": (
        "import os\nwhile True:\n    os.mkdir('x')\n    os.chdir('x')",
        "too many threads and files|outside",
    ),
    "reads a secret": ("print(open(HOME + '/canary').read())", "PermissionError"),
    "reads passwords": ("print(open('/etc/passwd').read())", "PermissionError"),
    "lists the checkout": ("import os\nprint(os.listdir(REPO))", "PermissionError"),
    "reads the parent's environment": ("print(open(f'/proc/{PARENT}/environ').read())", "PermissionError"),
    "reads its own command line": ("print(open('/proc/self/cmdline').read())", "PermissionError"),
    "opens the disk": ("import os\nos.open('/dev/vda', os.O_RDONLY)", "PermissionError|FileNotFoundError"),
    # the network
    "connects": ("import socket\nsocket.create_connection(('127.0.0.1', PORT))", "socket.getaddrinfo"),
    "connects outside": ("import urllib.request\nurllib.request.urlopen('http://192.0.2.1/')", "socket.getaddrinfo"),
    "opens a socket": ("import socket\nsocket.socket()", "PermissionError"),
    "connects in native code": ("assert libc.socket(2, 1, 0) >= 0", "AssertionError"),
    "asks for a name": ("import socket\nsocket.gethostbyname('example.org')", "socket.gethostbyname"),
    "asks for a name in native code": (
        "libc.gethostbyname.restype = ctypes.c_void_p\nassert libc.gethostbyname(b'example.org')",
        "AssertionError",
    ),
    "sends a datagram": (
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.sendto(b'x', ('127.0.0.1', UDP))",
        "PermissionError",
    ),
    "unix socket": ("import socket\nsocket.socket(socket.AF_UNIX).connect(UNIX)", "PermissionError"),
    "abstract unix socket": ("import socket\nsocket.socket(socket.AF_UNIX).connect(ABSTRACT)", "PermissionError"),
    "datagram from a pair": (
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\na.sendto(b'x', ABSTRACT)",
        "PermissionError",
    ),
    "reconnects a pair": ("import socket\nsocket.socketpair()[0].connect(UNIX)", "socket.connect"),
    "listens": ("import socket\nsocket.create_server(('127.0.0.1', 0))", "PermissionError|socket"),
    # other processes
    "kills all": ("import os\ntry: os.kill(-1, 9)\nexcept OSError: pass", "os.kill"),
    "kills all in native code": ("assert libc.kill(-1, 9) == 0", "AssertionError"),
    "kills its parent": ("import os\nos.kill(PARENT, 9)", "os.kill"),
    "kills its parent in native code": ("assert libc.kill(PARENT, 9) == 0", "AssertionError"),
    "kills its sibling by thread": ("assert libc.tgkill(SIBLING, SIBLING, 9) == 0", "AssertionError"),
    "kills its group": ("assert libc.killpg(os.getpgid(PARENT), 9) == 0", "AssertionError"),
    "kills by a queued signal": ("assert libc.sigqueue(SIBLING, 9, None) == 0", "AssertionError"),
    "kills by a descriptor": ("import signal\nsignal.pidfd_send_signal(os.pidfd_open(SIBLING), 9)", "PermissionError"),
    "kills by an owner's signal": ("a, b = os.pipe()\nassert libc.fcntl(a, 8, SIBLING) == 0", "AssertionError"),
    "traces its parent": ("assert libc.ptrace(16, PARENT, None, None) == 0", "AssertionError"),
    "writes its parent's memory": ("open(f'/proc/{PARENT}/mem', 'r+b')", "writing outside its folder"),
    "reads its parent's memory": (
        "b = ctypes.create_string_buffer(8)\nv = (ctypes.c_void_p * 2)(ctypes.addressof(b), 8)\n"
        "assert libc.process_vm_readv(PARENT, v, 1, v, 1, 0) == 8",
        "AssertionError",
    ),
    "slows its parent": ("os.setpriority(os.PRIO_PROCESS, PARENT, 19)", "PermissionError"),
    "outlives its parent": ("assert libc.prctl(1, 0, 0, 0, 0) == 0", "AssertionError"),
    # the kernel
    "new namespaces": ("assert libc.unshare(0x10000000) == 0", "AssertionError"),
    "mounts": ("assert libc.mount(b'none', b'.', b'tmpfs', 0, None) == 0", "AssertionError"),
    "asynchronous calls": ("assert libc.syscall(425, 8, ctypes.create_string_buffer(256)) >= 0", "AssertionError"),
    "shared memory": ("assert libc.shmget(0, 4096, 0o1600) >= 0", "AssertionError"),
    "message queue": ("assert libc.mq_open(b'/interleaf', 66, 0o600, None) >= 0", "AssertionError"),
    "another filter": ("assert libc.prctl(22, 2, None) == 0", "AssertionError"),
    "reboot": ("assert libc.reboot(0x4321FEDC) == 0", "AssertionError"),
}

ANSWER = "assert answer() == 42"
CLOSE = "import math\nassert math.isclose(answer(), 42)"
UNIT = """
import unittest
class Tests(unittest.TestCase):
    def test_answer(self):
        self.assertEqual(answer(), 42)
assert unittest.main(argv=[""], exit=False).result.wasSuccessful()
"""
CHECKED = """
def check(candidate):
    assert candidate() == 42
check(answer)
"""
SEARCH = """
import gc, os, sys
def answer(): return 0
def spray(found):
    for each in found:
        if isinstance(each, (bytes, str)):
            for fd in range(3, 64):
                try: os.write(fd, each if isinstance(each, bytes) else each.encode())
                except OSError: pass
    os._exit(0)
def frames():
    frame = sys._getframe(1)
    while frame:
        yield from frame.f_locals.values()
        yield from frame.f_globals.values()
        yield from frame.f_code.co_consts
        frame = frame.f_back
"""
JUMP = """
import sys
def jump(frame, event, argument):
    if event == "line":
        try: frame.f_lineno = 3
        except ValueError: pass
    return jump
def trace():
    frame = sys._getframe(2)
    while frame:
        frame.f_trace = jump
        frame = frame.f_back
    sys.settrace(jump)
"""
AHEAD = """
import sys
def answer(): return 0
def ahead(frame, event, argument):
    if event == "line" and (frame.f_code.co_name == "test" or frame.f_code.co_filename == "<test>"):
        for line in range(frame.f_lineno + 9, frame.f_lineno, -1):
            try: frame.f_lineno = line
            except ValueError: continue
            break
    return ahead
class Fake:
    def __getattr__(self, name): return lambda *a, **k: None
frame = sys._getframe(1)
"""
LONG = "x = answer()\nassert x == 42\nx = 0"

# none of these answers 42: each has to fail its test, which is run after it
CHEATS = {
    "leaves": ("import os\nos._exit(0)", ANSWER),
    "leaves when asked": ("import os\ndef answer(): os._exit(0)", ANSWER),
    "exits": ("import sys\nsys.exit(0)", ANSWER),
    "exits when asked": ("def answer(): raise SystemExit(0)", ANSWER),
    "interrupts": ("def answer(): raise KeyboardInterrupt", ANSWER),
    "own kind of exception": ("class Success(BaseException): code = 0\ndef answer(): raise Success", ANSWER),
    "leaves in native code": ("import ctypes\nctypes.CDLL(None).exit(0)", ANSWER),
    "leaves from a thread": (
        "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\nanswer = int",
        ANSWER,
    ),
    "leaves from a signal": (
        "import os, signal\nsignal.signal(14, lambda *_: os._exit(0))\nsignal.setitimer(0, 0.01)\nwhile 1: pass",
        ANSWER,
    ),
    "leaves at the end": ("import atexit, os\natexit.register(os._exit, 0)\nanswer = int", ANSWER),
    "says so at the end": ("import atexit\nprint('passed')\natexit.register(print, 'passed')\nanswer = int", ANSWER),
    "handles the error": ("import sys, os\nsys.excepthook = lambda *_: os._exit(0)\nanswer = int", ANSWER),
    "leaves in the report": (
        "import os, traceback\ntraceback.print_exception = lambda *_: os._exit(0)\nanswer = int",
        ANSWER,
    ),
    "other built-ins": (
        "import builtins\nfor name in list(vars(builtins)):\n"
        "    if name not in ('__import__', 'int', 'setattr'): setattr(builtins, name, lambda *a, **k: {})\n"
        "answer = int",
        ANSWER,
    ),
    "other exec": ("import builtins\nbuiltins.exec = builtins.vars = lambda *a: {}\nanswer = int", ANSWER),
    "other assertions": ("AssertionError = Warning\n__builtins__ = {'AssertionError': Warning}\nanswer = int", ANSWER),
    "other exit": ("import os, sys\nos.write = os._exit = sys.exit = sys.stdout.flush = print\nanswer = int", ANSWER),
    "other all": ("import builtins\nbuiltins.all = lambda _: True\nanswer = int", "assert all([answer() == 42])"),
    "other loops": (
        "import builtins\nbuiltins.range = lambda *_: []\nanswer = int",
        "for _ in range(3): assert answer() == 42",
    ),
    "other module": (
        "import sys, types\nm = sys.modules['math'] = types.ModuleType('math')\n"
        "m.isclose = lambda *_: True\nanswer = int",
        CLOSE,
    ),
    "other function": ("import math\nmath.isclose = lambda *_: True\nanswer = int", CLOSE),
    "other unittest": (
        "import sys, types\nm = sys.modules['unittest'] = types.ModuleType('unittest')\nm.TestCase = object\n"
        "m.main = lambda **_: m\nm.result = m\nm.wasSuccessful = lambda: True\nanswer = int",
        UNIT,
    ),
    "other assertEqual": ("import unittest\nunittest.TestCase.assertEqual = lambda *_: None\nanswer = int", UNIT),
    "other loader": (
        "import sys, types\nclass Finder:\n    def find_spec(*_): return None\nsys.meta_path[:] = [Finder]\n"
        "sys.path[:] = []\nsys.modules.clear()\nanswer = int",
        UNIT,
    ),
    "other check": ("def check(candidate): pass\nanswer = int", CHECKED),
    "harness found through frames": (
        "import sys\nframe = sys._getframe(1)\nwhile frame:\n"
        "    for name in list(frame.f_globals) + ['exec', 'compile']:\n"
        "        if not name.startswith('__'): frame.f_globals[name] = lambda *a, **k: None\n"
        "    frame = frame.f_back\ndef answer(): return 0",
        ANSWER,
    ),
    "proof sought in frames": (SEARCH + "spray(list(frames()))", ANSWER),
    "proof sought in frames when asked": (SEARCH + "def answer(): spray(list(frames()))", ANSWER),
    "proof sought in all objects": (SEARCH + "spray(gc.get_objects())", ANSWER),
    "proof sought behind frames": (SEARCH + "spray(gc.get_referents(*frames()))", ANSWER),
    "proof sought in descriptors": (
        SEARCH
        + "for fd in range(3, 64):\n    try:\n        os.set_blocking(fd, False)\n        spray([os.read(fd, 4096)])\n"
        "    except OSError: pass\nos._exit(0)",
        ANSWER,
    ),
    "proof sought in the system": (
        SEARCH + "spray([open('/proc/self/' + n).read() for n in ('environ', 'cmdline')])",
        ANSWER,
    ),
    "proof guessed": (SEARCH + "spray([b'passed', b'0', b'!', bytes(32), b'\\n'])", ANSWER),
    "test sought beforehand": (
        SEARCH + "if any('answer() ==' in str(each) for each in frames()): spray(['found'])\ndef answer(): return 0",
        ANSWER,
    ),
    "skips lines": (JUMP + "def answer(): return 0\ntrace()", LONG),
    "skips lines from before the test on": (AHEAD + "sys.settrace(ahead)", LONG),
    "skips lines without being stopped": (
        AHEAD + "while frame:\n    frame.f_globals['sys'] = Fake()\n    frame = frame.f_back\nsys.settrace(ahead)",
        LONG,
    ),
    "skips lines when asked": (JUMP + "def answer(): trace()", LONG),
    "skips lines by profiling": (JUMP + "def answer(): sys.setprofile(jump)", LONG),
    "hides a limit reached": ("import sys\nsys.setrecursionlimit(60)\ndef answer(): return answer()", ANSWER),
}
