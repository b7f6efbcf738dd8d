"""What stands between the network and the API: keys, sizes and times; nobody can hold what they do not use.

`Guard` wraps the application: it reads the whole body of a request before anything else runs, within a size and a
time, and ends the request's work when the client is gone or its time is up. `Connection` watches what happens before a
request is complete and after its answer is, which an application never sees.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from internalrl.serving.api.problems import Problem, busy, rate_limited
from internalrl.serving.api.security import LOCAL, Key
from internalrl.serving.api.service import Service

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """The outermost part of the application; puts the `Key` of the caller into the request's state."""

    def __init__(self, app: ASGIApp, service: Service):
        self.service = service
        self._app, self._bounds = app, service.bounds
        self._open = 0
        self._open_of: Counter[str] = Counter()  # by key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.monotonic(), 0

        async def observed(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self._open += 1
        scope.setdefault("state", {})["caller"] = None
        try:
            if (body := await self._admitted(scope, receive, observed)) is not None:
                await self._serve(scope, body, receive, observed, lambda: status > 0)
        finally:
            self._open -= 1
            if (caller := scope["state"]["caller"]) is not None:
                self._open_of[caller.id] -= 1
                if not self._open_of[caller.id]:
                    del self._open_of[caller.id]
            self.service.metrics.observe(scope, status, time.monotonic() - began)

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> bytes | None:
        """The body of a request that may be served; None where the request was answered, or the client has left."""
        try:
            if scope["path"] != "/health":
                caller = scope["state"]["caller"] = self._caller(scope)
                self._open_of[caller.id] += 1
                if self._open_of[caller.id] > self._bounds.key_requests:
                    raise busy()
            if self._open > self._bounds.requests:
                raise busy()
            async with asyncio.timeout(self._bounds.body_seconds):
                return await self._body(scope, receive)
        except TimeoutError:
            problem = Problem(408, "The request's body did not arrive in time.", headers={"Connection": "close"})
            await problem.response()(scope, receive, send)
        except Problem as problem:
            await problem.response()(scope, receive, send)
        return None

    def _caller(self, scope: Scope) -> Key:
        headers = dict(scope["headers"])
        if not self.service.keys.needed:
            # A page in this machine's browser must not get here under a name of its own.
            host = headers.get(b"host", b"").decode("latin-1")
            if host.removesuffix(f":{host.rpartition(':')[2]}").lower() not in _LOOPBACK and host not in _LOOPBACK:
                raise Problem(403, "Without keys only this machine is served; address it as localhost.")
            return LOCAL
        key = self.service.keys.find(_credentials(headers.get(b"authorization", b""), scope["path"]))
        if key is None:
            browser = {"WWW-Authenticate": 'Basic realm="audit"'} if scope["path"].startswith("/audit") else {}
            raise Problem(401, "Send a valid key: Authorization: Bearer KEY.", code="invalid_api_key", headers=browser)
        if wait := self.service.quotas.take(key, "requests", 1, time.monotonic()):
            raise rate_limited("requests", wait)
        return key

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        too_large = Problem(413, f"The body is larger than {self._bounds.body_bytes} bytes.", code="body_too_large")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if int(length) > self._bounds.body_bytes:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._bounds.body_bytes:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)

    async def _serve(
        self, scope: Scope, body: bytes, receive: Receive, send: Send, started: Callable[[], bool]
    ) -> None:
        gone = asyncio.ensure_future(_disconnected(receive))
        answer = asyncio.ensure_future(self._app(scope, _replay(body, gone), send))
        try:
            limit = self._bounds.request_seconds
            await asyncio.wait({answer, gone}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            answer.cancel()
            await asyncio.wait({answer})
            if gone.done():
                return None
            if not started():
                await Problem(408, "The answer took too long.", code="deadline").response()(scope, receive, send)
            elif abort := scope["state"].get("abort"):
                abort()  # closing it would wait for a reader that may never read
                await asyncio.wait({gone})
            return None
        finally:
            gone.cancel()
            answer.cancel()


def _credentials(header: bytes, path: str) -> str:
    scheme, _, value = header.decode("latin-1").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic" and path.startswith("/audit"):  # a browser asks for it; the key is the password
        try:
            return base64.b64decode(value, validate=True).decode("latin-1").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _replay(body: bytes, gone: Awaitable[None]) -> Receive:
    """Gives the body, and then nothing until the client has left."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.shield(gone)
        return {"type": "http.disconnect"}

    return receive


class Connection(H11Protocol):
    """uvicorn's connection; a head or the rest of a refused body that does not arrive in time ends it."""

    seconds = 10.0
    """Time for either; set on a subclass."""
    at_once = 1 << 14
    """Bytes that are read at once: they may be of many chunks, and nothing else happens until all are dealt with."""

    def connection_made(self, transport: Any) -> None:
        transport.max_size = self.at_once
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._due: asyncio.TimerHandle | None = self.loop.call_later(self.seconds, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._relax()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._watch()

    def _watch(self) -> None:
        """Start the clock while a head is incomplete, or a body still comes that was refused; else stop it."""
        state = self.conn.their_state
        if state is not h11.IDLE and not (state is h11.SEND_BODY and self.cycle.response_complete):
            self._relax()
        elif self._due is None:
            self._due = self.loop.call_later(self.seconds, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as all other errors are."""
        if self.cycle and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()
            return
        body = Problem(400, "This is no valid HTTP request.").body
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def _relax(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
