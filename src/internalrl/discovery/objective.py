"""The discovery objective: −ELBO of the actions with a code per segment (paper, C.4 and E.1).

L = Σ_t −log p(a_t | o_1:t, z_1:t) + α Σ_t w_t KL_t + c Σ_{t>1} β_t, divided by the number of actions, with w = β
for the exact ELBO or w = 1 for the paper's loss. The switch cost c is ours: without it a new code at every step is a
local optimum. So is the counterfactual gradient of the switch: see `switch_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from internalrl.base.batches import Batch
from internalrl.controller.metacontroller import Proposals, Segmentation, SwitchMode, held_code
from internalrl.controller.steered import SteeredModel

SAMPLING_TEMPERATURE = 1 / 3  # of switches under the counterfactual gradient: close to what they will be at test time
LARGEST_EFFECT = 2.0  # nats; one edit never counts for more


@dataclass(frozen=True)
class Coefficients:
    """α (`kl_coef`) in nats of NLL per nat of KL, counted as `kl` says; c (`switch_cost`) in nats per switch."""

    kl_coef: float
    switch_cost: float
    kl: str = "switch-weighted"


@dataclass
class Episodes:
    """Demonstrations as discovery sees them: residual (B, T, n_e), slow features (B, T, k), actions and mask (B, T).

    Of a text the actions are the next tokens, and `mask` is True from the last prompt token on: what comes before it
    is history, neither steered nor scored.
    """

    residual: Tensor
    slow: Tensor
    actions: Tensor
    mask: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, steered: SteeredModel, batch: Batch) -> Episodes:
        """What discovery needs of `batch`; all that the frozen lower half of the base computes."""
        residual = steered.residual(batch.observations)
        slow = steered.metacontroller.slow_features(steered.view(batch.observations, residual))
        return cls(residual, slow, batch.actions, batch.mask)

    @property
    def where(self) -> Tensor | None:
        """The steps (B, T) bool that are steered, as `SteeredModel.forward` takes it; None where that is all."""
        return None if self.mask[:, 0].all() else self.mask.cumsum(1) > 0

    def repeat(self, times: int) -> Episodes:
        return Episodes(*(v.repeat(times, *[1] * (v.ndim - 1)) for v in vars(self).values()))


@dataclass
class Terms:
    """Per episode, all (B,): `nll` and `kl` in nats, `switches` after the first step."""

    nll: Tensor
    kl: Tensor
    switches: Tensor

    def total(self, coefficients: Coefficients) -> Tensor:
        """The loss of each episode in nats."""
        return self.nll + coefficients.kl_coef * self.kl + coefficients.switch_cost * self.switches


def opening(mask: Tensor) -> Tensor:
    """(B, T) bool: the first real step of each episode, which always opens a segment."""
    return mask & (mask.cumsum(1) == 1)


def action_nll(logits: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
    """Mean −log p(a_t) in nats over the real steps; logits (B, T, A), actions and mask (B, T)."""
    return F.cross_entropy(logits[mask], actions[mask])


def elbo_terms(
    steered: SteeredModel,
    episodes: Episodes,
    code: Tensor,
    switch: Tensor,
    kl: Tensor,
    coefficients: Coefficients,
) -> Terms:
    """The terms for codes (B, T, n_z) held between switches (B, T); kl (B, T) of every step's proposal."""
    logits = steered(episodes.residual, code, episodes.where)
    nll = F.cross_entropy(logits.transpose(1, 2), episodes.actions, reduction="none")
    weight = switch if coefficients.kl == "switch-weighted" else torch.ones_like(switch)
    mask = episodes.mask
    chosen = mask & ~opening(mask)
    return Terms((nll * mask).sum(1), (weight * kl * mask).sum(1), (switch * chosen).sum(1))


