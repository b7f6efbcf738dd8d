"""The best segmentation of a demonstration, exactly, by dynamic programming over its switches.

Learning when to switch by gradient has many local optima: a new code at every step, at every branching, or never.
But given the codes, the cheapest segmentation of an episode can be computed: one forward for each step at which a
code could be adopted, then the recursion best(t) = min_s best(s) + cost of holding the code of step s from s to t.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from internalrl.discovery.objective import Coefficients, Episodes
from internalrl.metacontroller.model import held_code
from internalrl.metacontroller.steered import SteeredModel


@torch.no_grad()
def best_switches(
    steered: SteeredModel, episodes: Episodes, coefficients: Coefficients, switch: Tensor, together: int = 4096
) -> Tensor:
    """Switches (B, T) of the cheapest segmentation of each episode, with the posterior's mean codes.

    Args:
        switch: (B, T) the present segmentation; what came before a candidate switch is steered by its codes.
        together: sequences per forward pass.
    """
    meta, mask = steered.metacontroller, episodes.mask
    x = meta.read(episodes.residual)
    proposals = meta.propose(x, meta.summarise(x), mask)
    before = held_code(proposals.mean, switch)
    nll = holding_costs(steered, episodes, proposals.mean, before, together)
    opening = coefficients.kl_coef * proposals.kl() + coefficients.switch_cost
    opening[:, 0] -= coefficients.switch_cost
    return shortest_path(nll, opening, mask.sum(1))


def holding_costs(steered: SteeredModel, episodes: Episodes, code: Tensor, before: Tensor, together: int) -> Tensor:
    """nll[b, s, t] of action t in nats when code[b, s] is adopted at s and held; (B, T, T), 0 where t < s or padded.

    Args:
        code: (B, T, n_z) what is adopted at each step; before: (B, T, n_z) the codes in force before s.
    """
    count, length = episodes.mask.shape
    steps = torch.arange(length)
    nll = torch.zeros(count, length, length)
    rows = max(1, together // count)
    for first in range(0, length, rows):
        opened = steps[first : first + rows]
        held = steps >= opened[:, None]  # (S, T)
        codes = torch.where(held[None, :, :, None], code[:, opened, None], before[:, None])
        many = len(opened)
        logits = steered(episodes.residual.repeat_interleave(many, 0), codes.flatten(0, 1))
        actions = episodes.actions.repeat_interleave(many, 0)
        cost = F.cross_entropy(logits.transpose(1, 2), actions, reduction="none").unflatten(0, (count, many))
        nll[:, opened] = cost * held * episodes.mask[:, None]
    return nll


def shortest_path(nll: Tensor, opening: Tensor, length: Tensor) -> Tensor:
    """Switches (B, T) that minimise Σ over segments [s, e) of opening[s] + Σ_{s ≤ t < e} nll[s, t].

    nll: (B, T, T), 0 where t < s; opening: (B, T); length: (B,) number of real steps.
    """
    count, steps = opening.shape
    holding = nll.cumsum(2)  # of the code adopted at s, through step t
    best = torch.full((count, steps + 1), float("inf"))
    best[:, 0] = 0
    came_from = torch.zeros(count, steps + 1, dtype=torch.long)
    for end in range(1, steps + 1):
        cost = best[:, :end] + opening[:, :end] + holding[:, :end, end - 1]
        best[:, end], came_from[:, end] = cost.min(1)
    switch = torch.zeros(count, steps)
    rows, at = torch.arange(count), length.clone()
    while at.any():
        at = came_from[rows, at]
        switch[rows, at] = 1.0
    return switch
