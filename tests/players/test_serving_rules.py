"""What the base's generation_config asks for: the engine obeys as `generate` does, or refuses it by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from internalrl.controller.steered import SteeredModel
from internalrl.errors import InternalRLError
from internalrl.players.engine.engine import Engine, EngineConfig
from internalrl.players.engine.requests import Request
from tests.support.answers import prompt, read
from tests.support.language import steer
from tests.support.served import byte_tokenizer, served_base

LENGTH = 24


@pytest.fixture
def model() -> SteeredModel:
    return steer(served_base(), 1, policy=True)


def greedy(model: SteeredModel, texts: list[tuple[int, ...]]) -> list[list[int]]:
    """What the engine answers to all of them together."""
    with Engine(model.base, byte_tokenizer(), EngineConfig()) as engine:
        engine.add_adapter("it", model.adapter)
        streams = [engine.submit(Request(text, "it", max_tokens=LENGTH, temperature=0, seed=3)) for text in texts]
        return [read(stream).numbers for stream in streams]


def generated(model: SteeredModel, text: tuple[int, ...]) -> list[int]:
    found = model.generate(
        torch.tensor([text]), max_new_tokens=LENGTH, do_sample=False, generator=torch.Generator().manual_seed(3)
    )
    return found[0, len(text) :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": list(range(1, 120))},
        {"begin_suppress_tokens": list(range(1, 200))},
        {"bad_words_ids": [[number] for number in range(100, 200)]},
        {"sequence_bias": [[[5], 30.0], [[5, 6], -60.0]]},
        {"forced_eos_token_id": 0},
        {"forced_bos_token_id": 7},
        {"min_new_tokens": 10, "sequence_bias": [[[0], 50.0]]},
        {"min_length": 20, "sequence_bias": [[[0], 50.0]]},
        {"exponential_decay_length_penalty": [5, 4.0]},
        {"encoder_repetition_penalty": 3.0},
        {"encoder_no_repeat_ngram_size": 1, "sequence_bias": [[[number], 9.0] for number in prompt(9, 9)]},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "suppress_tokens": [1, 2]},
    ],
    ids=lambda options: "+".join(options),
)
def test_answers_are_those_of_generate(model: SteeredModel, options: dict[str, Any]) -> None:
    texts = [prompt(length, length) for length in (1, 9, 13)]
    plain = greedy(model, texts)
    model.base.generation_config.update(**options)
    answers = greedy(model, texts)
    assert answers == [generated(model, text) for text in texts]
    if "forced_bos_token_id" not in options:  # it is of the first token of all
        assert answers != plain


@pytest.fixture
def sampling(model: SteeredModel) -> Iterator[Engine]:
    model.base.generation_config.update(do_sample=True, temperature=1e-5, top_k=3)
    with Engine(model.base, byte_tokenizer(), EngineConfig()) as engine:
        yield engine


def test_what_a_request_leaves_open_is_the_bases(sampling: Engine) -> None:
    text = prompt(8)
    stream = sampling.submit(Request(text, max_tokens=8, seed=1))
    assert (stream.request.temperature, stream.request.top_p, stream.request.top_k) == (1e-5, 1.0, 3)
    cold = read(sampling.submit(Request(text, max_tokens=8, seed=1, temperature=0)))
    warm = read(sampling.submit(Request(text, max_tokens=8, seed=1, temperature=1, top_k=0)))
    assert read(stream).numbers == cold.numbers != warm.numbers


def test_log_probabilities_are_the_bases(model: SteeredModel) -> None:
    model.base.generation_config.update(suppress_tokens=list(range(1, 120)))
    with Engine(model.base, byte_tokenizer(), EngineConfig()) as engine:
        text = prompt(8)
        [token] = read(engine.submit(Request(text, max_tokens=1, temperature=0, logprobs=0))).tokens
    with torch.no_grad():
        expected = model.base(torch.tensor([text])).logits[0, -1].log_softmax(-1)
    assert token.logprob == pytest.approx(expected[token.number].item(), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("num_beams", {"num_beams": 3}),
        ("guidance_scale", {"guidance_scale": 2.0}),
        ("stop_strings", {"stop_strings": ["x"]}),
        ("remove_invalid_values", {"remove_invalid_values": True}),
        ("min_p", {"do_sample": True, "min_p": 0.1}),
        ("typical_p", {"do_sample": True, "typical_p": 0.5}),
        ("eta_cutoff", {"do_sample": True, "eta_cutoff": 0.1}),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(model: SteeredModel, name: str, options: dict[str, Any]) -> None:
    model.base.generation_config.update(**options)
    with pytest.raises(InternalRLError, match=f"generation_config has {name} = .*remove it"):
        Engine(model.base, byte_tokenizer())
