"""The audit: every segment of every steered answer, written beside the engine, not in its way.

    audit = Audit("runs/audit")                   # SQLite there; or url="postgresql://…"
    engine = Engine(..., on_segment=audit.segment)
    await audit.written(request.id)               # before the end of an answer is sent, whichever way it ended
    audit.store.find(Query(strategy="apologise"))

`segment` puts a record on a queue; one thread writes it to the journal, another one moves the journal to the database.
Whatever stops the process, what was in the journal gets there: by `close`, or when the audit is opened again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from internalrl.errors import InternalRLError, OptionError
from internalrl.players.engine.requests import Request, SegmentRecord
from internalrl.serving.audit.journal import Journal
from internalrl.serving.audit.redaction import Redaction
from internalrl.serving.audit.store import AuditStore, Row, to_line
from internalrl.settings.ranges import Checked, Range

_log = logging.getLogger(__name__)

FLUSH = 0.1
"""Seconds that a segment may wait for others to be written together, unless its answer ends."""
RETRY = 1.0
"""Seconds until a journal that could not be written is tried again."""
MOVE = 1.0
"""Seconds between two moves from the journal to the database."""
PRUNE = 60.0
"""Seconds between two deletions of what is no longer to be kept."""
HOLD = 60.0
"""Seconds after its last segment when an answer is redacted and written though nobody said that it ended."""


@dataclass(frozen=True)
class AuditSettings(Checked):
    """What is kept, and how long."""

    texts: Literal["keep", "hash", "drop"] = "keep"
    """Texts of segments: as they are, as a hash under a key in the audit's folder, or not at all."""
    redact: tuple[str, ...] = ()
    """Regular expressions; what they find in an answer is replaced by a mark before anything is written. An answer's
    segments are then written when it ends, as a match may span several."""
    retention_days: Annotated[float | None, Range(0, above=True)] = None
    """Older segments are deleted."""
    max_segments: Annotated[int | None, Range(1)] = None
    """The oldest segments beyond this number are deleted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern in self.redact:
            try:
                re.compile(pattern)
            except re.error as error:
                raise OptionError("redact", f"holds {pattern!r}, which is no regular expression ({error}).") from error


class _Taken(NamedTuple):
    """A segment on its way, and when it ended."""

    request: Request
    record: SegmentRecord
    time: float


@dataclass(frozen=True)
class _Mark:
    """Stands on the queue behind all segments of a request; `done` when these are written."""

    request_id: str
    done: Future[None]


class Audit:
    """Records segments into a journal in `folder`, and from there into the database (SQLite there, or at `url`).

    Opening it first moves what killed processes left, and raises InternalRLError when that fails. Later, while the
    journal cannot be written (a full disk), `failure` says why and `written` raises: answers then end with an error,
    and new steered requests should be refused. While the database cannot be reached, `database_failure` says why,
    segments wait in the journal, and answers go on. Both are tried again until they succeed.
    """

    def __init__(self, folder: str | Path, url: str | None = None, settings: AuditSettings | None = None):
        folder, self._settings = Path(folder), settings or AuditSettings()
        self.failure: str | None = None
        self.database_failure: str | None = None
        self._journal = Journal(folder / "journal")
        self.store = AuditStore(folder, url)
        self._redaction = Redaction(self._settings.texts, self._settings.redact, folder)
        self._queue: deque[_Taken | _Mark] = deque()
        self._called = threading.Event()
        self._held: dict[str, list[_Taken]] = {}
        self._written = self._stored = 0
        self._closed = threading.Event()
        self._move()
        self._prune()
        self._threads = [
            threading.Thread(target=target, name=f"audit {target.__name__.strip('_')}", daemon=True)
            for target in (self._keep_writing, self._keep_moving)
        ]
        for thread in self._threads:
            thread.start()

    def segment(self, request: Request, record: SegmentRecord) -> None:
        """Take a segment of `request` to be written; never blocks, never raises."""
        self._queue.append(_Taken(request, record, time.time()))

    async def written(self, request_id: str) -> None:
        """Return when all segments taken so far of the request are in the journal; also for a cancelled one.

        Raises InternalRLError when they cannot be written; the answer should then end with an error.
        """
        await asyncio.wrap_future(self._mark(request_id))

    def wait(self, request_id: str) -> None:
        """The same, blocking."""
        self._mark(request_id).result()

    def counts(self) -> dict[str, int]:
        """For metrics: segments `written` to the journal and `stored` in the database by this object."""
        return {"written": self._written, "stored": self._stored}

    def close(self) -> None:
        """Write and move everything, then stop; what the database does not take stays in the journal."""
        if not self._closed.is_set():
            self._closed.set()
            self._called.set()
            for thread in self._threads:
                thread.join()
            self._journal.close()
            self._try(self._move)
            self.store.close()

    def _mark(self, request_id: str) -> Future[None]:
        if self._closed.is_set():
            raise InternalRLError("The audit is closed.")
        mark = _Mark(request_id, Future())
        self._queue.append(mark)
        self._called.set()
        return mark.done

    def _keep_writing(self) -> None:
        rows: list[Row] = []
        broken = None
        running = True
        while running:
            self._called.wait(FLUSH if self.failure is None else RETRY)
            self._called.clear()
            running = not self._closed.is_set()
            answers, marks = self._next(running)
            try:
                for answer in answers:
                    rows += self._rows(answer)
            except Exception as error:  # no more answers rather than answers without a record
                broken = f"The audit could not write a segment down ({type(error).__name__}: {error})."
                _log.exception("the audit stopped")
            self.failure = broken or self._append(rows)
            for mark in marks:
                if self.failure is None:
                    mark.done.set_result(None)
                else:
                    mark.done.set_exception(InternalRLError(self.failure))

    def _next(self, running: bool) -> tuple[list[list[_Taken]], list[_Mark]]:
        """What is to be written now, segments that are redacted together in one list, and who waits for it."""
        loose: list[_Taken] = []
        answers, marks = [loose], []
        for item in [self._queue.popleft() for _ in range(len(self._queue))]:
            if isinstance(item, _Mark):
                answers.append(self._held.pop(item.request_id, []))
                if item.done.set_running_or_notify_cancel():
                    marks.append(item)
            elif self._redaction.patterns:
                self._held.setdefault(item.request.id, []).append(item)
            else:
                loose.append(item)
        over = time.time() - HOLD
        for request_id in [id_ for id_, held in self._held.items() if not running or held[-1].time < over]:
            answers.append(self._held.pop(request_id))
        return answers, marks

    def _rows(self, answer: list[_Taken]) -> list[Row]:
        texts = self._redaction([_clean(taken.record.text) or "" for taken in answer])
        return [
            (
                _clean(request.id),
                int(record.index),
                _clean(request.adapter or ""),
                int(record.start),
                int(record.stop),
                json.dumps([_finite(number) for number in record.code]),
                _finite(record.switch_probability),
                _finite(record.log_probability),
                _clean(record.strategy),
                _clean(record.violation),
                text,
                moment,
            )
            for (request, record, moment), text in zip(answer, texts, strict=True)
        ]

    def _append(self, rows: list[Row]) -> str | None:
        """Write and empty `rows`; returns what stands against it."""
        if not rows:
            return None
        try:
            self._journal.append(to_line(rows))
        except Exception as error:
            if self.failure is None:
                _log.error("the audit cannot be written: %s", error)
            return str(error) or repr(error)
        self._written += len(rows)
        rows.clear()
        return None

    def _keep_moving(self) -> None:
        pruned = time.monotonic()
        while not self._closed.wait(MOVE):
            self._try(self._move)
            if time.monotonic() - pruned > PRUNE:
                pruned = time.monotonic()
                self._try(self._prune)

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
            self.database_failure = None
        except Exception as error:
            if self.database_failure is None:
                _log.warning("the audit waits in its journal: %s", error)
            self.database_failure = str(error) or repr(error)

    def _move(self) -> None:
        for lines in self._journal.take():
            self._stored += self.store.insert(lines)

    def _prune(self) -> None:
        self.store.prune(self._settings.retention_days, self._settings.max_segments)


def _clean(text: str | None) -> str | None:
    """Text that every database takes: they know no half of a surrogate pair, PostgreSQL no NUL."""
    if text is None or (text.isascii() and "\0" not in text):
        return text
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{SYMBOL FOR NULL}")


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None
