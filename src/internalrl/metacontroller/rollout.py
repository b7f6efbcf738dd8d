"""Batched steered rollouts: many episodes in step, one base forward per step, finished rows dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from internalrl.metacontroller.codes import Propose
from internalrl.metacontroller.steered import SteeredModel


class BatchEnvironment(Protocol):
    """What a rollout needs of an environment: N episodes at once, as `domains.grid.GridBatch` has them."""

    config: Any

    @property
    def alive(self) -> np.ndarray: ...

    def __len__(self) -> int: ...
    def observe(self) -> np.ndarray: ...
    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...
    def select(self, rows: np.ndarray) -> BatchEnvironment: ...


@dataclass
class Rollout:
    """N episodes of up to T steps; entries at steps ≥ length are zero.

    reward (N,), length (N,), actions (N, T), logits (N, T, A), switch (N, T) bool, switch_logit (N, T),
    code (N, T, n_z).
    """

    reward: Tensor
    length: Tensor
    actions: Tensor
    logits: Tensor
    switch: Tensor
    switch_logit: Tensor
    code: Tensor

    @property
    def mask(self) -> Tensor:
        """(N, T): True at steps that were taken."""
        return torch.arange(self.actions.shape[1]) < self.length[:, None]


def prior(n_z: int, generator: torch.Generator | None = None) -> Propose:
    """Codes from N(0, I)."""
    return lambda rows, x: torch.randn(len(rows), n_z, generator=generator)


def rollout(
    steered: SteeredModel,
    environment: BatchEnvironment,
    propose: Propose,
    temperature: float = 0.0,
    forget: bool = False,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Play every episode of `environment` to its end.

    Args:
        propose: asked for codes at the switches of running episodes, with row numbers of the whole batch.
        temperature: of the base model's actions; 0 is greedy.
        forget: every segment starts with an empty context (the teacher of consolidation).
    """
    count, horizon = len(environment), environment.config.horizon
    decoding = steered.start(count, forget)
    rows = torch.arange(count)
    reward, length = torch.zeros(count), torch.zeros(count, dtype=torch.long)
    record: dict[str, Tensor] = {}

    def write(t: int, **values: Tensor) -> None:
        for name, value in values.items():
            if name not in record:
                record[name] = value.new_zeros(count, horizon, *value.shape[1:])
            record[name][rows, t] = value

    def propose_alive(switched: Tensor, x: Tensor) -> Tensor:
        """Episodes that have ended, but were not dropped yet, make no decisions."""
        code, deciding = x.new_zeros(len(x), steered.metacontroller.config.n_z), alive[switched]
        if deciding.any():
            code[deciding] = propose(rows[switched[deciding]], x[deciding])
        return code

    for t in range(horizon):
        alive = torch.from_numpy(environment.alive.copy())
        step = steered.step(torch.from_numpy(environment.observe()), decoding, propose_alive)
        actions = choose(step.logits, temperature, generator)
        write(
            t,
            actions=actions,
            logits=step.logits,
            switch=step.switch,
            switch_logit=step.switch_logit,
            code=step.code,
        )
        gained, _, _ = environment.step(actions.numpy())
        reward[rows] += torch.from_numpy(gained)
        length[rows] += alive
        left = environment.alive
        if not left.any():
            break
        if left.mean() < 0.85:  # dropping rows copies the cache: do it now and then
            keep = np.flatnonzero(left)
            environment = environment.select(keep)
            decoding.select(torch.from_numpy(keep))
            rows = rows[keep]
    longest = int(length.max())
    mask = torch.arange(longest) < length[:, None]
    cut = {k: v[:, :longest] * mask.reshape(*mask.shape, *[1] * (v.ndim - 2)) for k, v in record.items()}
    return Rollout(reward, length, **cut)


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Actions (B,) from logits (B, A): the best one at temperature 0, else a sample."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator).squeeze(-1)
