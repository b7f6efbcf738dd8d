"""Texts as episodes: a step is a token, and an episode ends with the end of text."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from internalrl.players.stepwise import BatchEnvironment


@dataclass(frozen=True)
class Horizon:
    """The most tokens that a completion may have."""

    horizon: int


class Completions(BatchEnvironment):
    """N texts that are being written after their prompts; nothing is judged before all are.

    Args:
        prompts: (N, P) tokens, −1 where they are padded, on the left; see `pad_prompts`.
        ends: tokens that end a text.
        horizon: the most tokens of a completion.
        numbers: (N,), which prompt of a dataset each is.
    """

    def __init__(
        self, prompts: NDArray[np.int64], ends: Collection[int], horizon: int, numbers: NDArray[np.int64] | None = None
    ):
        self.prompts, self.ends = prompts, np.array(sorted(ends))
        self.numbers = np.arange(len(prompts)) if numbers is None else numbers
        self.config = Horizon(horizon)
        self.tokens = prompts  # what the model has not read yet
        self._alive = np.ones(len(prompts), bool)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def alive(self) -> NDArray[np.bool_]:
        """(N,): texts that have not ended."""
        return self._alive

    @property
    def given(self) -> NDArray[np.bool_] | None:
        """None: every token is the model's own."""
        return None

    def observe(self) -> NDArray[np.int64]:
        """The prompts (N, P), and later the last token of each text (N, 1)."""
        return self.tokens

    def step(self, actions: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
        """Append a token (N,) to every text; no reward, which texts have ended, and False: nothing is cut short."""
        self._alive = self._alive & ~np.isin(actions, self.ends)
        self.tokens = actions[:, None]
        return np.zeros(len(self), np.float32), ~self._alive, np.zeros(len(self), bool)

    def select(self, rows: NDArray[np.int64]) -> Self:
        """The texts numbered `rows`, as far as they are."""
        kept = copy.copy(self)
        kept.prompts, kept.numbers = self.prompts[rows], self.numbers[rows]
        kept.tokens, kept._alive = self.tokens[rows], self._alive[rows]
        return kept


def pad_prompts(prompts: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Prompts as (N, P) tokens, −1 on the left where one is shorter than the longest."""
    padded = np.full((len(prompts), max(map(len, prompts))), -1)
    for row, prompt in zip(padded, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    return padded
