"""Programs that try to get out of the sandbox, to exhaust it, or to forge and spoil verdicts."""

from __future__ import annotations

import textwrap

from internalrl.domains.code.sandbox.sandbox import PROGRAM_BYTES


def program(body: str) -> str:
    """A function `f(x)` with this body."""
    return "def f(x):\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n"


ESCAPES = {
    "read a file": "open(SECRET).read()",
    "read a file by descriptor": "import os; os.read(os.open(SECRET, os.O_RDONLY), 9)",
    "read its own memory": "open('/proc/self/mem', 'rb')",
    "read the environment of the worker": "open('/proc/self/environ').read(); import os; os.environ['PATH']",
    "write a file": "open(SCRATCH + '/new', 'w')",
    "list a folder": "import os; os.listdir('/')",
    "look at a file": "import os; os.stat(SECRET)",
    "delete a file": "import os; os.remove(VICTIM)",
    "rename a file": "import os; os.rename(VICTIM, VICTIM + '2')",
    "empty a file": "import os; os.truncate(VICTIM, 0)",
    "change a mode": "import os; os.chmod(SECRET, 0o666)",
    "make a folder": "import os; os.mkdir(SCRATCH + '/folder')",
    "make a link": "import os; os.symlink(SECRET, SCRATCH + '/link')",
    "change directory": "import os; os.chdir('/')",
    "make a file in memory": "import os; os.memfd_create('m')",
    "map shared memory": "import ctypes; assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0",
    "open a socket": "import _socket; _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)",
    "open a local socket": "import _socket; _socket.socketpair()",
    "open a netlink socket": "import _socket; _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW, 0)",
    "make a pipe": "import os; os.pipe()",
    "fork": "import os; os.fork() or os._exit(0)",
    "fork without Python": "import ctypes; c = ctypes.CDLL(None); pid = c.fork(); pid or c._exit(0); assert pid > 0",
    "run a command": "import os; assert os.system('true') == 0",
    "spawn a process": "import posix; posix.posix_spawn('/bin/true', ['true'], {})",
    "become another program": "import os; os.execv('/bin/true', ['true'])",
    "start a thread": "import _thread; _thread.start_new_thread(int, ())",
    "kill the parent": "import os; os.kill(os.getppid(), 0)",
    "kill everyone": "import os; os.kill(-1, 0)",
    "signal its group": "import os; os.killpg(0, 0)",
    "look into the parent": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",
    "raise a limit": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "read a limit": "import resource; resource.getrlimit(resource.RLIMIT_CPU)",
    "stop the clock": "import signal; signal.setitimer(signal.ITIMER_PROF, 0)",
    "catch the clock's signal": "import signal; signal.signal(signal.SIGPROF, signal.SIG_IGN)",
    "block the clock's signal": "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])",
    "change priority": "import os; os.nice(1)",
    "change user": "import os; os.setuid(os.getuid())",
    "leave the namespace": "import ctypes; assert ctypes.CDLL(None).unshare(0) == 0",
    "change the filter": "import ctypes; assert ctypes.CDLL(None).prctl(21, 0, 0, 0, 0) >= 0",
    "make memory executable": "import ctypes, mmap\nm = mmap.mmap(-1, 4096)\n"
    "a = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
    "assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(a), 4096, 7) == 0",
    "import from a file": "import sqlite3",
}
"""What each tries; the program around it says "escaped" where that works. Outside the sandbox all of them do."""

EXHAUSTION = {
    "endless loop": (program("while True: pass"), "timeout"),
    "endless loop that swallows everything": (
        program("while True:\n    try:\n        while True: pass\n    except BaseException: pass"),
        "timeout",
    ),
    "endless loop outside the function": ("while True: pass", "timeout"),
    "endless growth while iterating": (program("for v in x: x.append(v)"), None),
    "long computation in C": (program("return len(str(7 ** 10 ** 8))"), "timeout"),
    "catastrophic pattern": ("import re\n" + program("return re.match('(a+)+$', 'a' * 64 + 'b')"), "timeout"),
    "sleep": ("import time\n" + program("time.sleep(60)"), "timeout"),
    "wait for a lock forever": (
        "import _thread\n" + program("lock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()"),
        "timeout",
    ),
    "memory": (program("return [0] * 10 ** 9"), "error"),
    "memory bit by bit": (program("y = [x]\nwhile True: y = [y, y * 2]"), None),
    "memory, swallowed": (
        program("y = []\nwhile True:\n    try: y.append(bytearray(10 ** 7))\n    except MemoryError: pass"),
        "timeout",
    ),
    "recursion": (program("return f(x)"), "error"),
    "recursion without limit": ("import sys\nsys.setrecursionlimit(10 ** 9)\n" + program("return f(x)"), None),
    "recursion in C": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\n"
        + program("y = []\nfor _ in range(10 ** 5): y = [y]\nreturn repr(y)"),
        None,
    ),
    "deeply nested source": ("(" * 30_000, "syntax"),
    "deeply nested operators": ("y = " + "-" * 50_000 + "1", None),
    "long output": (program("return 'a' * 100_000"), "killed"),
    "endless printing": (program("while True: print('a' * 1000)"), "timeout"),
    "reading input": (program("return input()"), "error"),
    "fork bomb": ("import os\n" + program("while True:\n    try: os.fork()\n    except OSError: pass"), "timeout"),
    "all descriptors": ("import os\n" + program("while True: os.dup(1)"), "error"),
    "filling the disk": (program("open('fill', 'wb').write(b'0' * 10 ** 9)"), "error"),
    "too long a program": ("#" * (PROGRAM_BYTES + 1), "error"),
    "crash": ("import ctypes\n" + program("ctypes.string_at(0)"), "killed"),
    "abort": ("import os\n" + program("os.abort()"), "killed"),
}  # fmt: skip
"""A program -> the status it ends with; None: any but `ran`, which of them depends on interpreter and machine."""

