"""A crowd of clients that know what the right answers are."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2

from internalrl.serving.audit.store import Segment
from tests.support.server_process import LARGEST

MODELS = ("code", "support", "tiny")

MIX = {
    "stream": 48, "whole": 20, "leave": 12, "slow": 6, "half": 2,
    "oversize": 3, "malformed": 3, "bad key": 3, "no model": 3,
}  # fmt: skip
"""What the clients of a load test do, and how often."""
REFUSED = {"oversize": 413, "malformed": 400, "bad key": 401, "no model": 404}


@dataclass(frozen=True)
class Ask:
    """A request with a seed, whose answer is always the same."""

    path: str
    body: dict[str, Any]

    def with_options(self, **options: Any) -> Ask:
        return Ask(self.path, {**self.body, **options})


def asks(count: int, most: int) -> list[Ask]:
    """Different requests: texts and chats, for each model, with one or two answers."""
    draw = random.Random(0)
    made = []
    for i in range(count):
        text = "".join(draw.choices("abcdefgh ", k=draw.randint(1, 40)))
        body = {"model": MODELS[i % len(MODELS)], "seed": i, "max_tokens": draw.randint(most // 4, most)}
        if i % 4 == 3:
            body["n"] = 2
        if i % 2:
            made.append(Ask("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}))
        else:
            made.append(Ask("/v1/completions", {**body, "prompt": text}))
    return made


class Wrong(Exception):  # noqa: N818 (it is counted)
    """An answer that should have been another; the first word says what kind of mistake it is."""


@dataclass
class Answered:
    """What came of a request: texts by choice, segments by choice where a trace was asked for, and whether all came."""

    id: str = ""
    version: str = ""
    texts: dict[int, str] = field(default_factory=dict)
    segments: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    tokens: int = 0
    complete: bool = False

    def add(self, content: dict[str, Any]) -> None:
        """A chunk, or a whole answer."""
        self.id, self.version = content["id"], content["system_fingerprint"]
        for choice in content["choices"]:
            part = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + (part.get("content") or "")
            if "trace" in choice:
                self.segments[index] = choice["trace"]["segments"]


Told = tuple[int, int, int, str | None]
"""Index, start, stop and text of a segment."""


def told_of(segment: dict[str, Any]) -> Told:
    """Of a trace, as the audit should have it: it writes a NUL, which PostgreSQL refuses, as a symbol."""
    return segment["index"], segment["start"], segment["stop"], segment["text"].replace("\0", "\N{SYMBOL FOR NULL}")


def recorded(segment: Segment) -> Told:
    """Of the audit."""
    return segment.index, segment.start, segment.stop, segment.text


async def whole(client: httpx2.AsyncClient, ask: Ask) -> Answered:
    """The answer in one piece."""
    answer = await client.post(ask.path, json=ask.body)
    _check(answer.status_code, 200, answer.text)
    got = Answered(complete=True)
    got.add(answer.json())
    got.tokens = answer.json()["usage"]["completion_tokens"]
    return got


async def streamed(client: httpx2.AsyncClient, ask: Ask, leave_after: int | None = None, pause: float = 0) -> Answered:
    """The answer chunk by chunk; the client may leave before its end, or take its time."""
    got, chunks = Answered(), 0
    async with client.stream("POST", ask.path, json={**ask.body, "stream": True}) as answer:
        if answer.status_code != 200:
            _check(answer.status_code, 200, (await answer.aread()).decode())
        async for line in answer.aiter_lines():
            if chunks == leave_after:
                break
            if line == "data: [DONE]":
                got.complete = True
            elif line:
                content = json.loads(line.removeprefix("data: "))
                if "error" in content:
                    raise Wrong(f"lost: {line}")
                got.add(content)
                chunks += 1
                await asyncio.sleep(pause)
    return got


def _check(status: int, right: int, text: str) -> None:
    if status != right:
        raise Wrong(f"{'5xx' if status >= 500 else 'status'}: {status} instead of {right}: {text[:200]}")


def _same(got: Answered, expected: dict[int, str]) -> None:
    if not got.complete:
        raise Wrong(f"lost: only {got.texts!r} came of {expected!r}")
    if got.texts != expected:
        raise Wrong(f"crossed: {got.texts!r} instead of {expected!r}")


async def do(client: httpx2.AsyncClient, kind: str, ask: Ask, expected: dict[int, str], draw: random.Random) -> None:
    """Do one thing of the mix; `Wrong` where the server did not do the right one."""
    if kind == "stream":
        _same(await streamed(client, ask), expected)
    elif kind == "slow":
        logprobs = 20 if "prompt" in ask.body else True
        slow = ask.with_options(logprobs=logprobs)
        _same(await streamed(client, slow, pause=0.05), expected)
    elif kind == "whole":
        _same(await whole(client, ask), expected)
    elif kind == "leave":
        got = await streamed(client, ask, leave_after=draw.randint(0, 8))
        if not all(expected[index].startswith(text) for index, text in got.texts.items()):
            raise Wrong(f"crossed: {got.texts!r} instead of {expected!r}")
    elif kind == "half":
        await _half(client, ask, draw)
    else:
        answer = await client.post(ask.path, **_refused(kind, ask, draw))
        _check(answer.status_code, REFUSED[kind], answer.text)
        if set(answer.json()["error"]) != {"message", "type", "param", "code"}:
            raise Wrong(f"status: {answer.text[:200]}")


async def _half(client: httpx2.AsyncClient, ask: Ask, draw: random.Random) -> None:
    """Send a part of a request, and leave."""
    url, body = client.base_url, json.dumps(ask.body)
    head = f"POST {ask.path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {client.headers['authorization']}\r\n"
    data = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    _, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(data[: draw.randrange(len(data))])
    await writer.drain()
    writer.transport.abort()


def _refused(kind: str, ask: Ask, draw: random.Random) -> dict[str, Any]:
    """What to send so that the server must refuse it."""
    json_type = {"Content-Type": "application/json"}
    if kind == "oversize":
        big = json.dumps({**ask.body, "user": "x" * draw.randint(LARGEST, 8 * LARGEST)}).encode()
        return {"content": _pieces(big) if draw.random() < 0.5 else big, "headers": json_type}
    if kind == "malformed":
        junk = draw.choice((b"", b"{", b"\xff\xfe", b"[1, 2", json.dumps({**ask.body, "n": "two"}).encode()))
        return {"content": junk, "headers": json_type}
    if kind == "bad key":
        wrong = f"Bearer irl-{draw.getrandbits(48):012x}-{draw.getrandbits(99)}"
        return {"json": ask.body, "headers": {"Authorization": wrong}}
    return {"json": {**ask.body, "model": "nobody"}}


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for i in range(0, len(data), 9000):
        yield data[i : i + 9000]


@dataclass
class Tally:
    """What a crowd did, what went wrong, and how long whole answers took."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def kinds_of_mistakes(self) -> dict[str, int]:
        """How many answers were lost, crossed, a failure of the server, or of the wrong status."""
        found = Counter(text.partition(":")[0] for text in self.wrong)
        return {kind: found[kind] for kind in ("lost", "crossed", "5xx", "status")}


