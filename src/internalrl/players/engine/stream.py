"""The answer to one request as it is made: events, read by a thread or by a coroutine."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress

from internalrl.players.engine.requests import Event, Finished, Request


class Stream:
    """Events of one request: `Token`s, then one `Finished`. Iterate over it once, with `for` or with `async for`.

    A slow reader holds nobody up: events wait here, at most one per token of the request.

    Attributes:
        request: the request, with the seed that was drawn if it came without one.
    """

    def __init__(self, request: Request):
        self.request = request
        self.cancelled = False
        self._events: deque[Event] = deque()
        self._ended = False
        # Set by a reader that found nothing. It looks once more after setting this, and the engine looks here after
        # putting something in, so that no event is missed without a lock.
        self._waiting: threading.Event | tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def cancel(self) -> None:
        """End the request: its slot is free at the next step, and the last event is Finished("cancelled").

        Any thread may call it, more than once, and after the end.
        """
        self.cancelled = True

    def __iter__(self) -> Iterator[Event]:
        awake = threading.Event()
        while not self._ended:
            self._waiting = awake
            while not self._events:
                awake.wait()
                awake.clear()
            self._waiting = None
            yield from self._arrived()

    async def __aiter__(self) -> AsyncIterator[Event]:
        awake = asyncio.Event()
        while not self._ended:
            self._waiting = asyncio.get_running_loop(), awake
            while not self._events:
                await awake.wait()
                awake.clear()
            self._waiting = None
            for event in self._arrived():
                yield event

    def _arrived(self) -> Iterator[Event]:
        while self._events:
            event = self._events.popleft()
            self._ended = isinstance(event, Finished)
            yield event


def deliver(events: Iterable[tuple[Stream, list[Event]]]) -> None:
    """Put `events` into their streams and wake the readers; a coroutine's loop is woken once for all of them."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for stream, new in events:
        stream._events.extend(new)
        waiting = stream._waiting
        if isinstance(waiting, threading.Event):
            waiting.set()
        elif waiting is not None:
            loops.setdefault(waiting[0], []).append(waiting[1])
    for loop, readers in loops.items():
        with suppress(RuntimeError):  # the loop was closed: nobody reads any more
            loop.call_soon_threadsafe(_set_all, readers)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
