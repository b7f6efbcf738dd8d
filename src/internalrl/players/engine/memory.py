"""How much memory there is, and what it says when there is none left."""

from __future__ import annotations

from pathlib import Path

import torch

SHARE = 0.5
"""Of what is free when the engine starts, so much may be filled with keys and values."""
UNKNOWN = 4 * 2**30
"""Bytes that are taken to be free where the system does not tell."""


def free_bytes(device: torch.device) -> int:
    """What this process can still allocate, by the tightest of the limits that it lives under."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_of_machine(), _of_group(), _of_process()]
    return max(0, min((limit for limit in limits if limit is not None), default=UNKNOWN))


def is_shortage(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _of_machine() -> int | None:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_group() -> int | None:
    """Of the container, by either version of control groups."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, now = _read(limit).strip(), _read(used).strip()
        if most.isdigit() and now.isdigit():
            return int(most) - int(now)
    return None


def _of_process() -> int | None:
    """Of the address space, as `ulimit -v` bounds it."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = _read("/proc/self/statm").split()
    if most == resource.RLIM_INFINITY or not pages:
        return None
    return most - int(pages[0]) * resource.getpagesize()


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="ascii")
    except OSError:
        return ""
