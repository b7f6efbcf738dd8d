"""Batched steered rollouts: many episodes in step, one base forward per step, finished rows dropped."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from internalrl.controller.choosers import Propose, RowNoise, row_seeds
from internalrl.controller.steered import SteeredModel


class BatchEnvironment(Protocol):
    """What a rollout needs of an environment: N episodes at once, as `domains.grid.GridBatch` has them.

    `config.horizon` is the most steps of an episode. What `observe` returns is what `SteeredModel.step` takes.
    """

    config: Any

    @property
    def alive(self) -> np.ndarray: ...

    @property
    def given(self) -> np.ndarray | None:
        """(N,) bool, rows whose next action is the environment's own, as the text of a tool is; None if no row's is."""

    def __len__(self) -> int: ...
    def observe(self) -> np.ndarray: ...
    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...
    def select(self, rows: np.ndarray) -> BatchEnvironment: ...


@dataclass
class Rollout:
    """N episodes of up to T steps; entries at steps ≥ length are zero.

    reward (N,), length (N,), actions (N, T), given (N, T) bool, actions that the environment chose itself, logits
    (N, T, A), switch (N, T) bool, switch_logit (N, T), code (N, T, n_z). Of texts, whose vocabularies are large, no
    logits are kept: A = 0.
    """

    reward: Tensor
    length: Tensor
    actions: Tensor
    given: Tensor
    logits: Tensor
    switch: Tensor
    switch_logit: Tensor
    code: Tensor

    @property
    def mask(self) -> Tensor:
        """(N, T): True at steps that were taken."""
        return torch.arange(self.actions.shape[1]) < self.length[:, None]

    @classmethod
    def join(cls, parts: Sequence[Rollout]) -> Rollout:
        """Parts of a batch, one after the other."""
        return cls(**{name: stack_padded([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def stack_padded(parts: Sequence[Tensor]) -> Tensor:
    """(N_i, T_i, …) or (N_i,) one after the other, with zeros after those that are shorter than the longest."""
    if parts[0].ndim == 1:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (*[0, 0] * (part.ndim - 2), 0, longest - part.shape[1])) for part in parts])


@dataclass
class RowChance:
    """Random numbers that a row has to itself: whatever else is in the batch, it plays the same.

    codes: vectors for its segments; uniform (N, T): numbers in [0, 1) that decide its actions.
    """

    codes: RowNoise
    uniform: Tensor

    @classmethod
    def draw(cls, generator: torch.Generator, rows: range, count: int, horizon: int, n_z: int) -> RowChance:
        """Those of `rows` in a batch of `count`: the same, whichever of the others are wanted."""
        seeds = row_seeds(generator, 1, count)
        uniform = torch.rand(count, horizon, generator=generator)
        return cls(RowNoise([seeds[row] for row in rows], n_z, torch.zeros(0)), uniform[rows.start : rows.stop])

    def select(self, rows: np.ndarray) -> RowChance:
        """Those of `rows` alone."""
        codes = copy.copy(self.codes)
        codes.select(rows.tolist())
        return RowChance(codes, self.uniform[rows])


def prior(n_z: int, generator: torch.Generator | None = None) -> Propose:
    """Codes from N(0, I)."""
    return lambda rows, x: torch.randn(len(rows), n_z, generator=generator)


def rollout(
    steered: SteeredModel,
    environment: BatchEnvironment,
    propose: Propose,
    temperature: float = 0.0,
    forget: bool = False,
    generator: torch.Generator | RowChance | None = None,
) -> Rollout:
    """Play every episode of `environment` to its end.

    Args:
        propose: asked for codes at the switches of running episodes, with row numbers of the whole batch.
        temperature: of the base model's actions; 0 is greedy.
        forget: every segment starts with an empty context (the teacher of consolidation).
        generator: decides the actions at temperatures above 0.
    """
    count, horizon = len(environment), environment.config.horizon
    decoding = steered.start(count, forget)
    rows = torch.arange(count)
    reward, length = torch.zeros(count), torch.zeros(count, dtype=torch.long)
    record: dict[str, Tensor] = {}
    writes = steered.base.main_input_name == "input_ids"

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
        given = None if environment.given is None else torch.from_numpy(environment.given)
        step = steered.step(torch.from_numpy(environment.observe()), decoding, propose_alive, given)
        if isinstance(generator, RowChance):
            actions = choose(step.logits, temperature, uniform=generator.uniform[rows, t])
        else:
            actions = choose(step.logits, temperature, generator)
        gained, _, _ = environment.step(actions.numpy())
        if given is not None:
            actions = torch.where(given, torch.from_numpy(environment.observe()[:, -1]), actions)
        write(
            t,
            actions=actions,
            given=torch.zeros_like(alive) if given is None else given,
            logits=step.logits[:, :0] if writes else step.logits,
            switch=step.switch,
            switch_logit=step.switch_logit,
            code=step.code,
        )
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


def choose(
    logits: Tensor, temperature: float, generator: torch.Generator | None = None, uniform: Tensor | None = None
) -> Tensor:
    """Actions (B,) from logits (B, A): the best one at temperature 0, else a sample.

    Args:
        uniform: (B,) numbers in [0, 1) that decide, in place of `generator`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if uniform is None:
        return torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator).squeeze(-1)
    reached = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    return (reached <= (uniform[:, None] * reached[:, -1:])).sum(-1)
