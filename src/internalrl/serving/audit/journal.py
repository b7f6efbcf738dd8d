"""An append-only journal: lines that a killed process leaves behind, to be taken by whoever comes next.

A process holds a lock on the file it writes, and the system releases it however the process ends: a file that can be
locked is nobody's any more. A last line without its end was being written at the kill, and is left out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from internalrl.run.files import PARTIAL, write_errors

LARGEST = 16 * 2**20
"""Bytes after which a new file is begun."""
LONGEST = 60.0
"""Seconds that a file is kept whose lines have all been taken."""
_CHUNK = 2**20


class Journal:
    """The files of `folder`, one of which is this process's; one thread may append while another one takes."""

    def __init__(self, folder: Path):
        self.folder = folder
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file: Path | None = None
        self._handle = -1
        self._size = 0
        self._begun = 0.0
        self._taken: dict[Path, int] = {}

    def append(self, lines: bytes) -> None:
        """Write whole lines: from then on a kill of the process does not lose them.

        Raises InternalRLError, for a full disk say; none of the lines is then written.
        """
        with self._lock, write_errors(self.folder):
            if self._file is None or self._size >= LARGEST:
                self._end()
                self._begin()
            done = 0
            try:
                while done < len(lines):
                    done += os.write(self._handle, lines[done:])
            except OSError:
                try:
                    os.ftruncate(self._handle, self._size)
                except OSError:
                    self._end()  # what is there of them stays, as after a kill
                raise
            self._size += len(lines)

    def take(self) -> Iterator[bytes]:
        """Whole lines, some at a time, of this process and of killed ones.

        Asking for more says that those before are safe elsewhere. A file is deleted once all of it is.
        """
        for file in sorted(self.folder.glob("*.jsonl")):
            with contextlib.suppress(FileNotFoundError), open(file, "rb") as stream:  # another one may be faster
                with self._lock:
                    own, end = file == self._file, self._size
                if not own:
                    if not _locked(stream):
                        continue
                    end = os.fstat(stream.fileno()).st_size
                stream.seek(self._taken.get(file, 0))
                while lines := _whole_lines(stream, end):
                    yield lines
                    self._taken[file] = stream.tell()
                self._delete(file, own)

    def close(self) -> None:
        """End this process's file; what was not taken of it is left."""
        with self._lock:
            self._end()

    def _begin(self) -> None:
        # It gets its name when it is locked: nobody takes it for a file that was left behind.
        name = f"{time.time_ns()}-{os.getpid()}.jsonl"
        hidden, file = self.folder / f"{PARTIAL}{name}", self.folder / name
        handle = os.open(hidden, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.rename(hidden, file)
        except OSError:
            os.close(handle)
            raise
        self._file, self._handle, self._size, self._begun = file, handle, 0, time.monotonic()

    def _end(self) -> None:
        if self._file is not None:
            os.close(self._handle)
            self._file = None

    def _delete(self, file: Path, own: bool) -> None:
        """Delete a file whose lines were taken; the one that is being written only when it is old, and all was."""
        with self._lock:
            if own:
                if file != self._file or self._taken.get(file, 0) < self._size:
                    return
                if time.monotonic() - self._begun < LONGEST:
                    return
                self._end()
            file.unlink(missing_ok=True)
            self._taken.pop(file, None)


def _locked(stream: BinaryIO) -> bool:
    """Lock a file until it is closed; False where its process lives."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _whole_lines(stream: BinaryIO, end: int) -> bytes:
    """The next whole lines before position `end`, at least one if there is one."""
    start, data = stream.tell(), b""
    while b"\n" not in data and (more := stream.read(min(end - start - len(data), _CHUNK))):
        data += more
    data = data[: data.rfind(b"\n") + 1]
    stream.seek(start + len(data))
    return data