async def crowd(
    clients: int, over: Callable[[], bool], work: Callable[[random.Random], Awaitable[None]], tally: Tally
) -> None:
    """So many clients at once, each doing `work` again and again until it is `over`."""

    async def one(number: int) -> None:
        draw = random.Random(number)
        while not over():
            try:
                await work(draw)
            except Wrong as error:
                tally.wrong.append(str(error))
            except (httpx2.HTTPError, OSError) as error:  # a connection that broke is an answer that was lost
                tally.wrong.append(f"lost: {type(error).__name__}: {error}")

    await asyncio.gather(*(one(number) for number in range(clients)))


async def mixed(client: httpx2.AsyncClient, clients: int, seconds: float, most: int = 48) -> Tally:
    """The mix of everything for so long; each answer is compared with what the server said when it was alone."""
    wanted, tally = asks(24, most), Tally()
    expected = [(await whole(client, ask)).texts for ask in wanted]
    kinds, weights, each = list(MIX), list(MIX.values()), iter(MIX)  # each of them at least once
    end = time.monotonic() + seconds

    async def work(draw: random.Random) -> None:
        i, began = draw.randrange(len(wanted)), time.monotonic()
        kind = next(each, None) or draw.choices(kinds, weights)[0]
        await do(client, kind, wanted[i], expected[i], draw)
        tally.done[kind] += 1
        if kind in ("stream", "whole"):
            tally.seconds.append(time.monotonic() - began)

    await crowd(clients, lambda: time.monotonic() > end, work, tally)
    return tally


async def idle(client: httpx2.AsyncClient) -> bool:
    """Whether all slots are free soon after the last client has left."""
    for _ in range(100):
        metrics = (await client.get("/metrics")).text
        if "internalrl_slots_running 0.0" in metrics and "internalrl_queue_waiting 0.0" in metrics:
            return True
        await asyncio.sleep(0.1)
    return False
