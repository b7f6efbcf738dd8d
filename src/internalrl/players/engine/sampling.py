"""Which token next? Drawn row by row, with the row's own random numbers.

Logits of a row differ in the last digits with what else is in the batch. So that this hardly ever changes a token, it
is drawn by an exponential race, argmax p / E with E ~ Exp(1), in which the winner changes about as little as the
probabilities. Walking along their cumulative sums would add the changes up over the vocabulary. To race all tokens
takes a random number for each; so blocks of tokens race first, and then those of the winner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from internalrl.players.engine.requests import Request

COLDEST = 1e-4
"""Temperatures below are 0."""
LIKELY = 256
"""Tokens among which a nucleus is looked for at first."""


@dataclass(frozen=True)
class Drawn:
    """Of B rows: token `numbers`, their `logprobs` in nats before temperature, top_p and top_k, and the `tops`."""

    numbers: list[int]
    logprobs: list[float]
    tops: list[tuple[tuple[int, float], ...]]


class Chance:
    """The random numbers of a row; those of a token are the same until it is drawn, however often that is tried."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._next: Tensor | None = None

    def next(self, count: int) -> Tensor:
        """(count,) uniform numbers for the next token."""
        if self._next is None:
            self._next = torch.rand(count, generator=self._generator, dtype=torch.double)
        return self._next

    def drawn(self) -> None:
        """The token was drawn."""
        self._next = None


class Sampler:
    """Draws a token for each of B rows.

    Args:
        requests: say how.
        chances: one per row.
    """

    def __init__(self, requests: Sequence[Request], chances: Sequence[Chance], device: torch.device):
        wanted = [1.0 if request.temperature is None else request.temperature for request in requests]
        warm = [row for row, temperature in enumerate(wanted) if temperature >= COLDEST]
        temperatures = [temperature if temperature >= COLDEST else 1.0 for temperature in wanted]
        self.rows, self.device = len(requests), device
        self.chances = {row: chances[row] for row in warm}
        self.greedy = torch.tensor([temperature < COLDEST for temperature in wanted], device=device)
        self.temperature = None
        if any(temperature != 1 for temperature in temperatures):
            self.temperature = torch.tensor(temperatures, device=device)[:, None]
        top_p = [1.0 if request.top_p is None else request.top_p for request in requests]
        top_k = [request.top_k or 0 for request in requests]
        self.cut = [row for row in warm if top_p[row] < 1 or top_k[row] > 0]
        self.top_p = torch.tensor([top_p[row] for row in self.cut], dtype=torch.double, device=device)
        self.top_k = torch.tensor([top_k[row] for row in self.cut], device=device)
        self.told = {row: request.logprobs for row, request in enumerate(requests) if request.logprobs}

    def __call__(self, logits: Tensor, ruled: Tensor | None = None) -> Drawn:
        """Draw from `logits` (B, V), or from what rules made of them, `ruled`; log-probabilities are of the former.

        A row that holds anything but finite numbers gets a logprob that is none.
        """
        shifted, weights = _shifted(logits.float())
        log_total = weights.sum(-1).log()
        chosen, likely = (shifted, weights) if ruled is None else _shifted(ruled)
        numbers = chosen.argmax(-1)
        if self.chances:
            numbers = torch.where(self.greedy, numbers, self._race(self._weights(chosen, likely)))
        logprobs = shifted.gather(1, numbers[:, None]).squeeze(1) - log_total
        drawn = Drawn(numbers.tolist(), logprobs.tolist(), self._tops(shifted, log_total))
        for chance in self.chances.values():
            chance.drawn()
        return drawn

    def _weights(self, shifted: Tensor, weights: Tensor) -> Tensor:
        """(B, V), in proportion to which tokens are drawn."""
        if self.temperature is not None:
            weights = (shifted / self.temperature).exp()
        if self.cut:
            weights = weights.index_copy(
                0, torch.tensor(self.cut, device=self.device), nucleus(weights[self.cut], self.top_k, self.top_p)
            )
        return weights

    def _race(self, weights: Tensor) -> Tensor:
        """(B,) tokens drawn in proportion to `weights` (B, V)."""
        rows, vocabulary = weights.shape
        size = math.isqrt(vocabulary - 1) + 1  # of a block
        blocks = -(-vocabulary // size)
        cold = torch.full((blocks + size,), 0.5, dtype=torch.double)
        uniform = torch.stack(
            [self.chances[row].next(blocks + size) if row in self.chances else cold for row in range(rows)]
        )
        exponential = -uniform.log().to(self.device)
        blocked = F.pad(weights, (0, blocks * size - vocabulary)).view(rows, blocks, size)
        block = (blocked.sum(-1) / exponential[:, :blocks]).argmax(-1)
        inside = blocked[torch.arange(rows, device=self.device), block]
        token = block * size + (inside / exponential[:, blocks:]).argmax(-1)
        return token.clamp(max=vocabulary - 1)  # where weights are no numbers, anything may win

    def _tops(self, shifted: Tensor, log_total: Tensor) -> list[tuple[tuple[int, float], ...]]:
        tops: list[tuple[tuple[int, float], ...]] = [()] * self.rows
        for row, count in self.told.items():
            values, numbers = shifted[row].topk(min(count, shifted.shape[1]))
            tops[row] = tuple(zip(numbers.tolist(), (values - log_total[row]).tolist(), strict=True))
        return tops


def _shifted(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits whose maximum is 0, and their exponentials."""
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted, shifted.exp()


def nucleus(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """`weights` (B, V) with zeros outside the `top_k` (B,) largest, of which those stay that make up `top_p` (B,).

    A top_k of 0 is all. The token that completes top_p stays.
    """
    vocabulary = weights.shape[1]
    count = min(vocabulary, max(LIKELY, int(top_k.max())))
    while True:
        values, tokens = weights.topk(count)
        exact = values.double()
        exact = exact * ((torch.arange(count, device=weights.device) < top_k[:, None]) | (top_k == 0)[:, None])
        total = torch.where(top_k > 0, exact.sum(-1), weights.sum(-1, dtype=torch.double))
        before = exact.cumsum(-1) - exact
        enough = (top_k > 0) | (exact.sum(-1) >= top_p * total)
        if count == vocabulary or enough.all():
            break
        count = min(vocabulary, 8 * count)
    kept = exact * (before < (top_p * total)[:, None])
    return torch.zeros_like(weights).scatter(1, tokens, kept.to(weights))