def discovery_loss(
    steered: SteeredModel,
    episodes: Episodes,
    coefficients: Coefficients,
    mode: SwitchMode | Literal["counterfactual"],
    temperature: float = 1.0,
    random_switch: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Loss per action, and what to log of it.

    Args:
        mode: how the switch is sampled and learned: "counterfactual", or a mode of `Metacontroller.segment`.
        random_switch: probability of switches that ignore the learned one (warm-up); None uses `mode`.
    """
    meta, mask = steered.metacontroller, episodes.mask
    first = opening(mask)
    x = meta.read(episodes.residual)
    before = meta.summarise(x)
    proposals = meta.propose(episodes.slow, mask)
    if random_switch is not None:
        switch = (first | (torch.rand(mask.shape) < random_switch) & (mask.cumsum(1) > 0)).to(x.dtype)
        segments = meta.hold(x, before, proposals.sample, switch)
    elif mode == "counterfactual":
        with torch.no_grad():
            drawn = meta.segment(x, before, proposals.sample, "straight-through", SAMPLING_TEMPERATURE, mask=mask)
        segments = meta.hold(x, before, proposals.sample, drawn.switch)
    else:
        segments = meta.segment(x, before, proposals.sample, mode, temperature, mask)
    terms = elbo_terms(steered, episodes, segments.code, segments.switch, proposals.kl(), coefficients)
    loss = terms.total(coefficients).sum() / mask.sum()
    certain = torch.sigmoid(segments.logit.detach())[mask & ~first]
    metrics = {
        "loss": loss.item(),
        "nll": (terms.nll.sum() / mask.sum()).item(),
        "kl": terms.kl.mean().item(),
        "switches": terms.switches.mean().item(),
        "bimodality": ((certain < 0.1) | (certain > 0.9)).float().mean().item(),
    }
    if random_switch is None and mode == "counterfactual":
        cost = terms.total(coefficients).detach()
        learned = switch_loss(steered, episodes, coefficients, x, before, proposals, drawn, cost)
        metrics["switch_loss"] = learned.item()
        loss = loss + learned
    return loss, metrics


def switch_loss(
    steered: SteeredModel,
    episodes: Episodes,
    coefficients: Coefficients,
    x: Tensor,
    before: Tensor,
    proposals: Proposals,
    drawn: Segmentation,
    cost: Tensor,
    edits: int = 2,
) -> Tensor:
    """Counterfactual gradient of the switch: would the episode's loss fall if β_t were the other way round?

    For a few steps t of every episode the exact loss is computed with β_t flipped and all else, the noise of the
    codes too, left as it was. The switch is then trained to classify "β_t = 1 is cheaper", each case weighted by
    how much it matters. Its decision boundary is where a switch begins to pay; no relaxed β leaks information, and
    neither an open nor a closed gate stops learning. `cost` (B,) is the loss in nats as it was `drawn`.
    """
    meta, rows = steered.metacontroller, torch.arange(len(x))
    any_free = (episodes.mask.sum(1) > 1).to(x.dtype)
    steps = [_steps_to_flip(drawn.switch, episodes.mask) for _ in range(edits)]
    with torch.no_grad():
        switch = drawn.switch.repeat(edits, 1)
        for i, step in enumerate(steps):
            switch[i * len(x) + rows, step] = 1 - drawn.switch[rows, step]
        code = held_code(proposals.sample.repeat(edits, 1, 1), switch)
        kl = proposals.kl().repeat(edits, 1)
        terms = elbo_terms(steered, episodes.repeat(edits), code, switch, kl, coefficients)
        flipped = terms.total(coefficients).unflatten(0, (edits, len(x)))
    logit = meta.hold(x, before, proposals.sample.detach(), drawn.switch).logit
    loss = torch.zeros(())
    for i, step in enumerate(steps):
        effect = (flipped[i] - cost) * torch.where(drawn.switch[rows, step] > 0.5, -1.0, 1.0)  # of β = 1 over β = 0
        cheaper = (effect < 0).to(x.dtype)
        weight = effect.abs().clamp(max=LARGEST_EFFECT) * any_free
        loss = loss + (weight * F.binary_cross_entropy_with_logits(logit[rows, step], cheaper, reduction="none")).mean()
    return loss / edits


def _steps_to_flip(switch: Tensor, mask: Tensor) -> Tensor:
    """(B,): one step of each episode after its first; half of the time one with a switch, where there is any.

    An episode of one step has none, and gets step 0.
    """
    later = (mask & ~opening(mask)).to(switch.dtype)
    on = switch * later
    wanted = (torch.rand(len(mask), 1) < 0.5) & (on.sum(1, keepdim=True) > 0)
    chance = torch.where(wanted, on, later)
    chance[:, 0] += ~later.any(1)
    return torch.multinomial(chance, 1).squeeze(1)