FORGERIES = {
    "leave before the end": "import os\nos._exit(0)",
    "exit": "import sys\nsys.exit(0)",
    "interrupt": "raise KeyboardInterrupt",
    "exception that cannot be shown": "class E(BaseException):\n    def __str__(self): raise self\nraise E",
    "answer of its own": "import os\nos.write(3, b'[{\"outputs\": 5}]')\nos._exit(0)",
    "too many answers": 'import os\nos.write(3, b\'[{"outputs": [1]}, {"outputs": [1]}]\')\nos._exit(0)',
    "no answer of the program's": "import os\nos.write(3, b'[null]')\nos._exit(0)",
    "not JSON": "import os\nos.write(3, b'[{\"outputs\": [NaN]}]')\nos._exit(0)",
    "not text": "import os\nos.write(3, bytes(range(256)))\nos._exit(0)",
    "nested without end": "import os\nos.write(3, b'[' * 60000)\nos._exit(0)",
    "number without end": "import os\nos.write(3, b'[{\"outputs\": [' + b'9' * 60000 + b']}]')\nos._exit(0)",
    "flood": "import os\nwhile True: os.write(3, b'[' * 60000)",
    "equal to everything": "class E:\n    def __eq__(self, other): return True\ndef f(x): return E()",
    "number equal to everything": "class E(int):\n    def __eq__(self, other): return True\ndef f(x): return E()",
    "list equal to everything": "class E(list):\n    def __eq__(self, other): return True\ndef f(x): return E()",
    "endless exit": "import os\nos._exit = lambda status: None\ndef f(x): raise SystemExit",
}
"""Programs that answer in the harness's place, or make answers that claim to equal what they do not."""

SABOTAGE = {
    "built-in functions": "import builtins\nbuiltins.sorted = builtins.len = lambda x: 0\n",
    "the module behind the names": "__builtins__.sorted = lambda x: 0\n",
    "modules": "import json, os, sys\njson.dumps = json.loads = os.fork = None\nsys.modules.clear()\n",
    "the harness": "import sys\nsys._getframe(1).f_globals['answer'] = None\nsys._getframe(2).f_locals.clear()\n",
    "the interpreter": (
        "import sys, gc\nsys.setrecursionlimit(60)\ngc.disable()\nsys.settrace(lambda *a: 1 / 0)\n"
    ),
    "global names": "global sorted\nsorted = None\nimport builtins\ndel builtins.sorted\n",
    "other descriptors": """
import os
for n in range(4, 99):
    try: os.write(n, b'M[{"outputs": [[0]]}]')
    except OSError: pass
""",
    "every list there is": program("""
        import gc
        for o in gc.get_objects():
            if type(o) is list: o.clear()
    """),
}  # fmt: skip
"""What each spoils, for the programs that run beside it and after it if they shared anything with it."""

SEARCH = """
import gc, sys
found, frame = [], sys._getframe()
while frame:
    found += [repr(frame.f_locals), repr(frame.f_globals)]
    found += [repr(bytes(value)) for value in frame.f_locals.values() if type(value) is memoryview]
    frame = frame.f_back
found += [repr(o)[:10000] for o in gc.get_objects()]
here = id(object())
for page in range(here - 2 ** 16, here + 2 ** 12, 2 ** 12):
    found.append(repr(sys.modules['ctypes'].string_at(page, 2 ** 12)))
text = '|'.join(found)
words = 'tuptuo-detcepxe', 'rewsna-reilrae', 'margorp-rehto', 'rekram-nwo'
return [''.join(reversed(word)) in text for word in words]
"""
"""The body of a program that looks through its process for four words, spelt backwards so as not to find itself."""

HARMFUL = (
    "import os", "f = open", "x = ().__class__", "x.y = 1", "x.append = 1", "del x.y", "__builtins__", "class C: pass",
    "print(1)", "exec('1')", "eval('1')", "getattr(x, 'y')", "globals()", "vars()", "type(x)", "try: x\nexcept: x",
    "with x: x", "raise x", "assert x", "'{0.y}'.format(x)", "f'{x}'", "def f():\n    global y", "def f():\n    yield",
    "def f(x=open): x", "def f(x: open): x", "@open\ndef f(): x", "lambda x=eval: x", "async def f(): x",
    "def __f(): x", "[open for open in x]", "x.gi_frame", "x.mro()", "match x:\n    case 1: x", "sum.__self__",
    "input()", "type T = int", "f = __import__", "breakpoint()", "object()", "super()", "memoryview(x)", "iter(x, 1)",
)  # fmt: skip
"""Beginnings of ways to reach what other programs in the same process can see."""
