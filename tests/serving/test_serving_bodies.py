"""No body holds the event loop, whatever is in it; and no answer does, however much it says."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from internalrl.players.engine.requests import Finished, SegmentRecord, Token
from internalrl.serving.api.answers import Answer, Kind, Vocabulary
from internalrl.serving.api.openai_requests import (
    Body,
    ChatRequest,
    CompletionRequest,
    FeedbackRequest,
    SplitRequest,
)
from internalrl.serving.api.problems import Problem
from internalrl.serving.api.reading import parse
from internalrl.serving.api.whole import Whole
from internalrl.serving.main import Bounds
from tests.support import bodies
from tests.support.live_server import Served, config_for, save_models, serving
from tests.support.served import byte_tokenizer
from tests.support.stalls import Held, held

MOST = 0.05
"""Seconds of processor time for which anything may hold the loop."""
MODELS: dict[str, type[Body]] = {
    bodies.CHAT: ChatRequest,
    bodies.TEXT: CompletionRequest,
    bodies.FEEDBACK: FeedbackRequest,
    bodies.SPLIT: SplitRequest,
}


def problem_of(model: type[Body], body: bytes) -> Problem | None:
    try:
        parse(model, body)
    except Problem as problem:
        return problem
    return None


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """What is there is never looked through for garbage, as in a server."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("size", [1 << 20, 120_000])
def test_reading_a_body_takes_no_time(size: int) -> None:
    refused = 0
    for what, path, body in bodies.hostile(size):
        begin = time.thread_time()
        problem = problem_of(MODELS[path], body)
        assert time.thread_time() - begin < MOST, what
        if problem:
            refused += 1
            assert problem.status == 400
            assert len(problem.body) < 400, what
    assert refused > 50


def test_lists_as_long_as_a_prompt_may_be_are_read() -> None:
    numbers = parse(CompletionRequest, json.dumps({"model": "x", "prompt": [5] * 100_000}).encode())
    assert len(numbers.prompt) == 100_000
    text = 'He said: "[{,:}]"\\ ' * 40_000
    assert parse(CompletionRequest, json.dumps({"model": "x", "prompt": text}).encode()).prompt == text
    messages = [{"role": "user", "content": [{"type": "text", "text": "a, b"}]}] * 1000
    assert len(parse(ChatRequest, json.dumps({"model": "x", "messages": messages}).encode()).messages) == 1000
    assert parse(CompletionRequest, b"\xef\xbb\xbf" + b'{"model":"x","prompt":"a"}').prompt == "a"


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Held]]:
    """A server, and what holds its loop."""
    folder = save_models(tmp_path_factory.mktemp("bodies"))
    bounds = Bounds(body_bytes=1 << 20, answer_tokens=16)
    with held() as longest, serving(config_for(folder, bounds=bounds), folder) as running:
        yield running, longest


def test_a_server_is_not_held_by_a_body(watched: tuple[Served, Held]) -> None:
    served, longest = watched
    parts = [{"role": "user", "content": [{"type": "text", "text": ""}] * 3}] * 900
    chosen = [
        ("/chat/completions", bodies.filled('{"messages":[{"role":"user","content":[', "{}", "]}]}", 1 << 20)),
        ("/chat/completions", bodies.filled('{"model":"code","messages":[', "0", "]}", 1 << 20)),
        ("/completions", bodies.filled('{"model":"code","prompt":[', '"a"', "]}", 1 << 20)),
        ("/completions", bodies.filled('{"model":"code","prompt":"a","n":16,"codes":[', "[0.5,0.5,0.5]", "]}", 30_000)),
        ("/completions", bodies.keyed("{", "0", "}", 1 << 20)),
        ("/chat/completions", json.dumps({"model": "code", "messages": parts}).encode()),
        ("/completions", json.dumps({"model": "code", "prompt": "a, " * 300_000}).encode()),
    ]
    with httpx2.Client(base_url=served.url, verify=False, timeout=60) as web:
        web.get("/models")
        longest.forget()
        for path, body in chosen:
            answer = web.post(path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code in (200, 400), answer.text
            # In chunks of one byte each each takes as long as a large one.
            small = (bytes([byte]) for byte in body[:5000])
            web.post(path, content=small, headers={"Content-Type": "application/json"})
    assert longest.seconds < MOST, longest.what


def answer_of(kind: Kind, logprobs: int | None, tokens: int, choices: int = 16) -> tuple[dict[str, Any], float]:
    """A whole answer of so many tokens with everything that can be said of them, and the longest step to it."""
    vocabulary = Vocabulary(byte_tokenizer())
    answer = Answer(kind, "x", "code", "code@1", vocabulary, range(choices), 1, logprobs, trace=True)
    whole = Whole(answer)
    top = tuple((number, -1.0 * number) for number in range(60, 60 + (logprobs or 0)))
    steps = []
    for index in range(choices):
        told = [Token(65 + i % 20, chr(65 + i % 20), i, -0.5, top) for i in range(tokens)]
        records = tuple(SegmentRecord(i, i, i + 1, (0.5,) * 16, 0.5, -1.0, "a") for i in range(tokens))
        for event in [*told, Finished("stop", "", records)]:
            begin = time.thread_time()
            if part := answer.add(index, event):
                whole.add(part)
            steps.append(time.thread_time() - begin)
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def main() -> None:
        response = await whole.response()
        await response({}, lambda: None, send)  # type: ignore[arg-type]

    with held() as longest:
        asyncio.run(main())
    head, *pieces = sent
    body = b"".join(piece["body"] for piece in pieces)
    assert dict(head["headers"])[b"content-length"] == str(len(body)).encode()
    return json.loads(body), max(*steps, longest.seconds)


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_long_answer_does_not_hold_the_loop(kind: Kind) -> None:
    answer, step = answer_of(kind, 20, 512)
    assert step < MOST
    assert len(answer["choices"]) == 16
    assert len(answer["choices"][15]["trace"]["segments"]) == 512


def test_a_whole_answer_says_what_its_chunks_do() -> None:
    chat, _ = answer_of("chat", 2, 3, 1)
    assert chat["choices"][0]["message"] == {
        "role": "assistant",
        "content": chat["choices"][0]["message"]["content"],
        "refusal": None,
    }
    assert chat["choices"][0]["logprobs"]["refusal"] is None
    assert [len(entry["top_logprobs"]) for entry in chat["choices"][0]["logprobs"]["content"]] == [2, 2, 2]
    text, _ = answer_of("text", 2, 3, 1)
    assert set(text["choices"][0]["logprobs"]) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert text["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2]
    bare, _ = answer_of("text", 0, 3, 1)
    assert bare["choices"][0]["logprobs"]["top_logprobs"] is None
    assert len(bare["choices"][0]["logprobs"]["tokens"]) == 3
    none, _ = answer_of("text", None, 3, 1)
    assert none["choices"][0]["logprobs"] is None
    empty, _ = answer_of("chat", 2, 0, 1)
    assert empty["choices"][0]["logprobs"] == {"content": [], "refusal": None}
