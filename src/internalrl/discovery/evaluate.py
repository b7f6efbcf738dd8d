"""What discovery found, held against the hidden truth: alignment of the switch, and what random codes can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internalrl.base.batches import Batch
from internalrl.controller.steered import SteeredModel
from internalrl.discovery.objective import Episodes, action_nll, opening
from internalrl.domains.grid.play import FreePlay, entered_colors, subgoal_transitions
from internalrl.domains.grid.world import GridConfig, sample_layouts
from internalrl.players.stepwise import Rollout, prior, rollout
from internalrl.run.streams import Stream


def boundary_f1(predicted: Tensor, true: Tensor, mask: Tensor, tolerance: int = 1) -> float:
    """F1 of predicted against true boundaries, (B, T) bool each; a boundary counts if one of the other is within
    `tolerance` steps. The first real step is no boundary: it always opens a segment."""
    chosen = mask & ~opening(mask)
    predicted, true = predicted & chosen, true & chosen
    precision = (predicted & _near(true, tolerance)).sum() / predicted.sum().clamp(min=1)
    recall = (true & _near(predicted, tolerance)).sum() / true.sum().clamp(min=1)
    return float(2 * precision * recall / (precision + recall).clamp(min=1e-9))


def _near(events: Tensor, tolerance: int) -> Tensor:
    near = events.clone()
    for shift in range(1, tolerance + 1):
        near[:, shift:] |= events[:, :-shift]
        near[:, :-shift] |= events[:, shift:]
    return near


@torch.no_grad()
def alignment(steered: SteeredModel, batch: Batch) -> dict[str, float]:
    """On demonstrations, with hard switches: NLL, F1 of boundaries (±1 step), switches per episode."""
    episodes = Episodes.of(steered, batch)
    segments, _ = steered.metacontroller.parse(episodes.residual, episodes.slow, batch.mask)
    switch = segments.switch > 0.5
    return {
        "hard_nll": action_nll(
            steered(episodes.residual, segments.code, episodes.where), batch.actions, batch.mask
        ).item(),
        "switch_f1": boundary_f1(switch, batch.boundary, batch.mask),
        "hard_switches": (switch & batch.mask & ~opening(batch.mask)).sum().item() / len(batch),
        "true_switches": batch.boundary.sum().item() / len(batch),
    }


@dataclass
class Play:
    """A rollout under random codes without task or reward, and where the agents went."""

    contents: np.ndarray
    positions: np.ndarray
    rollout: Rollout


def free_play(
    steered: SteeredModel,
    grid: GridConfig,
    episodes: int,
    seed: int,
    forget: bool = False,
    stream: Stream = Stream.FREE_PLAY,
    index: int = 0,
) -> Play:
    """Let random codes z ~ N(0, I) act for whole episodes; the base is greedy."""
    environment = FreePlay(grid, sample_layouts(grid, episodes, stream.numpy(seed, index)))
    propose = prior(steered.metacontroller.config.n_z, stream.torch(seed, index))
    result = rollout(steered, environment, propose, forget=forget)
    return Play(environment.layouts.contents, environment.positions, result)


def pass_rates(steered: SteeredModel, grid: GridConfig, episodes: int = 512, seed: int = 0) -> dict[str, Any]:
    """What random codes do after each completed subgoal, in full context.

    `transitions`[a][b]: rate at which subgoal b follows subgoal a (ideal 1 / number of subgoals);
    `unseen`: its entries a → a + 1, which the corpus never shows; `errors`: rate at which no subgoal follows.
    """
    play = free_play(steered, grid, episodes, seed)
    done, total = subgoal_transitions(grid, entered_colors(grid, play.contents, play.positions))
    rates = done / np.maximum(total, 1)[:, None]
    subgoals = np.arange(len(total))
    unseen = rates[subgoals, (subgoals + 1) % len(total)]
    return {
        "unseen": unseen.tolist(),
        "unseen_mean": float(unseen.mean()),
        "unseen_min": float(unseen.min()),
        "errors": float(1 - done.sum() / max(total.sum(), 1)),
        "transitions": rates.tolist(),
    }
