"""Who gets gradients from which loss, that log-probabilities carry them, and that a collapse shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from internalrl.controller.metacontroller import Metacontroller
from internalrl.controller.policy import Policy, PolicyActor
from internalrl.controller.steered import SteeredModel
from internalrl.discovery.consolidate import Lesson, consolidation_loss
from internalrl.reinforce.objective import advantages, clipped_surrogate
from tests.support.tiny import (
    BATCH,
    LEARNING_MODES,
    N_Z,
    STEPS,
    WIDTH,
    close,
    codes,
    decode,
    discovery,
    tiny_metacontroller,
    tiny_steered,
)

# ---------------------------------------------------------------------------------- who gets gradients


def lesson(steered: SteeredModel, observations: Tensor) -> Lesson:
    decoded, _ = decode(steered, observations, codes(BATCH, STEPS), forget=True)
    mask = torch.arange(STEPS) < torch.tensor([STEPS, 5, 7, 3])[:, None]
    return Lesson(steered.residual(observations), decoded.code, decoded.switch, decoded.logits, mask)


def trained(module: nn.Module) -> set[str]:
    """Names of the parameters that a loss has reached; a gradient of zeros does not count."""
    return {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}


def names_of(meta: Metacontroller, *parts: str) -> set[str]:
    wanted = {id(parameter) for parameter in meta.parameters_of(*parts)}
    return {name for name, parameter in meta.named_parameters() if id(parameter) in wanted}


def test_parts_name_every_parameter_once() -> None:
    meta = tiny_metacontroller()
    parts = [meta.parameters_of(part) for part in ("history", "encoder", "switch", "controller")]
    assert sorted(id(p) for part in parts for p in part) == sorted(id(p) for p in meta.parameters())


@pytest.mark.parametrize("mode", LEARNING_MODES)
def test_discovery_reaches_all_of_the_metacontroller_and_nothing_else(mode: str, observations: Tensor) -> None:
    """The switch among them; the base, through which the gradient flows, gets none."""
    steered = tiny_steered()
    loss, metrics = discovery(steered, observations, mode)
    loss.backward()
    assert loss.item() == pytest.approx(metrics["loss"] + metrics.get("switch_loss", 0))
    assert (metrics.get("switch_loss", 0) > 0) == (mode == "counterfactual")
    assert trained(steered.metacontroller) == {name for name, _ in steered.metacontroller.named_parameters()}
    assert all(p.grad is None and not p.requires_grad for p in steered.base.parameters())


def test_consolidation_reaches_all_but_the_encoder(observations: Tensor) -> None:
    steered = tiny_steered()
    loss, _ = consolidation_loss(steered, lesson(steered, observations), switch_coef=0.3)
    loss.backward()
    assert trained(steered.metacontroller) == names_of(steered.metacontroller, "history", "switch", "controller")
    assert all(p.grad is None for p in steered.base.parameters())


def test_consolidation_costs_nothing_where_teacher_and_student_agree(observations: Tensor) -> None:
    """With the full context on both sides the distillation term is zero, whatever the padding holds."""
    steered = tiny_steered()
    decoded, _ = decode(steered, observations, codes(BATCH, STEPS))
    mask = torch.arange(STEPS) < torch.tensor([STEPS, 5, 7, 3])[:, None]
    logits = torch.where(mask[..., None], decoded.logits, 7.0)
    agreed = Lesson(steered.residual(observations), decoded.code, decoded.switch, logits, mask)
    _, metrics = consolidation_loss(steered, agreed, switch_coef=0.3)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    _, metrics = consolidation_loss(steered, lesson(steered, observations), switch_coef=0.3)
    assert metrics["kl"] > 1e-3


def test_consolidation_loss_step_by_step(observations: Tensor) -> None:
    """Σ p log(p / q) of the actions at real steps; −log of the teacher's switch at those but the first."""
    steered = tiny_steered()
    taught = lesson(steered, observations)
    meta, x = steered.metacontroller, steered.metacontroller.read(taught.residual)
    logit = meta.hold(x, meta.summarise(x), taught.code, taught.switch).logit
    student = steered(taught.residual, taught.code)
    kl, switching = [], []
    for row, t in taught.mask.nonzero().tolist():
        p, q = torch.softmax(taught.logits[row, t], 0), torch.softmax(student[row, t], 0)
        kl.append((p * (p / q).log()).sum())
        if t > 0:
            probability = torch.sigmoid(logit[row, t])
            switching.append(-(probability if taught.switch[row, t] else 1 - probability).log())
    expected = torch.stack(kl).mean() + 0.3 * torch.stack(switching).mean()
    close(consolidation_loss(steered, taught, switch_coef=0.3)[0], expected)


