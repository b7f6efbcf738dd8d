"""The discovery objective: −ELBO of the actions with a code per segment (paper, C.4 and E.1).

L = Σ_t −log p(a_t | o_1:t, z_1:t) + α Σ_t w_t KL_t + c Σ_{t>1} β_t, divided by the number of actions, with w = β for the exact
ELBO or w = 1 for the paper's loss. The switch cost c is ours: without it a new code at every step is a local optimum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internalrl.metacontroller.model import Segmentation
from internalrl.metacontroller.steered import SteeredModel


def action_nll(logits: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
    """Mean −log p(a_t) in nats over the real steps; logits (B, T, A), actions and mask (B, T)."""
    return F.cross_entropy(logits[mask], actions[mask])


def discovery_loss(
    steered: SteeredModel,
    residual: Tensor,
    actions: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    switch_cost: float,
    mode: str,
    temperature: float = 1.0,
    kl: str = "switch-weighted",
    random_switch: float | None = None,
) -> tuple[Tensor, dict[str, Any], Segmentation]:
    """Loss, what to log of it, and the segmentation.

    Args:
        residual: (B, T, n_e) of the frozen base; actions, mask: (B, T).
        random_switch: probability of switches that ignore the learned one (warm-up); None uses `mode`.
    """
    meta = steered.metacontroller
    x = meta.read(residual)
    before = meta.summarise(x)
    proposals = meta.propose(x, before, mask)
    if random_switch is None:
        segments = meta.segment(x, before, proposals.sample, mode, temperature)
    else:
        switch = (torch.rand(mask.shape) < random_switch).to(x.dtype)
        switch[:, 0] = 1
        segments = meta.hold(x, before, proposals.sample, switch)
    nll = action_nll(steered(residual, segments.code), actions, mask)
    count = mask.sum()
    weight = segments.switch if kl == "switch-weighted" else torch.ones_like(segments.switch)
    rate = (weight * proposals.kl() * mask).sum() / count
    density = (segments.switch * mask)[:, 1:].sum() / count
    loss = nll + kl_coef * rate + switch_cost * density
    probability = torch.sigmoid(segments.logit.detach())[:, 1:][mask[:, 1:]]
    episodes = len(actions)
    metrics = {
        "loss": loss,
        "nll": nll,
        "kl": rate * count / episodes,
        "switches": density * count / episodes,
        "bimodality": ((probability < 0.1) | (probability > 0.9)).float().mean(),
    }
    return loss, {name: float(value.detach()) for name, value in metrics.items()}, segments
