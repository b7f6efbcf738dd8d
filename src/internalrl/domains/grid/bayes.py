"""Exact references for the grid world: what an observer of the demonstrations can know, in nats per action.

The demonstrator is a uniform mixture over known tasks. The filter follows every task hypothesis through an
episode, so it gives the exact p(a_t | o_≤t), the lowest loss any base model can reach (method.md, stage 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from internalrl.domains.grid.layouts import ACTIONS, shortest_path_moves
from internalrl.domains.grid.world import Demonstrations, GridConfig, task_table


@dataclass(frozen=True)
class BayesFilter:
    """What the observations up to each step tell. Padding steps hold zeros."""

    nll: NDArray[np.float32]
    """(N, T): −log p(a_t | o_≤t) of the demonstrated action, in nats."""
    probs: NDArray[np.float32]
    """(N, T, 4): p(a_t | o_≤t)."""
    task_posterior: NDArray[np.float32]
    """(N, T, K): p(task | o_≤t)."""
    subgoal_posterior: NDArray[np.float32]
    """(N, T, S): p(current subgoal | o_≤t), subgoal = pair of colours, as in `Demonstrations.subgoal`."""
    subgoal_accuracy: float
    """How often the most probable subgoal is the true one, over all steps."""
    mean_nll: float
    """Mean of `nll` over all steps."""


def expert_probabilities(
    boards: NDArray[np.uint64], positions: NDArray[np.integer], noise: float
) -> NDArray[np.float32]:
    """(N, colors, 4): how the expert of `demonstrate` moves at (N,) positions, for each colour it may seek.

    `boards` is the result of `shortest_path_moves`, (N, colors, 4).
    """
    moves = ((boards >> positions.astype(np.uint64)[:, None, None]) & np.uint64(1)).astype(np.float32)
    count = moves.sum(-1, keepdims=True)
    expert = np.where(count > 0, moves / np.maximum(count, 1), np.float32(1 / ACTIONS))
    return expert * np.float32(1 - noise) + np.float32(noise / ACTIONS)


def expert_nll(config: GridConfig, demonstrations: Demonstrations, noise: float = 0.0) -> NDArray[np.float32]:
    """(N, T): −log p(a_t) where the sought colour is known, in nats; zeros in the padding."""
    boards = shortest_path_moves(config, demonstrations.layouts.contents)
    rows = np.arange(len(demonstrations))
    nll = np.zeros(demonstrations.actions.shape, np.float32)
    for t, (sought, position, action) in enumerate(
        zip(demonstrations.sought.T, demonstrations.positions.T, demonstrations.actions.T, strict=True)
    ):
        nll[:, t] = -np.log(expert_probabilities(boards, position, noise)[rows, sought, action])
    return nll * demonstrations.mask


def bayes_filter(
    config: GridConfig,
    demonstrations: Demonstrations,
    tasks: Sequence[Sequence[int]],
    noise: float = 0.0,
) -> BayesFilter:
    """The exact posterior over `tasks` (uniform prior) along each demonstration, and its predictions.

    A hypothesis dies when it gives a played move probability 0, or when under it the episode would have
    ended. `noise` is the ε that the demonstrations were made with. ValueError if an episode is impossible
    under all tasks.
    """
    table = task_table(tasks)
    ends = (table >= 0).sum(1)
    contents, mask = demonstrations.layouts.contents, demonstrations.mask
    boards = shortest_path_moves(config, contents)
    count, steps = demonstrations.actions.shape
    rows, hypotheses = np.arange(count), np.arange(len(table))
    subgoals = np.eye((config.colors + 1) // 2, dtype=np.float32)

    weight = np.full((count, len(table)), 1 / len(table))
    progress = np.zeros((count, len(table)), np.int64)
    probs = np.zeros((count, steps, ACTIONS), np.float32)
    task_posterior = np.zeros((count, steps, len(table)), np.float32)
    subgoal_posterior = np.zeros((count, steps, len(subgoals)), np.float32)
    for t in range(steps):
        sought = table[hypotheses, np.minimum(progress, ends - 1)]
        moves = expert_probabilities(boards, demonstrations.positions[:, t], noise)
        likelihood = moves[rows[:, None], sought]  # (N, K, 4)
        task_posterior[:, t] = weight
        subgoal_posterior[:, t] = np.einsum("nk,nks->ns", weight, subgoals[sought // 2])
        probs[:, t] = np.einsum("nk,nka->na", weight, likelihood)
        if t + 1 == steps:
            break
        cell, previous = demonstrations.positions[:, t + 1], demonstrations.positions[:, t]
        content = contents[rows, cell]
        entered = ((content < config.colors) & (cell != previous))[:, None]
        correct = entered & (content[:, None] == sought)
        progress += correct
        going_on = (~entered | correct) & (progress < ends)
        weight = weight * likelihood[rows, :, demonstrations.actions[:, t]] * going_on
        total = weight.sum(1, keepdims=True)
        if np.any(mask[:, t + 1] & (total[:, 0] == 0)):
            raise ValueError(
                f"step {t + 1} of an episode is impossible under all {len(table)} tasks with noise {noise}; "
                "pass the tasks and the noise that the demonstrations were made with."
            )
        weight = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)

    for values in (probs, task_posterior, subgoal_posterior):
        values *= mask[:, :, None]
    chosen = np.take_along_axis(probs, demonstrations.actions[..., None].astype(np.int64), axis=2)[..., 0]
    nll = -np.log(np.where(mask, chosen, 1))
    hits = subgoal_posterior.argmax(-1) == demonstrations.subgoal
    return BayesFilter(
        nll=nll,
        probs=probs,
        task_posterior=task_posterior,
        subgoal_posterior=subgoal_posterior,
        subgoal_accuracy=float(hits[mask].mean()),
        mean_nll=float(nll[mask].mean()),
    )
