"""Answers for the audit's tests, and processes that record them until they are killed or the disk is full."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from pathlib import Path

from internalrl.errors import InternalRLError
from internalrl.players.engine.requests import Request, SegmentRecord
from internalrl.serving.audit.audit import Audit, AuditSettings

SEGMENTS = 5


def request(name: str, adapter: str = "support@3") -> Request:
    return Request(prompt=(1, 2), adapter=adapter, id=name)


def record(index: int, text: str = "some words ", **options: object) -> SegmentRecord:
    """Three tokens under a code that tells the index."""
    values = {"code": (index / 4, -0.5), "switch_probability": 0.75, "log_probability": -1.5, "strategy": "greet"}
    return SegmentRecord(index=index, start=3 * index, stop=3 * index + 3, text=text, **{**values, **options})  # type: ignore[arg-type]


def answer(audit: Audit, name: str, texts: list[str]) -> None:
    """An answer from beginning to end."""
    for index, text in enumerate(texts):
        audit.segment(request(name), record(index, text))
    audit.wait(name)


def load(folder: Path, url: str | None, redact: bool) -> None:
    """Answer in four threads for ever; print the id of each answer that is acknowledged."""
    audit = Audit(folder, url, AuditSettings(redact=("secret",) if redact else ()))

    def go_on(thread: int) -> None:
        for i in range(10**9):
            name = f"{thread}-{i}"
            answer(audit, name, [f"{name} part {k} " for k in range(SEGMENTS)])
            os.write(1, f"{name}\n".encode())

    for thread in range(4):
        threading.Thread(target=go_on, args=(thread,)).start()


def full_disk(folder: Path) -> None:
    """Answer until no file may grow any further, go on for a while, then free the disk."""
    audit = Audit(folder)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, most))
    refused = 0
    for i in range(2000):
        try:
            answer(audit, f"r{i}", ["some words "] * SEGMENTS)
        except InternalRLError as error:
            refused += "Cannot write" in str(error) and audit.failure == str(error)
            if refused == 5:
                break
    print("refused", refused, "at", i)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    deadline = time.monotonic() + 60
    while audit.failure and time.monotonic() < deadline:
        time.sleep(0.05)
    answer(audit, "after", ["some words "] * SEGMENTS)
    audit.close()
    print(
        "written", audit.counts()["written"], "stored", audit.counts()["stored"], audit.failure, audit.database_failure
    )


if __name__ == "__main__":
    what, where, database = sys.argv[1:]
    if what == "full":
        full_disk(Path(where))
    else:
        load(Path(where), database or None, redact=what == "redact")
