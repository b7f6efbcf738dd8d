"""What a request costs before it is served: cheap bounds come first, nobody waits for another one's long text."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from internalrl.serving.api.openai_requests import CompletionRequest
from internalrl.serving.api.problems import Problem
from internalrl.serving.api.security import LOCAL, Keys, Quotas
from internalrl.serving.api.tokenizing import SHORT, WAITING, Tokenizing
from internalrl.serving.main import AuditOptions, Bounds
from tests.support.answers import wait_until
from tests.support.live_server import Served, config_for, save_models, serving

HELLO: Any = [{"role": "user", "content": "hello"}]


class Slow:
    """A tokenizer, a token per word, that takes long texts only when it may."""

    chat_template = None
    may = threading.Event()
    read: tuple[str, ...] = ()

    def get_vocab(self) -> dict[str, int]:
        return {"longest": 0, "a": 1}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) > SHORT:
            assert self.may.wait(20)
        Slow.read += (text,)
        return [1] * len(text.split())


@pytest.fixture
def slow() -> Iterator[Slow]:
    Slow.may, Slow.read = threading.Event(), ()
    yield Slow()
    Slow.may.set()


def completion(prompt: Any, **options: Any) -> CompletionRequest:
    return CompletionRequest(model="m", prompt=prompt, **options)


def test_a_short_text_does_not_wait_for_long_ones(slow: Slow) -> None:
    async def main() -> None:
        tokenizing = Tokenizing(slow, None)  # type: ignore[arg-type]
        long = [asyncio.create_task(tokenizing.prompts(completion("a " * SHORT))) for _ in range(WAITING)]
        await asyncio.sleep(0)
        assert await tokenizing.prompts(completion("a a")) == [(1, 1)]
        assert await tokenizing.prompts(completion([[1, 2], [3]])) == [(1, 2), (3,)]
        with pytest.raises(Problem) as caught:
            await tokenizing.prompts(completion("a " * SHORT))
        assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
        assert not any(task.done() for task in long)
        slow.may.set()
        assert {len(prompt) for [prompt] in await asyncio.gather(*long)} == {SHORT}
        tokenizing.close()

    asyncio.run(main())


@pytest.mark.parametrize("prompt", ["x" * 71, ["a", "x" * 71], list(range(11)), [[1], list(range(11))]])
def test_what_cannot_fit_is_refused_unread(slow: Slow, prompt: Any) -> None:
    """Ten tokens are seventy characters at most."""
    tokenizing = Tokenizing(slow, 10)  # type: ignore[arg-type]
    with pytest.raises(Problem, match="more than 10 tokens") as caught:
        tokenizing.fewest(completion(prompt))
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert slow.read == ()
    assert tokenizing.fewest(completion("x" * 70)) == 10
    assert tokenizing.fewest(completion([[1, 2, 3]])) == 3
    tokenizing.close()


def test_small_requests_fit_into_what_large_ones_leave() -> None:
    key, quotas = dataclasses.replace(LOCAL, tokens_per_minute=1000), Quotas()
    taken, wait = quotas.reserve(key, 20, 1024, 0.0, firm=False)  # more than a minute's worth, but not asked for
    assert (taken, wait) == (500, 0)
    assert quotas.reserve(key, 20, 1024, 0.0, firm=False) == (250, 0)  # beside it
    assert quotas.reserve(key, 300, 1024, 0.0, firm=False) == (301, pytest.approx(51 * 60 / 1000))
    assert quotas.reserve(key, 20, 1024, 0.0, firm=True) == (1044, float("inf"))
    quotas.give_back(key, taken - 900, 0.0)  # it has used more than it reserved
    assert quotas.wait(key, "tokens", 1, 0.0) == pytest.approx(151 * 60 / 1000)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = save_models(tmp_path_factory.mktemp("quotas"))
    bounds = Bounds(answer_tokens=400, key_requests=2, requests=8)
    options: dict[str, Any] = {"audit": AuditOptions(enabled=False), "registry": folder / "registry"}
    keys = Keys(Path(folder / "registry"))
    keys.create("first")
    keys.close()
    with serving(config_for(folder, bounds=bounds, **options), folder) as served:
        yield served


def client(served: Served, **limits: int) -> openai.OpenAI:
    keys = served.app.service.keys
    _, text = keys.create("some", **limits)  # type: ignore[arg-type]
    keys.refresh()
    return openai.OpenAI(base_url=served.url, api_key=text, max_retries=0)


def test_a_small_key_can_chat_until_its_tokens_are_used_up(served: Served) -> None:
    """With a limit below the longest answer, which a chat may have that does not say otherwise."""
    with client(served, tokens_per_minute=300) as small:
        for seed in range(3):
            small.chat.completions.create(model="code", messages=HELLO, seed=seed, stop=["a", "e", " ", "t"])

        def chat_on() -> None:
            for _ in range(30):
                small.chat.completions.create(model="code", messages=HELLO)

        with pytest.raises(openai.RateLimitError) as caught:
            chat_on()
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 240


def test_prompts_that_are_refused_cost_what_was_read(served: Served) -> None:
    """A text of 600 tokens, where 511 have room."""
    with client(served, tokens_per_minute=1000) as key:
        with pytest.raises(openai.BadRequestError, match="more than 511 tokens"):
            key.completions.create(model="code", prompt="x" * 600)
        with pytest.raises(openai.RateLimitError, match="used up"):
            key.completions.create(model="code", prompt="x" * 450, max_tokens=1)
        with pytest.raises(openai.BadRequestError, match="more than 511 tokens"):  # this one was not read
            key.completions.create(model="code", prompt="x" * 6000)


def test_a_key_has_so_many_requests_at_a_time(served: Served) -> None:
    handle = served.app.service.engine.base.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    with client(served) as busy, client(served) as other, ThreadPoolExecutor(2) as threads:
        ask: Any = {"model": "code", "prompt": "a", "max_tokens": 100, "temperature": 0}
        running = [threads.submit(lambda: busy.completions.create(**ask)) for _ in range(2)]
        wait_until(lambda: served.app.service.engine.stats().running == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            busy.completions.create(**ask)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert other.models.list().data
        assert httpx2.get(f"{served.root}/health", verify=False).status_code == 200
        assert all(answer.result(60).choices for answer in running)
        assert busy.completions.create(**{**ask, "max_tokens": 1}).choices
    handle.remove()
    assert not served.app._open_of
