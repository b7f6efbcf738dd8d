"""Rehearsal trains in exactly the contexts in which a forgetful model is later decoded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from internalrl.controller.steered import SteeredModel
from internalrl.discovery.objective import Episodes
from internalrl.discovery.rehearse import Rehearsal, cut_contexts, kl_coef_at, rehearsal_loss
from internalrl.settings.stages import RehearseConfig
from tests.support.tiny import BATCH, STEPS, close, codes, decode, tiny_steered


def rehearsal(steered: SteeredModel, observations: Tensor, switch: Tensor) -> Rehearsal:
    """`observations` cut at `switch` (B, T) bool, with made-up actions; rows of different lengths."""
    opened, alone = cut_contexts(switch)
    deciding, acting = (steered.residual(observations, segments=numbers) for numbers in (opened, alone))
    slow = steered.metacontroller.slow_features(steered.inferred(observations, steered.residual(observations)))
    mask = torch.arange(STEPS) < torch.tensor([STEPS, 5, 7, 3])[:, None]
    actions = torch.arange(BATCH * STEPS).reshape(BATCH, STEPS) % 4
    free = mask & ~F.pad(switch[:, :-1], (1, 0), value=True)
    return Rehearsal(Episodes(acting, slow, actions, mask), switch & mask, free, deciding, opened, alone)


def test_contexts_are_cut_before_and_after_a_switch_step() -> None:
    switch = torch.tensor([[True, False, True, False, False, True]])
    opened, alone = cut_contexts(switch)
    assert opened.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert alone.tolist() == [[0, 0, 1, 2, 2, 3]]


def test_rehearsal_sees_what_forgetful_decoding_sees(steered: SteeredModel, observations: Tensor) -> None:
    """Actions at every step; the switch wherever it is free to fire."""
    decoded, _ = decode(steered, observations, codes(BATCH, STEPS), forget=True)
    switch, meta = decoded.switch, steered.metacontroller
    assert 0 < switch[:, 1:].sum() < switch[:, 1:].numel()
    r = rehearsal(steered, observations, switch)
    close(steered(r.episodes.residual, decoded.code, segments=r.alone), decoded.logits)
    x = meta.read(r.deciding)
    context = meta.switch_context(torch.cat([x, meta.summarise_segments(x, r.opened)], -1))
    logit = meta.switch_logit(context, F.pad(decoded.code[:, :-1], (0, 0, 1, 0)))
    free = ~F.pad(switch[:, :-1], (1, 0), value=True)
    close(logit[free], decoded.switch_logit[free])


def test_history_of_segments_is_that_of_each_alone(steered: SteeredModel, observations: Tensor) -> None:
    meta = steered.metacontroller
    x = meta.read(steered.residual(observations))
    found = meta.summarise_segments(x, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1]).expand(BATCH, -1))
    close(found, torch.cat([meta.summarise(x[:, :4]), meta.summarise(x[:, 4:])], 1))


def test_it_reaches_all_of_the_metacontroller_and_nothing_else(observations: Tensor) -> None:
    steered = tiny_steered()
    decoded, _ = decode(steered, observations, codes(BATCH, STEPS), forget=True)
    loss, metrics = rehearsal_loss(steered, rehearsal(steered, observations, decoded.switch), 0.3, 0.3)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in steered.metacontroller.parameters())
    assert all(p.grad is None for p in steered.base.parameters())
    assert metrics["kl_per_switch"] > 0
    assert metrics["switch_loss"] > 0


def test_a_switch_that_always_fires_teaches_it_nothing(observations: Tensor) -> None:
    steered, always = tiny_steered(), torch.ones(BATCH, STEPS, dtype=torch.bool)
    loss, metrics = rehearsal_loss(steered, rehearsal(steered, observations, always), 0.3, 0.3)
    assert torch.isfinite(loss)
    assert metrics["switch_loss"] == 0


@pytest.mark.parametrize(("step", "kl_coef"), [(0, 0.1), (25, 0.2), (50, 0.4), (99, 0.4)])
def test_alpha_rises_over_the_first_half(step: int, kl_coef: float) -> None:
    assert kl_coef_at(step, RehearseConfig(steps=100, kl_coef_start=0.1, kl_coef=0.4)) == pytest.approx(kl_coef)
