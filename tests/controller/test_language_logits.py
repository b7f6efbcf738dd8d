"""Whoever needs the last logits alone pays for these: no path makes torch copy the base's head."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from internalrl.controller.steered import SteeredModel
from internalrl.players.engine.engine import Engine, EngineConfig
from internalrl.players.engine.requests import Request
from tests.support.language import prompts, steered_language_model
from tests.support.served import byte_tokenizer

ROWS, LENGTH, VOCABULARY = 32, 9, 30_000

Play = Callable[[SteeredModel, torch.Tensor], None]


def generate(steered: SteeredModel, tokens: torch.Tensor) -> None:
    steered.generate(tokens, max_new_tokens=2, do_sample=False)


def step(steered: SteeredModel, tokens: torch.Tensor) -> None:
    decoding = steered.start(len(tokens))
    codes = torch.zeros(len(tokens), steered.metacontroller.config.n_z)
    for new in (tokens, tokens[:, -1:]):
        steered.step(new, decoding, lambda rows, _: codes[rows])


@contextmanager
def watched(steered: SteeredModel) -> Iterator[list[tuple[torch.Tensor, float]]]:
    """What the base's head reads, and the seconds that it takes."""
    found: list[tuple[torch.Tensor, float]] = []
    began = 0.0

    def before(*_: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def after(_: Any, inputs: tuple[torch.Tensor, ...], __: Any) -> None:
        found.append((inputs[0], time.perf_counter() - began))

    head = steered.base.get_output_embeddings()
    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def wide(kind: str = "llama") -> SteeredModel:
    """In bfloat16, with a large vocabulary."""
    steered = steered_language_model(kind)
    steered.base.resize_token_embeddings(VOCABULARY)
    steered.base.to(torch.bfloat16)
    return steered


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "qwen2"])
@pytest.mark.parametrize("play", [generate, step])
def test_the_head_reads_one_position_of_each_row_and_lies_together(kind: str, play: Play) -> None:
    steered = wide(kind)
    with watched(steered) as found:
        play(steered, prompts(ROWS, LENGTH))
    assert len(found) == 2
    assert all(read.shape[1] == 1 and read.is_contiguous() for read, _ in found)


@pytest.mark.parametrize("play", [generate, step])
def test_the_head_takes_no_longer_at_the_end_of_prompts_than_later(play: Play) -> None:
    """It took a hundred times as long: the head was copied for every row."""
    steered = wide()
    with watched(steered) as found:
        for _ in range(3):
            play(steered, prompts(ROWS, LENGTH))
    prompt, later = (min(seconds for _, seconds in found[at::2]) for at in (0, 1))
    assert prompt < 10 * later


def test_the_engine_reads_every_prompts_end_together() -> None:
    steered, tokenizer = steered_language_model(), byte_tokenizer()
    tokenizer.eos_token = None
    with Engine(steered.base, tokenizer, EngineConfig()) as engine, watched(steered) as found:
        streams = [engine.submit(Request(tuple(row), max_tokens=3)) for row in prompts(ROWS, LENGTH).tolist()]
        for stream in streams:
            list(stream)
    assert found
    assert all(read.shape[1] <= ROWS and read.is_contiguous() for read, _ in found)
