"""The objective of internal RL: PPO's clipped surrogate with one outcome reward per episode (paper, C.5, Alg 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def advantages(reward: Tensor, groups: Tensor | None = None) -> Tensor:
    """(R − mean R) / (std R + 1e-3) over the batch (N,): no critic.

    With `groups` (N,), whole numbers, episodes are compared with those of their own group only.
    """
    if groups is None:
        return (reward - reward.mean()) / (reward.std(correction=0) + 1e-3)
    advantage = torch.zeros_like(reward)
    for group in groups.unique():
        advantage[groups == group] = advantages(reward[groups == group])
    return advantage


def clipped_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip: float,
    count: Tensor | int | None = None,
) -> Tensor:
    """−E[min(ρ A, clip(ρ, 1 ± clip) A)] over the real decisions.

    log_prob, old_log_prob, mask: (N, S); advantage: (N,), shared by all decisions of an episode; count: how many
    decisions there are, if these are a part of them.
    """
    ratio = (log_prob - old_log_prob).exp()
    advantage = advantage[:, None]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -(surrogate * mask).sum() / (mask.sum() if count is None else count)
