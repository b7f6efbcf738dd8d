"""Reading files that may be anything, writing them whole or not at all, and values as JSON."""

from __future__ import annotations

import errno
import math
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internalrl.errors import InternalRLError

PARTIAL = ".partial-"
"""How names of files still being written begin; one that a kill left behind means nothing."""


def read_file(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises OSError, at once, also for what would never end or never begin: a device, a pipe that nobody writes to.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        data = file.read(most + 1) if status.st_size <= most else b""
    if max(len(data), status.st_size) > most:
        raise OSError(errno.EFBIG, f"More than {most:,} bytes", str(path))
    return data


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file beside it: the old or the new content, never a part.

    A full disk raises InternalRLError, removes the temporary file and leaves the older file as it was.
    """
    write_together({Path(path): data})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """`write_atomic` for files that belong together: no older one is replaced before all are on the disk."""
    ready: dict[Path, str] = {}
    try:
        for path, data in contents.items():
            with write_errors(path):
                handle, ready[path] = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL)
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(ready[path], 0o644)  # mkstemp's 0600 would hide results from a group
        for path, temporary in ready.items():
            with write_errors(path):
                os.replace(temporary, path)
    except BaseException:
        for temporary in ready.values():
            Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError raised inside, such as a full disk, into one sentence that names `path`."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            why = "the disk is full; free some space"
        else:
            why = f"{error.strerror or error}; check the path and its permissions"
        raise InternalRLError(f"Cannot write {path}: {why}.") from error


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None and error.errno in (errno.ENOSPC, errno.EDQUOT)


def jsonable(value: Any) -> Any:
    """`value` in JSON's types: arrays and tensors become lists or numbers, tuples lists, paths strings.

    NaN and infinities become None, as JSON knows none of them.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
