"""What the report measures on finished models: on demonstrations, under random codes, under the policy."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from internalrl.analysis.evaluate import Episodes
from internalrl.base.batches import Batch, split, to_batch
from internalrl.base.trajectory import TrajectoryModel
from internalrl.controller.steered import SteeredModel
from internalrl.discovery.evaluate import free_play
from internalrl.discovery.objective import Episodes as Demonstrated
from internalrl.discovery.objective import action_nll
from internalrl.domains.grid.bayes import bayes_filter, expert_nll
from internalrl.domains.grid.play import entered_colors, subgoal_transitions
from internalrl.domains.grid.world import Demonstrations, GridConfig, demonstrate, pretraining_tasks
from internalrl.run.streams import Stream

NO_SUBGOAL = -1
"""In place of a subgoal's number: the segment did not begin with the two colours of one."""


@dataclass(frozen=True)
class References:
    """Action NLL on fresh demonstrations, in nats per action: of the base alone, of the best that can be known from the
    past (the exact Bayes filter, or the corpus's own probabilities), and with the goal known."""

    base: float
    bayes: float
    known: float


@dataclass(frozen=True)
class Coding:
    """The trained metacontroller on fresh demonstrations, with hard switches and mean codes.

    `subgoal` (N, T), `switch` (N, T) bool and `length` (N,) of the first `shown` ones; over all of them `nll` in
    nats per action and `kl` in nats per episode, counted where a code is adopted.
    """

    subgoal: NDArray[np.int64]
    switch: NDArray[np.bool_]
    length: NDArray[np.int64]
    nll: float
    kl: float


@dataclass(frozen=True)
class Codes:
    """M segments: the `code` (M, n_z) that was held, and the subgoal `reached` (M,), or `NO_SUBGOAL`."""

    code: NDArray[np.float32]
    reached: NDArray[np.int64]


@torch.no_grad()
def references(base: TrajectoryModel, grid: GridConfig, episodes: int, seed: int) -> References:
    """Measure the base against what can be known at all; the same demonstrations as in `coding`."""
    demonstrations = shown_demonstrations(grid, episodes, seed)
    parts = list(split(to_batch(grid, demonstrations), 128))
    nll = [action_nll(base(part.observations).logits, part.actions, part.mask).item() for part in parts]
    return References(
        base=float(np.average(nll, weights=[int(part.mask.sum()) for part in parts])),
        bayes=bayes_filter(grid, demonstrations, pretraining_tasks(grid)).mean_nll,
        known=float(expert_nll(grid, demonstrations)[demonstrations.mask].mean()),
    )


@torch.no_grad()
def coding(steered: SteeredModel, batch: Batch, shown: int = 20) -> Coding:
    """Let the metacontroller cut demonstrations into segments and code them; of texts the prompt is left out, which is
    of one length."""
    nll, kl, switches = 0.0, 0.0, []
    for part in split(batch, 128):
        demonstrated = Demonstrated.of(steered, part)
        segments, proposals = steered.metacontroller.parse(demonstrated.residual, demonstrated.slow, part.mask)
        rate = proposals.kl() * segments.switch
        logits = steered(demonstrated.residual, segments.code, demonstrated.where)
        nll += action_nll(logits, part.actions, part.mask).item() * int(part.mask.sum())
        kl += float(rate[part.mask].sum())
        switches.append(segments.switch > 0.5)
    begin = int(batch.mask[0].int().argmax())
    subgoal, mask, switch = (x[:shown, begin:] for x in (batch.subgoal, batch.mask, torch.cat(switches)))
    return Coding(
        subgoal.numpy(),
        (switch & mask).numpy(),
        mask.sum(1).numpy(),
        nll / int(batch.mask.sum()),
        kl / len(batch),
    )


def random_codes(
    steered: SteeredModel, grid: GridConfig, episodes: int, seed: int
) -> tuple[Codes, NDArray[np.float64]]:
    """Segments of free play under z ~ N(0, I), and the rates (S, S) at which subgoal b follows subgoal a."""
    play = free_play(steered, grid, episodes, seed)
    entered = entered_colors(grid, play.contents, play.positions)
    done, total = subgoal_transitions(grid, entered)
    codes = _segments(entered, play.rollout.switch.numpy(), play.rollout.code.numpy())
    return codes, done / np.maximum(total, 1)[:, None]


def policy_codes(grid: GridConfig, episodes: Episodes) -> Codes:
    """Segments of played episodes."""
    entered = entered_colors(grid, episodes.layouts.contents, episodes.positions)
    return _segments(entered, episodes.rollout.switch.numpy(), episodes.rollout.code.numpy())


def plane(codes: Codes) -> NDArray[np.float32]:
    """(n_z, 2): the plane in which the means of the codes that reach different subgoals lie furthest apart.

    Random codes are as wide in one direction as in any other, so their own principal components mean nothing:
    those of the means do.
    """
    kinds = [k for k in np.unique(codes.reached) if k != NO_SUBGOAL]
    means = np.stack([codes.code[codes.reached == k].mean(0) for k in kinds]) if kinds else codes.code[:0]
    directions = np.linalg.svd(means - means.mean(0), full_matrices=True)[2] if len(means) > 1 else None
    return np.eye(codes.code.shape[1], 2, dtype=np.float32) if directions is None else directions[:2].T


def segment_subgoal(colors: NDArray[np.integer]) -> int:
    """The subgoal that a segment entering `colors` in this order reached: the pair it begins with."""
    pair = len(colors) > 1 and colors[0] % 2 == 0 and colors[1] == colors[0] + 1
    return int(colors[0]) // 2 if pair else NO_SUBGOAL


def _segments(entered: NDArray[np.integer], switch: NDArray[np.bool_], code: NDArray[np.float32]) -> Codes:
    """The segments of N episodes; the last one of each only if it got to a subgoal before it was cut off.

    `entered` (N, ≥ T) as from `entered_colors`, `switch` (N, T), `code` (N, T, n_z).
    """
    found, reached = [], []
    for colors, opened, held in zip(entered, switch, code, strict=True):
        for begin, end in pairwise([*np.flatnonzero(opened), len(colors)]):
            inside = colors[begin + 1 : end + 1]
            subgoal = segment_subgoal(inside[inside >= 0])
            if subgoal != NO_SUBGOAL or end < len(colors):
                found.append(held[begin])
                reached.append(subgoal)
    return Codes(np.array(found, np.float32).reshape(-1, code.shape[-1]), np.array(reached, np.int64))


def shown_demonstrations(grid: GridConfig, episodes: int, seed: int) -> Demonstrations:
    """Those of the report."""
    return demonstrate(grid, episodes, pretraining_tasks(grid), Stream.REPORT.numpy(seed))
