"""How long a server's event loop was held by one of its callbacks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass
class Held:
    """The longest that one callback computed, in seconds of its thread's processor time, and what it was."""

    seconds: float = 0.0
    what: str = ""

    def forget(self) -> None:
        self.seconds, self.what = 0.0, ""


@contextmanager
def held() -> Iterator[Held]:
    """Watch all event loops of this process. Processor time does not depend on what else the machine does."""
    longest, plain = Held(), asyncio.Handle._run

    def run(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        plain(handle)
        seconds = time.thread_time() - began
        if seconds > longest.seconds:
            longest.seconds, longest.what = seconds, repr(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.Handle, "_run", run)
        yield longest