def test_internal_rl_reaches_the_policy_alone(observations: Tensor) -> None:
    steered = tiny_steered()
    policy = Policy(WIDTH, N_Z, hidden=6, initial_std=1.0)
    actor = PolicyActor(policy, BATCH, torch.Generator().manual_seed(0))
    decoding = steered.start(BATCH)
    for t in range(STEPS):
        steered.step(observations[:, t], decoding, actor)
    x, code, mask = actor.segments()
    old = policy.log_prob(x, code).detach()
    advantage = advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    clipped_surrogate(policy.log_prob(x, code), old, advantage, mask, clip=0.2).backward()
    assert trained(policy) == {name for name, _ in policy.named_parameters()}
    assert not trained(steered)
    assert not any(part.requires_grad for part in (x, code, old))


def test_ratio_is_one_on_the_first_pass() -> None:
    """The surrogate is then −mean A and its gradient the plain policy gradient; a detached log π has none."""
    policy = Policy(WIDTH, N_Z, hidden=6, initial_std=1.3)
    actor = PolicyActor(policy, 3, torch.Generator().manual_seed(0))
    for rows in ([0, 1, 2], [0, 2], [2]):
        actor(
            torch.tensor(rows),
            torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(len(rows))),
        )
    x, code, mask = actor.segments()
    with torch.no_grad():
        old = policy.log_prob(x, code)
    new = policy.log_prob(x, code)
    assert torch.equal((new - old).exp().detach(), torch.ones(3, 3))
    advantage = torch.tensor([1.0, -2.0, 0.5])
    loss = clipped_surrogate(new, old, advantage, mask, clip=0.2)
    expected = -(advantage[:, None] * mask).sum() / mask.sum()
    close(loss.detach(), expected)
    gradient = torch.autograd.grad(loss, policy.parameters(), retain_graph=True)
    plain = torch.autograd.grad(-(new * advantage[:, None] * mask).sum() / mask.sum(), policy.parameters())
    for ours, theirs in zip(gradient, plain, strict=True):
        assert ours.abs().sum() > 0
        close(ours, theirs)


def test_log_prob_is_that_of_the_code() -> None:
    """Of the code that steered, under the Gaussian it was drawn from: unit by unit, by the formula."""
    policy = Policy(WIDTH, N_Z, hidden=6, initial_std=0.8)
    x, code = torch.randn(2, 3, WIDTH), codes(2, 3)
    mean, std = policy.mean(policy.recurrent(x)[0]), policy.log_std.exp()
    expected = (-0.5 * ((code - mean) / std) ** 2 - std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))).sum(-1)
    close(policy.log_prob(x, code), expected)


def test_frozen_base_stays_in_evaluation_mode() -> None:
    steered = tiny_steered().train()
    assert steered.training
    assert not any(module.training for module in steered.base.modules())
    assert not steered.eval().training


# ---------------------------------------------------------------------------------- collapse is visible


@pytest.mark.parametrize(("bias", "switches"), [(-1e3, 0.0), (1e3, 25.0 / 4 - 1)])
def test_collapsed_switch_shows_in_the_metrics(bias: float, switches: float, observations: Tensor) -> None:
    """Per episode, first steps aside; a gate that cannot decide, in contrast, has no bimodality."""
    steered = tiny_steered()
    mask = torch.arange(STEPS) < torch.tensor([STEPS, 5, 7, 4])[:, None]
    nn.init.constant_(steered.metacontroller.switch_head.bias, bias)
    _, metrics = discovery(steered, observations, mask=mask)
    assert metrics["switches"] == pytest.approx(switches)
    assert metrics["bimodality"] == 1
    assert metrics["kl"] > 0
    nn.init.zeros_(steered.metacontroller.switch_head.weight)
    nn.init.zeros_(steered.metacontroller.switch_head.bias)
    _, metrics = discovery(steered, observations, mask=mask)
    assert metrics["bimodality"] == 0
    assert metrics["switches"] == pytest.approx((25 / 4 - 1) / 2)


def test_collapsed_codes_show_in_the_metrics(observations: Tensor) -> None:
    steered = tiny_steered()
    for parameter in steered.metacontroller.encoder[-1].parameters():
        nn.init.zeros_(parameter)
    assert discovery(steered, observations)[1]["kl"] == pytest.approx(0, abs=1e-6)
