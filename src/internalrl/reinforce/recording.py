"""An environment that remembers what it showed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from internalrl.players.stepwise import BatchEnvironment


class Recording:
    """Wraps a batch environment and keeps every observation under its episode's first row number."""

    def __init__(self, environment: BatchEnvironment):
        self.environment, self.config = environment, environment.config
        self.rows = np.arange(len(environment))
        self.shown: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self.environment)

    @property
    def alive(self) -> np.ndarray:
        return self.environment.alive

    @property
    def given(self) -> np.ndarray | None:
        return self.environment.given

    def observe(self) -> np.ndarray:
        observation = self.environment.observe()
        self.shown.append((self.rows, observation))
        return observation

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.environment.step(actions)

    def select(self, rows: np.ndarray) -> Recording:
        kept = Recording(self.environment.select(rows))
        kept.rows, kept.shown = self.rows[rows], self.shown
        return kept

    def observations(self, length: int) -> Tensor:
        """(N, length, observation_size): all episodes, zero where one had ended."""
        first = self.shown[0][1]
        table = np.zeros((len(first), length, *first.shape[1:]), first.dtype)
        for t, (rows, observation) in enumerate(self.shown[:length]):
            table[rows, t] = observation
        return torch.from_numpy(table)
