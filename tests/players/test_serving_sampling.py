"""Tokens are drawn from the distribution that was asked for, by each row's own numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from internalrl.players.engine.requests import Request
from internalrl.players.engine.sampling import Chance, Sampler, nucleus

VOCABULARY = 11


def request(**options: float) -> Request:
    return Request((1,), **options)  # type: ignore[arg-type]


def sampler(*requests: Request) -> Sampler:
    chances = [Chance(row) for row in range(len(requests))]
    return Sampler(requests, chances, torch.device("cpu"))


def logits(rows: int, vocabulary: int = VOCABULARY, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 1.7, "top_k": 6, "top_p": 0.8}]
)
def test_frequencies_are_those_of_transformers_warpers(options: dict[str, float]) -> None:
    scores = logits(1)
    expected = TemperatureLogitsWarper(options.get("temperature", 1.0))(None, scores)
    if "top_k" in options:
        expected = TopKLogitsWarper(int(options["top_k"]))(None, expected)
    expected = TopPLogitsWarper(options.get("top_p", 1.0))(None, expected).softmax(-1)[0]
    rows = 6_000
    drawn = torch.tensor(sampler(*[request(**options)] * rows)(scores.expand(rows, -1)).numbers)
    found = torch.bincount(drawn, minlength=VOCABULARY) / rows
    assert_close(found, expected, atol=0.025, rtol=0)
    assert not found[expected == 0].any()


def test_logprobs_are_those_of_the_model_whatever_the_temperature() -> None:
    scores = logits(3)
    drawn = sampler(request(temperature=0), request(temperature=3), request(top_k=2, logprobs=4))(scores)
    expected = scores.log_softmax(-1)
    assert drawn.numbers[0] == int(scores[0].argmax())
    assert_close(torch.tensor(drawn.logprobs), expected[range(3), drawn.numbers])
    best = expected[2].topk(4)
    assert [number for number, _ in drawn.tops[2]] == best.indices.tolist()
    assert_close(torch.tensor([logprob for _, logprob in drawn.tops[2]]), best.values)
    assert drawn.tops[:2] == [(), ()]


def test_a_row_draws_the_same_whatever_the_others_do() -> None:
    scores = logits(3, 301)
    mine = request(temperature=0.9, top_p=0.95)
    alone = Sampler([mine], [Chance(7)], torch.device("cpu"))
    others = [request(temperature=0), mine, request(top_k=4)]
    together = Sampler(others, [Chance(seed) for seed in (1, 7, 3)], torch.device("cpu"))
    for step in range(50):
        scores = logits(3, 301, step)
        assert alone(scores[1:2]).numbers[0] == together(scores).numbers[1]


def test_differences_in_the_last_digits_hardly_ever_change_a_token() -> None:
    """Of 1,000 tokens from a flat distribution over 20,000."""
    rows, changed = 50, 0
    noise = torch.Generator().manual_seed(1)
    for _ in range(20):
        scores = 0.5 * torch.randn(rows, 20_000, generator=noise)
        other = scores * (1 + 2e-7 * torch.randn(scores.shape, generator=noise))
        one, two = sampler(*[request()] * rows), sampler(*[request()] * rows)
        changed += sum(a != b for a, b in zip(one(scores).numbers, two(other).numbers, strict=True))
    assert changed <= 1


def test_a_wide_nucleus_is_found_beyond_the_likeliest() -> None:
    """Of 5,000 tokens, all alike but one."""
    weights = torch.ones(2, 5000)
    weights[:, 17] = 2
    kept = (nucleus(weights, torch.tensor([0, 0]), torch.tensor([0.5, 0.9]).double()) > 0).sum(-1)
    assert kept.tolist() == pytest.approx([2500, 4500], abs=1)


def test_output_that_is_not_finite_is_told_and_stays_in_its_row() -> None:
    scores = logits(2)
    alone = sampler(request(temperature=0))(scores[:1])
    scores[1] = float("nan")
    drawn = sampler(request(temperature=0), request())(scores)
    assert drawn.numbers[0] == alone.numbers[0]
    assert drawn.logprobs[1] != drawn.logprobs[1]
    assert 0 <= drawn.numbers[1] < VOCABULARY
