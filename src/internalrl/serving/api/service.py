"""What the server is made of, and how one request runs through it: quota, version, engine, audit."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, TypeVar
from uuid import uuid4

from internalrl.errors import InternalRLError
from internalrl.players.engine.engine import Busy, Engine
from internalrl.players.engine.requests import FAILED, NO_MEMORY, Event, Finished, Request
from internalrl.players.engine.stream import Stream
from internalrl.serving.api.answers import Answer, Kind, Vocabulary
from internalrl.serving.api.asking import to_engine
from internalrl.serving.api.metrics import Metrics
from internalrl.serving.api.openai_requests import ChatRequest, CompletionRequest
from internalrl.serving.api.problems import Problem, busy, failed, rate_limited, stopping
from internalrl.serving.api.security import Key, Keys, Quotas
from internalrl.serving.api.tokenizing import Tokenizing
from internalrl.serving.audit.audit import Audit
from internalrl.serving.main import Bounds
from internalrl.serving.registry.live import Live
from internalrl.serving.registry.registry import Registry

log = logging.getLogger(__name__)

T = TypeVar("T")

CLOSE = 2.0
"""Most seconds that what answers have left behind is waited for when the server stops."""
BREATH = 16
"""Events of an answer after which others have their turn."""
REMEMBER = 1.0
"""Most seconds that the end of an answer waits until feedback on it would be understood."""


class Service:
    """Everything that requests share.

    Args:
        name: what the base is called in requests.
        audit: None records nothing.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        live: Live,
        registry: Registry,
        keys: Keys,
        audit: Audit | None = None,
        bounds: Bounds | None = None,
    ):
        self.name, self.engine, self.live, self.registry, self.keys = name, engine, live, registry, keys
        self.audit, self.bounds = audit, bounds or Bounds()
        self.quotas = Quotas()
        self.keys_lost = False
        self.metrics = Metrics(engine.stats, audit.counts if audit else dict, live, self.lost)
        self.started = int(time.time())
        self._vocabulary = Vocabulary(engine.tokenizer)
        room = None if engine.context is None else engine.context - 1
        most = min((length for length in (self.bounds.prompt_tokens, room) if length is not None), default=None)
        self._tokenizing = Tokenizing(engine.tokenizer, most)
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._databases = ThreadPoolExecutor(4, "database")  # one that hangs must not keep prompts from being read
        self._unwritten: dict[str, str] = {}
        self._writing = asyncio.Lock()

    async def in_database(self, work: Callable[[], T]) -> T:
        """Do what needs a database beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._databases, work)

    def lost(self) -> dict[str, bool]:
        """By use, whether a database cannot be reached at the moment."""
        audit = {"audit": self.audit.database_failure is not None} if self.audit else {}
        return {"registry": self.live.lost is not None, "keys": self.keys_lost, **audit}

    async def prompts(self, body: ChatRequest | CompletionRequest, caller: Key) -> list[tuple[int, ...]]:
        """The token numbers of a request's prompts. What can be refused without reading them is."""
        self._most(body)
        if wait := self.quotas.wait(caller, "tokens", self._tokenizing.fewest(body), time.monotonic()):
            raise rate_limited("tokens", wait)
        prompts = await self._tokenizing.prompts(body)
        if self._tokenizing.too_long(max(map(len, prompts))):
            self.quotas.give_back(caller, -sum(map(len, prompts)), time.monotonic())  # they were read
            raise self._tokenizing.refusal()
        return prompts

    async def stop(self) -> None:
        """End running answers; they are told why, and there will be no more of them."""
        self._stopping = True
        await asyncio.to_thread(self.engine.close)

    async def close(self) -> None:
        """Finish what answers have left behind, and take no more work for the database."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE)
        self._tokenizing.close()
        self._databases.shutdown(wait=False)

    def check_model(self, model: str) -> None:
        """Problem unless there is such a model."""
        if model != self.name and model not in self.live.routing.arms and model not in self.live.routing.versions:
            message = "There is no such model; GET /v1/models lists those that there are."
            raise Problem(404, message, param="model", code="model_not_found")

    @asynccontextmanager
    async def generating(
        self, body: ChatRequest | CompletionRequest, prompts: Sequence[tuple[int, ...]], caller: Key
    ) -> AsyncIterator[tuple[Answer, AsyncIterator[tuple[int, Event]]]]:
        """The answer to fill, and the events to fill it with; whatever happens, nothing goes on after the block."""
        kind: Kind = "chat" if isinstance(body, ChatRequest) else "text"
        most = self._most(body)
        prompt_tokens = sum(map(len, prompts))
        count = body.n or 1
        firm = _asked(body) is not None
        reserved, wait = self.quotas.reserve(caller, prompt_tokens, most * len(prompts) * count, time.monotonic(), firm)
        if wait:
            raise rate_limited("tokens", wait)
        streams: list[Stream] = []
        ended: set[int] = set()
        answer = version = None
        id_ = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid4().hex}"
        began = time.monotonic()
        try:
            # Nothing is awaited between resolving a version and submitting: `Live` counts on it.
            version = self._resolve(body.model, body.user)
            for index in range(len(prompts) * count):
                request = to_engine(body, prompts[index // count], version, most, index % count, index, id_)
                streams.append(self._submit(request))
            answer = Answer(
                kind,
                id_,
                body.model,
                version or self.name,
                self._vocabulary,
                [stream.request.seed or 0 for stream in streams],
                prompt_tokens,
                body.reported,
                bool(body.trace),
            )
            remembered = self._background(self._remember(id_, version)) if version else None
            async with aclosing(self._events(streams, ended, version or self.name, began, remembered)) as events:
                yield answer, events
        finally:
            for index, stream in enumerate(streams):
                if index not in ended:
                    stream.cancel()
                    if self.audit and stream.request.adapter:
                        self._background(self._forget(self.audit, stream))
            used = prompt_tokens + answer.completion_tokens if answer else 0
            self.quotas.give_back(caller, reserved - used, time.monotonic())
            if answer:  # it is finished, or was left
                self.metrics.tokens(version or self.name, prompt_tokens, answer.completion_tokens)

    def _most(self, body: ChatRequest | CompletionRequest) -> int:
        """Tokens that an answer may have."""
        # Where nothing is asked for, a text is completed by as many as OpenAI's default says.
        asked = _asked(body) or (self.bounds.answer_tokens if isinstance(body, ChatRequest) else 16)
        if asked > self.bounds.answer_tokens:
            raise Problem(
                400, f"An answer may have {self.bounds.answer_tokens} tokens; ask for fewer.", param="max_tokens"
            )
        return asked

    def _resolve(self, model: str, user: str | None) -> str | None:
        """The live version that answers, None for the base."""
        if model == self.name:
            return None
        self.check_model(model)
        if self.audit and self.audit.failure:
            raise Problem(503, "Steered answers cannot be recorded at the moment, and are not given.", code="no_audit")
        return self.live.routing.resolve(model, user).key

    def _submit(self, request: Request) -> Stream:
        if self._stopping:
            raise stopping()
        try:
            return self.engine.submit(request)
        except Busy as error:
            raise busy() from error
        except InternalRLError as error:
            raise Problem(400, str(error)) from error

    async def _events(
        self,
        streams: Sequence[Stream],
        ended: set[int],
        model: str,
        began: float,
        remembered: asyncio.Task[None] | None,
    ) -> AsyncGenerator[tuple[int, Event]]:
        """Events of all streams as they come; the last of each comes when its segments are recorded."""
        count = 0
        async with aclosing(_merged(streams)) as merged:
            async for index, event in merged:
                if count == 0:
                    self.metrics.first_token(model, time.monotonic() - began)
                count += 1
                if count % BREATH == 0:  # there may be so many that reading them never waits
                    await asyncio.sleep(0)
                if isinstance(event, Finished):
                    if self.audit and streams[index].request.adapter:
                        await self._recorded(self.audit, streams[index].request.id)
                    ended.add(index)
                    if event.reason == "error":
                        raise _problem(event.error)
                    if event.reason == "cancelled":
                        raise stopping()
                    if remembered and len(ended) == len(streams):  # whoever has the answer may tell how it was
                        await asyncio.wait({remembered}, timeout=REMEMBER)
                yield index, event

    async def _recorded(self, audit: Audit, request_id: str) -> None:
        try:
            await audit.written(request_id)
        except InternalRLError as error:
            log.error("an answer was not given: %s", error)
            raise Problem(503, "The answer could not be recorded, and is not given.", code="no_audit") from error

    async def _remember(self, request_id: str, version: str) -> None:
        """Let feedback find the version. Answers that begin while others are written down are written together."""
        self._unwritten[request_id] = version
        async with self._writing:
            if request_id in self._unwritten:
                versions, self._unwritten = self._unwritten, {}
                try:
                    await self.in_database(lambda: self.registry.answered(versions))
                except InternalRLError as error:
                    log.error("there can be no feedback on %d answers: %s", len(versions), error)

    async def _forget(self, audit: Audit, stream: Stream) -> None:
        """Wait for the end of a stream that was cancelled, so that the audit learns of it too."""
        async for _ in stream:
            pass
        with suppress(InternalRLError):  # it has a `failure` of its own to tell
            await audit.written(stream.request.id)

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)
        return task


def _asked(body: ChatRequest | CompletionRequest) -> int | None:
    """Tokens that a request asks for."""
    return (body.max_completion_tokens if isinstance(body, ChatRequest) else None) or body.max_tokens


def _problem(error: str | None) -> Problem:
    """Why an answer ended with an error."""
    if error in (None, FAILED):
        return failed()
    if error == NO_MEMORY:
        return Problem(503, NO_MEMORY, code="no_memory")
    return Problem(400, str(error))


async def _merged(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Event]]:
    """Events of several streams, each with its stream's number."""
    if len(streams) == 1:
        async for event in streams[0]:
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue(maxsize=1)  # the rest waits in the streams

    async def pump(index: int, stream: Stream) -> None:
        async for event in stream:
            await queue.put((index, event))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(streams)
        while running:
            index, event = await queue.get()
            running -= isinstance(event, Finished)
            yield index, event
    finally:
        for task in pumps:
            task.cancel()
