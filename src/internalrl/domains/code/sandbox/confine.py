"""How the sandbox confines a process: system calls, resources, and what a worker gives up. Standard library only.

A worker calls `isolate` once. Each of its children calls `Confinement.enter`, after which there is no way back, and
only then looks at a program.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import resource
import signal
import struct

_ALLOWED_CALLS = {
    "x86_64": {
        "read": 0, "write": 1, "lseek": 8, "mmap": 9, "munmap": 11, "brk": 12, "rt_sigreturn": 15, "sched_yield": 24,
        "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39, "exit": 60, "gettimeofday": 96, "time": 201,
        "futex": 202, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
        "exit_group": 231, "getrandom": 318,
    },
    "aarch64": {
        "lseek": 62, "read": 63, "write": 64, "exit": 93, "exit_group": 94, "futex": 98, "nanosleep": 101,
        "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_yield": 124, "restart_syscall": 128,
        "rt_sigreturn": 139, "gettimeofday": 169, "getpid": 172, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222,
        "madvise": 233, "getrandom": 278,
    },
}  # fmt: skip
"""All that a child may ask of the kernel: memory, clocks, sleep, exit, and the descriptors it already has."""

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000  # what a filter may answer
_SECCOMP_MODE_FILTER = 2
_NOBODY = 65534
_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CAPABILITY_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4


def _prctl(option: int, first: int, second: int = 0) -> None:
    """prctl(2); OSError when it fails."""
    if _libc.prctl(option, first, second, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Confinement:
    """What a child takes on before it looks at a program. OSError where the processor is unknown."""

    def __init__(self, cpu_seconds: float, memory_mb: float) -> None:
        machine = os.uname().machine
        if machine not in _ALLOWED_CALLS:
            raise OSError(f"no list of system calls for the processor architecture {machine}")
        allowed = sorted(_ALLOWED_CALLS[machine].values())
        load, equal, give = 0x20, 0x15, 0x06  # instructions of classic BPF: load a word, jump if equal, return
        program = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT_ARCH[machine]), (give, 0, 0, _KILL), (load, 0, 0, 0)]
        program += [(equal, len(allowed) - k, 0, number) for k, number in enumerate(allowed)]
        program += [(give, 0, 0, _REFUSE), (give, 0, 0, _ALLOW)]
        self._code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
        header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(self._code))
        self._header = ctypes.create_string_buffer(header)
        self._filter = ctypes.addressof(self._header)
        with open("/proc/self/statm", encoding="ascii") as file:
            here = int(file.read().split()[0]) * resource.getpagesize()
        self._cpu_seconds = cpu_seconds
        self._limits = {
            resource.RLIMIT_AS: here + int(memory_mb * 2**20),
            resource.RLIMIT_CPU: math.ceil(cpu_seconds) + 1,  # should the timer below ever fail
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_NPROC: 0,
            resource.RLIMIT_NOFILE: 0,
        }

    def enter(self, pipe: int) -> None:
        """Keep descriptors 0 to 2, and `pipe` as 3, and nothing else; limit resources, then system calls."""
        os.dup2(pipe, 3)
        os.closerange(4, 4096)
        for limit, value in self._limits.items():
            resource.setrlimit(limit, (value, value))
        signal.setitimer(signal.ITIMER_PROF, self._cpu_seconds)  # its signal kills: no handler can be set any more
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._filter)

    def works(self) -> bool:
        """Whether a child under the filter is refused a file."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._filter)
                os.open("/dev/null", os.O_RDONLY)
            except PermissionError:
                status = 0
            finally:
                os._exit(status)
        return os.waitpid(child, 0)[1] == 0


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def isolate() -> list[str]:
    """Give up what this worker does not need; returns which of the measures worked here, in words."""
    done = []
    root = os.geteuid() == 0
    if _libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC | (0 if root else _CLONE_NEWUSER)) == 0:
        done.append("network namespace")
    if root:
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
            done.append("unprivileged user")
    if _libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()) == 0:
        done.append("no capabilities")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)  # no process of the same user may trace this one or open its memory
    return done
