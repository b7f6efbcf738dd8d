"""Slow features of what the base has inferred: what persists for a few steps, found without labels or gradients.

A subgoal outlives the moves that lead to it. So among the directions of the inferred residual, those that belief about
the subgoal occupies change slowest, while positions, moves and surprises pass. Slow feature analysis (Wiskott &
Sejnowski 2002; as a generalised eigenproblem also known as TICA) finds them: the directions w with the largest
autocorrelation w·C_lag w / w·C_0 w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from internalrl.errors import InternalRLError

RIDGE = 1e-2  # of the mean variance: directions that hardly vary are no features


def slow_features(x: Tensor, mask: Tensor, count: int, lag: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` slowest directions of x (B, T, n): mean (n,), projection (n, count) to unit variance, and all
    autocorrelations, the largest first.

    Args:
        mask: (B, T), True at real steps.
        lag: steps over which a feature is to persist. With 0 all persist, and `RIDGE` ranks them by their variance:
            they are the principal components.

    Raises:
        InternalRLError: no episode is longer than `lag`, or x is the same everywhere.
    """
    if not mask[:, lag:].any():
        raise InternalRLError(f"slow_lag is {lag}, but no episode has more than {mask.sum(1).max()} steps; give less.")
    mean = x[mask].mean(0)
    centred = x - mean
    steps = mask.shape[1]
    now, later = (centred[:, part][mask[:, lag:]] for part in (slice(steps - lag), slice(lag, steps)))
    across = (now.T @ later / len(now)).double()
    within = (centred[mask].T @ centred[mask] / mask.sum()).double()
    if not within.any():
        raise InternalRLError("The base model infers nothing from the past, so no feature is slow; pretrain it longer.")
    within.diagonal().add_(RIDGE * within.diagonal().mean())
    whiten = torch.linalg.inv(torch.linalg.cholesky(within)).T
    persistence, directions = torch.linalg.eigh(whiten.T @ (across + across.T) / 2 @ whiten)
    return mean, (whiten @ directions.flip(1)[:, :count]).to(x.dtype), persistence.flip(0).to(x.dtype)
