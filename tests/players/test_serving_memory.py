"""What requests cost: memory for their own tokens, no long pauses for others, and no harm where an allocation fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from internalrl.errors import InternalRLError
from internalrl.players.engine.engine import Engine, EngineConfig
from internalrl.players.engine.pace import Pace
from internalrl.players.engine.requests import NO_MEMORY, Request
from internalrl.players.engine.trays import Tray
from tests.support.answers import prompt, read, same, wait_until
from tests.support.language import steer
from tests.support.served import byte_tokenizer, served_base


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return served_base()


@contextmanager
def engine_of(base: PreTrainedModel, **sizes: Any) -> Iterator[Engine]:
    """With an adapter "policy"."""
    with Engine(base, byte_tokenizer(), EngineConfig(**sizes)) as engine:
        engine.add_adapter("policy", steer(base, 1, policy=True).adapter)
        yield engine


def test_a_long_prompt_costs_memory_for_its_own_tokens(base: PreTrainedModel) -> None:
    with engine_of(base, slots=64) as engine:
        stream = engine.submit(Request(prompt(400), max_tokens=60, temperature=0))
        next(iter(stream))
        per_token = 2 * 4 * 4 * 8 * 4  # keys and values, blocks, heads, size, bytes
        assert 400 * per_token <= engine.stats().memory <= 2 * 2048 * per_token
        stream.cancel()


def test_what_can_never_fit_is_refused_and_what_does_not_fit_now_waits(base: PreTrainedModel) -> None:
    gib = 300 * 2 * 4 * 4 * 8 * 4 / 2**30  # for 300 tokens
    with engine_of(base, memory=gib) as engine:
        with pytest.raises(InternalRLError, match="may come to 350 tokens, but there is memory for 300"):
            engine.submit(Request(prompt(50), max_tokens=300))
        wanted = [Request(prompt(60, seed), "policy", max_tokens=60, temperature=0, seed=seed) for seed in range(6)]
        streams = [engine.submit(request) for request in wanted]
        together = list(map(read, streams))
        alone = [read(engine.submit(request)) for request in wanted]
    for one, other in zip(together, alone, strict=True):
        same(one, other)
        assert one.end.reason != "error"


@contextmanager
def failing(base: PreTrainedModel, where: str, too_long: Callable[[torch.Tensor], bool]) -> Iterator[list[int]]:
    """Allocations fail in passes whose positions are `too_long`, before or after the tap, or when tokens are drawn."""
    failed: list[int] = []
    positions = torch.zeros(1)

    def look(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        nonlocal positions
        positions = inputs["position_ids"]

    def fail(*_: Any) -> None:
        if too_long(positions):
            failed.append(positions.shape[1])
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    module = {"first block": base.model.layers[0], "last block": base.model.layers[3], "head": base.lm_head}[where]
    handles = [base.register_forward_pre_hook(look, with_kwargs=True), module.register_forward_hook(fail)]
    try:
        yield failed
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("where", ["first block", "last block", "head"])
@pytest.mark.parametrize("length", [8, 130, 200])
def test_a_failed_allocation_ends_the_request_that_does_not_fit(base: PreTrainedModel, where: str, length: int) -> None:
    """A prompt that is too long, or one that grows to be; the others never learn of it."""
    others = [Request(prompt(10, seed), "policy", max_tokens=60, temperature=1, seed=seed) for seed in range(5)]
    with engine_of(base) as engine:
        expected = [read(engine.submit(request)) for request in others]
        with failing(base, where, lambda positions: bool(positions.max() >= 150)) as failed:
            streams = [engine.submit(request) for request in others]
            long = engine.submit(Request(prompt(length), max_tokens=300, temperature=0))
            answers, ended = list(map(read, streams)), read(long)
        assert failed
        assert (ended.end.reason, ended.end.error) == ("error", NO_MEMORY)
        assert engine.stats().errors == 1
    for answer, alone in zip(answers, expected, strict=True):
        same(answer, alone)


def test_a_prompt_too_large_for_one_pass_is_read_in_smaller_ones(base: PreTrainedModel) -> None:
    request = Request(prompt(120), "policy", max_tokens=10, temperature=0, seed=1)
    with engine_of(base) as engine:
        expected = read(engine.submit(request))
        with failing(base, "head", lambda positions: positions.shape[1] > 40) as failed:
            same(read(engine.submit(request)), expected)
        assert failed


def test_memory_for_a_row_that_cannot_be_had_is_missed_by_nobody_else(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Tray.__init__

    def scarce(self: Tray, shape: Any, rows: int, capacity: int) -> None:
        if capacity > 128:
            raise torch.OutOfMemoryError("out of memory")
        made(self, shape, rows, capacity)

    good = Request(prompt(10), "policy", max_tokens=100, temperature=0, seed=1)
    with engine_of(base) as engine:
        expected = read(engine.submit(good))
        monkeypatch.setattr(Tray, "__init__", scarce)
        streams = [engine.submit(request) for request in (good, Request(prompt(200)), replace(good, max_tokens=200))]
        kept, never, grown = map(read, streams)
    same(kept, expected)
    assert (never.tokens, never.end.error) == ([], NO_MEMORY)
    assert (len(grown.tokens), grown.end.error) == (119, NO_MEMORY)


# -- pauses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "each"), [(0.03, 0.002), (0.1, 0.01), (0.01, 0.0001), (0.1, 0.05)])
@pytest.mark.parametrize("running", [1, 16])
def test_prompts_make_a_step_at_most_twice_as_long(step: float, each: float, running: int) -> None:
    """Whatever a step and a token of a prompt take, once both have been seen."""
    pace, left, longest = Pace(512), 2000, 0.0
    passes = 0
    while left > 0:
        read = min(pace.tokens(running), left)
        seconds = step + each * read
        pace.passed(seconds, running, read)
        passes += 1
        left -= read
        if passes > 3:
            longest = max(longest, seconds)
    assert longest <= 2 * step
    assert passes < 1.1 * 2000 / max(1, int(0.7 * step / each)) + 10


def test_prompts_are_read_at_once_where_nobody_waits() -> None:
    pace = Pace(512)
    assert pace.tokens(0) == 512
    pace.passed(1.0, 0, 512)
    assert pace.tokens(0) == 512


def test_a_running_answer_gets_a_token_in_every_pass(base: PreTrainedModel) -> None:
    """However long the prompt that is read meanwhile."""
    passes: list[int] = []

    def look(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        passes.append(inputs["input_ids"].shape[1])

    with engine_of(base, prefill=64) as engine:
        running = engine.submit(Request(prompt(5), max_tokens=400, temperature=0))
        events = iter(running)
        next(events)
        handle = base.register_forward_pre_hook(look, with_kwargs=True)
        before = engine.stats().tokens
        answer = read(engine.submit(Request(prompt(400), max_tokens=1)))
        wait_until(lambda: engine.stats().running == 1)
        given = engine.stats().tokens - before
        handle.remove()
        running.cancel()
    assert len(answer.tokens) == 1
    assert max(passes) <= 65
    assert len(passes) >= 400 / 64
    assert given >= len(passes) - 1


def test_the_last_position_alone_has_logits(base: PreTrainedModel) -> None:
    shapes: list[tuple[int, ...]] = []
    handle = base.lm_head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    with engine_of(base) as engine:
        shapes.clear()
        read(engine.submit(Request(prompt(300), max_tokens=3)))
    handle.remove()
    assert {shape[1] for shape in shapes} == {1}
