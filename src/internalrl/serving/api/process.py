"""How the server's process listens, and how it stops: what runs may end, what does not end in time is told so.

uvicorn ends the process with the signal that stopped it, past everything that is still to be closed; here a stop is an
end like any other.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn

from internalrl.serving.api.guard import Connection, Guard
from internalrl.serving.main import Bounds

HEAD_BYTES = 1 << 14
"""Most bytes of a request's head: it may be of many lines, and none of them is free."""
CUT = 2.0
"""Seconds in which those whose answers are cut off can be told so."""


class Process(uvicorn.Server):
    """Serves `app` until SIGINT or SIGTERM; then running answers have `drain` seconds to end.

    A second signal ends them. One that is cut off ends with an error event, or is 503 where nothing was sent yet.
    """

    def __init__(self, app: Guard, bounds: Bounds, drain: float):
        class Timed(Connection):
            seconds = bounds.body_seconds

        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=Timed,
                h11_max_incomplete_event_size=HEAD_BYTES,
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=65,  # longer than clients keep a connection, or a request could meet its end
                timeout_graceful_shutdown=drain + CUT,  # type: ignore[arg-type]  # it may be a fraction
            )
        )
        self._service, self._drain = app.service, drain
        self._hurry = asyncio.Event()
        self.config.load()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals that stop the server, and do not raise them again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def stop(_: int, __: FrameType | None) -> None:
            if self.should_exit:
                loop.call_soon_threadsafe(self._hurry.set)
            self.should_exit = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running answers, then cut those off that are left, and close the application."""
        cutting = asyncio.create_task(self._cut())
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()

    async def _cut(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), self._drain)
        await self._service.stop()
