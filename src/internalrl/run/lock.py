"""One process writes to a run folder at a time: a lock that the system releases however the process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from pathlib import Path
from weakref import WeakValueDictionary, finalize

from internalrl.errors import InternalRLError
from internalrl.run.files import write_errors

LOCK_FILE = ".lock"
"""In the run's folder; it stays there, and says who holds it or held it last."""


class Lock:
    """Held until nobody refers to it any more."""

    def __init__(self, file: Path):
        with write_errors(file):
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._release = finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            self._release()
            raise InternalRLError(
                f"Run folder {file.parent} is being written by {holder}; wait until that has ended, stop it, or choose "
                "another --run."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            return  # some file systems have no locks
        with write_errors(file):
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())


_held: WeakValueDictionary[Path, Lock] = WeakValueDictionary()


def hold(folder: Path) -> Lock:
    """The lock on a folder that exists; InternalRLError where another process has it. This one may have it already."""
    folder = folder.resolve()
    lock = _held.get(folder)
    if lock is None:
        _held[folder] = lock = Lock(folder / LOCK_FILE)
    return lock
