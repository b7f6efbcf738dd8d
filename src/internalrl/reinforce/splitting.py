"""How often random codes write a text that they hardly ever write: multilevel splitting.

A text is divided into parts, each of which may be written in several ways. N texts are begun under codes from N(0, I);
those that wrote the first part are continued N times in all, with new codes and new tokens, those that wrote the second
part again, and so on. The product of the shares that got through is an unbiased estimate of the whole text's
probability, of which no sampled text need be an example.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internalrl.controller.steered import SteeredModel
from internalrl.players.stepwise import Rollout, rollout
from internalrl.reinforce.completions import Horizon

Tokens = tuple[int, ...]


def write_chances(
    steered: SteeredModel,
    prompt: Sequence[int],
    parts: Sequence[Collection[Tokens]],
    last: Tokens,
    count: int,
    generator: torch.Generator,
    temperature: float = 0.0,
) -> list[float]:
    """Estimates of the probability that `prompt` is followed by the first k of `parts` and then by `last`, for each k.

    Args:
        parts: in how many ways each part can be written, as tokens; no way may begin another one, or `last`.
        last: what every text ends with.
        count: N, how many texts are continued at a time.
        temperature: of the tokens; 0 is greedy. Codes are those of the prior.

    Returns:
        One number for each of `parts`; estimates for several k come from the same texts.
    """
    n_z = steered.metacontroller.config.n_z
    written, codes = np.zeros((count, 0), np.int64), torch.zeros(count, 0, n_z)
    found: list[float] = []
    reached = 1.0
    for number in range(len(parts) + 1):
        ways = dict.fromkeys(parts[number], 0) if number < len(parts) else {}
        environment = Continuations(prompt, written, {**ways, last: 1})
        result = rollout(steered, environment, Recalled(codes, generator), temperature, generator=generator)
        if number:
            found.append(reached * float((environment.outcome == 1).mean()))
        through = np.flatnonzero(environment.outcome == 0)
        reached *= len(through) / count
        if not len(through):
            return found + [0.0] * (len(parts) - len(found))
        # every one continued equally often, up to one time; which of them once more is left to chance
        rows = through[torch.randperm(count, generator=generator).numpy() % len(through)]
        written = environment.written[rows]
        written = written[:, : (written >= 0).sum(1).max()]
        codes = _adopted(result)[torch.from_numpy(rows)]
    return found


def _adopted(result: Rollout) -> Tensor:
    """(N, S, n_z): the codes of each text's segments, NaN beyond them."""
    fired = result.switch & result.mask
    row, step = fired.nonzero(as_tuple=True)
    codes = result.code.new_full((len(fired), int(fired.sum(1).max()), result.code.shape[-1]), torch.nan)
    codes[row, fired.cumsum(1)[row, step] - 1] = result.code[row, step]
    return codes


class Continuations:
    """N texts that begin as others did, and go on for as long as they can still become one of `wanted`.

    An environment for `rollout`. What is chosen where a text is given is ignored.

    Args:
        prompt: tokens before all of them.
        written (N, T): tokens that each begins with, −1 beyond its length.
        wanted: what may follow -> a number to call it by, none the beginning of another.

    Attributes:
        written (N, T'): with what was added, −1 beyond.
        outcome (N,): the number of what followed, −1 where it was something else.
    """

    given = None  # codes are adopted where texts are given, too

    def __init__(self, prompt: Sequence[int], written: NDArray[np.int64], wanted: dict[Tokens, int]):
        count, room = len(written), max(map(len, wanted))
        self.wanted = wanted
        self.beginnings = {tokens[:length] for tokens in wanted for length in range(1, len(tokens))}
        self.begun = (written >= 0).sum(1)
        self.config = Horizon(written.shape[1] + room)
        self.written = np.concatenate([written, np.full((count, room), -1)], 1)
        self.outcome = np.full(count, -1)
        self.rows, self.time = np.arange(count), 0
        self.alive = np.ones(count, bool)
        self.tokens = np.tile(np.array(prompt, np.int64), (count, 1))

    def __len__(self) -> int:
        return len(self.rows)

    def observe(self) -> NDArray[np.int64]:
        """The prompt, and later the last token of each text (N, 1)."""
        return self.tokens

    def step(self, actions: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
        """Append to each text its own next token, or where it is free the one chosen; nothing is rewarded."""
        free = self.begun[self.rows] <= self.time
        tokens = np.where(free, actions, self.written[self.rows, self.time])
        for place in np.flatnonzero(free & self.alive):
            row = self.rows[place]
            self.written[row, self.time] = tokens[place]
            added = tuple(self.written[row, self.begun[row] : self.time + 1].tolist())
            self.outcome[row] = self.wanted.get(added, -1)
            self.alive[place] = added in self.beginnings
        self.tokens, self.time = tokens[:, None], self.time + 1
        return np.zeros(len(self), np.float32), ~self.alive, np.zeros(len(self), bool)

    def select(self, rows: NDArray[np.int64]) -> Continuations:
        """The texts numbered `rows`; what is written and becomes of them is known to all."""
        kept = copy.copy(self)
        kept.rows, kept.alive, kept.tokens = self.rows[rows], self.alive[rows], self.tokens[rows]
        return kept


class Recalled:
    """Proposes the codes that a text was begun with, segment by segment, and then new ones from N(0, I).

    Args:
        codes: (N, S, n_z), NaN beyond the segments of each text.
    """

    def __init__(self, codes: Tensor, generator: torch.Generator):
        self.codes, self.generator = codes, generator
        self.known = (~codes.isnan().any(-1)).sum(1)
        self.segment = torch.zeros(len(codes), dtype=torch.long)

    def __call__(self, rows: Tensor, x: Tensor) -> Tensor:
        new = torch.randn(len(rows), self.codes.shape[-1], generator=self.generator)
        segment, old = self.segment[rows], self.segment[rows] < self.known[rows]
        new[old] = self.codes[rows[old], segment[old]]
        self.segment[rows] += 1
        return new
