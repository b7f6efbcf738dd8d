"""What must hold exactly: each test is a mistake that others made in building on a frozen model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from internalrl.base.residual import ResidualTap
from internalrl.discovery.consolidate import Lesson, consolidation_loss
from internalrl.discovery.objective import discovery_loss
from internalrl.errors import InternalRLError
from internalrl.internal_rl.objective import advantages, clipped_surrogate
from internalrl.internal_rl.recording import Recording
from internalrl.metacontroller.model import Metacontroller, gate
from internalrl.metacontroller.policy import Policy, PolicyActor
from internalrl.metacontroller.rollout import rollout
from internalrl.metacontroller.steered import Decoding, SteeredModel, Step
from tests.tiny import (
    GRID,
    N_Z,
    SIZES,
    WIDTH,
    codes,
    environment,
    tiny_base,
    tiny_metacontroller,
    tiny_steered,
    walks,
)

ENCODERS = ("one-hot", "planner")
BATCH, STEPS = 4, 9
MODES = ("soft", "gumbel", "straight-through", "hard")
LEARNING_MODES = MODES[:3]


def close(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(params=ENCODERS)
def steered(request: pytest.FixtureRequest) -> SteeredModel:
    return tiny_steered(request.param)


@pytest.fixture
def observations() -> Tensor:
    return walks(BATCH, STEPS)


def decode(
    steered: SteeredModel, observations: Tensor, proposals: Tensor, forget: bool = False
) -> tuple[Step, Decoding]:
    """Decode step by step, with `proposals` (B, T, n_z) adopted where the switch fires; each field (B, T, …)."""
    decoding, steps = steered.start(len(observations), forget), []
    for t in range(observations.shape[1]):
        steps.append(steered.step(observations[:, t], decoding, lambda rows, _, t=t: proposals[rows, t]))
    fields = ("logits", "switch", "switch_logit", "code")
    return Step(*(torch.stack([getattr(step, name) for step in steps], 1) for name in fields)), decoding


def varied(switch: Tensor) -> bool:
    """Whether some steps after the first switch and some do not."""
    return 0 < switch[:, 1:].float().mean() < 1


# ---------------------------------------------------------------------------------- one steered forward pass


def test_zero_controller_is_the_base_to_the_bit(steered: SteeredModel, observations: Tensor) -> None:
    nn.init.zeros_(steered.metacontroller.up)
    base = steered.base(observations).logits
    code = codes(BATCH, STEPS)
    assert torch.equal(steered(steered.residual(observations), code), base)
    cache, decoded = None, []
    for t in range(STEPS):
        output = steered.base(observations[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        decoded.append(output.logits)
    assert torch.equal(decode(steered, observations, code)[0].logits, torch.cat(decoded, 1))


def test_controller_changes_the_logits(steered: SteeredModel, observations: Tensor) -> None:
    """What keeps the other tests from being empty."""
    residual = steered.residual(observations)
    first, second = (steered(residual, codes(BATCH, STEPS, seed)) for seed in (0, 1))
    base = steered.base(observations).logits
    assert (first - base).abs().mean() > 0.05
    assert (first - second).abs().mean() > 0.05


def test_cached_decoding_is_the_full_forward(steered: SteeredModel, observations: Tensor) -> None:
    decoded, _ = decode(steered, observations, codes(BATCH, STEPS))
    assert varied(decoded.switch)
    residual, meta = steered.residual(observations), steered.metacontroller
    close(decoded.logits, steered(residual, decoded.code))
    x = meta.read(residual)
    held = meta.hold(x, meta.summarise(x), codes(BATCH, STEPS), decoded.switch.float())
    assert torch.equal(held.code, decoded.code)
    close(decoded.switch_logit, held.logit)
    scanned = meta.segment(x, meta.summarise(x), codes(BATCH, STEPS), "hard")
    assert torch.equal(scanned.switch.bool(), decoded.switch)
    assert torch.equal(scanned.code, decoded.code)


def test_residual_is_read_before_it_is_steered(steered: SteeredModel, observations: Tensor) -> None:
    """The upper blocks are neither skipped nor fed to the metacontroller: both paths read the bare base."""
    seen: list[Tensor] = []
    decoding = steered.start(BATCH)
    steered.metacontroller.switch_head.bias.data.fill_(1e3)
    for t in range(STEPS):
        steered.step(
            observations[:, t], decoding, lambda rows, x: seen.append(x) or codes(len(rows), 1)[:, 0]
        )
    hidden = steered.base.backbone(
        inputs_embeds=steered.base.encoder(observations)[0],
        output_hidden_states=True,
        **steered.base._positions(STEPS, 0, None, torch.zeros(BATCH, STEPS)),
    ).hidden_states
    close(steered.residual(observations), hidden[1])
    close(torch.stack(seen, 1), steered.metacontroller.read(hidden[1]))


def test_rollout_takes_the_path_of_discovery(steered: SteeredModel) -> None:
    """Whole episodes with rows dropped as they end, against one full forward on what they saw."""
    proposals = codes(24, GRID.horizon)
    asked = torch.zeros(24, dtype=torch.long)

    def propose(rows: Tensor, _: Tensor) -> Tensor:
        chosen = proposals[rows, asked[rows]]
        asked[rows] += 1
        return chosen

    recording = Recording(environment(24))
    played = rollout(steered, recording, propose, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert len(set(played.length.tolist())) > 2
    assert min(len(rows) for rows, _ in recording.shown) < 24
    meta, mask = steered.metacontroller, played.mask
    residual = steered.residual(recording.observations(played.actions.shape[1]))
    x = meta.read(residual)
    held = meta.hold(x, meta.summarise(x), played.code, played.switch.float())
    close(steered(residual, held.code)[mask], played.logits[mask])
    close(held.logit[mask], played.switch_logit[mask])
    assert varied(played.switch[played.length > 3][:, :3])


def test_rollout_asks_for_codes_only_in_running_episodes(steered: SteeredModel) -> None:
    """A decision after an episode's end would be credited with its reward."""
    policy = Policy(WIDTH, N_Z, hidden=6, initial_std=1.0)
    actor = PolicyActor(policy, 24, torch.Generator().manual_seed(0))
    played = rollout(
        steered, environment(24), actor, temperature=1.0, generator=torch.Generator().manual_seed(0)
    )
    _, chosen, mask = actor.segments()
    assert torch.equal(mask.sum(1), played.switch.sum(1))
    assert torch.equal(chosen[mask], played.code[played.switch])


# ---------------------------------------------------------------------------------- segments that forget


def test_forgetting_is_a_full_forward_with_segments(steered: SteeredModel, observations: Tensor) -> None:
    decoded, decoding = decode(steered, observations, codes(BATCH, STEPS), forget=True)
    assert varied(decoded.switch)
    segments = decoded.switch.long().cumsum(1) - 1
    assert torch.equal(decoding.segments, segments)
    residual = steered.residual(observations, segments)
    close(decoded.logits, steered(residual, decoded.code, segments=segments))
    remembered, _ = decode(steered, observations, codes(BATCH, STEPS))
    assert (remembered.logits - decoded.logits).abs().max() > 1e-3


def test_forgetting_is_each_segment_alone(steered: SteeredModel, observations: Tensor) -> None:
    decoded, _ = decode(steered, observations, codes(BATCH, STEPS), forget=True)
    for row in range(BATCH):
        starts = [*decoded.switch[row].nonzero().squeeze(-1).tolist(), STEPS]
        for begin, end in zip(starts, starts[1:], strict=False):
            part = slice(begin, end)
            alone, code = observations[row : row + 1, part], decoded.code[row : row + 1, part]
            close(steered(steered.residual(alone), code)[0], decoded.logits[row, part])
            again, _ = decode(steered, alone, code)
            close(again.logits[0], decoded.logits[row, part])
            # within the segment the switch, too, remembers nothing of what came before
            close(again.switch_logit[0, 1:], decoded.switch_logit[row, begin + 1 : end])


def test_peek_sees_what_step_will_see_and_leaves_no_trace(
    steered: SteeredModel, observations: Tensor
) -> None:
    for forget in (False, True):
        plain, _ = decode(steered, observations, codes(BATCH, STEPS), forget)
        decoding = steered.start(BATCH, forget)
        for t in range(STEPS):
            switch, x = steered.peek(observations[:, t], decoding)
            seen: dict[str, Tensor] = {}

            def propose(rows: Tensor, read: Tensor, t: int = t, seen: dict[str, Tensor] = seen) -> Tensor:
                seen.update(rows=rows, x=read)
                return codes(BATCH, STEPS)[rows, t]

            step = steered.step(observations[:, t], decoding, propose)
            assert torch.equal(step.switch, switch)
            assert torch.equal(step.logits, plain.logits[:, t])
            if switch.any():
                assert torch.equal(seen["x"], x[seen["rows"]])


# ---------------------------------------------------------------------------------- the switch


def reading(meta: Metacontroller, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(BATCH, STEPS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return x, meta.summarise(x), codes(BATCH, STEPS, seed)


@pytest.mark.parametrize("mode", MODES)
def test_switch_scan_is_the_scalar_loop(mode: str) -> None:
    meta = tiny_metacontroller()
    x, before, proposal = reading(meta)
    found = meta.segment(x, before, proposal, mode)
    for row in range(BATCH):
        for unit in range(N_Z):
            z = 0.0
            for t in range(STEPS):
                beta = float(found.switch[row, t].detach())
                z = beta * float(proposal[row, t, unit]) + (1 - beta) * z
                assert z == pytest.approx(float(found.code[row, t, unit].detach()), abs=1e-5)
    if mode in ("straight-through", "hard"):
        held = meta.hold(x, before, proposal, found.switch)
        close(held.code, found.code)
        close(held.logit, found.logit)


@pytest.mark.parametrize("mode", MODES)
def test_closed_switch_holds_and_open_switch_replaces(mode: str) -> None:
    """β = 1 adopts the new code and β = 0 keeps the old one, exactly: a gate the other way round fails here."""
    meta = tiny_metacontroller()
    x, before, proposal = reading(meta)
    for bias, expected in ((-1e3, proposal[:, :1].expand_as(proposal)), (1e3, proposal)):
        nn.init.constant_(meta.switch_head.bias, bias)
        found = meta.segment(x, before, proposal, mode)
        assert torch.equal(found.code, expected)
        assert torch.equal(found.switch[:, 1:], torch.full_like(found.switch[:, 1:], float(bias > 0)))
        assert torch.equal(found.switch[:, 0], torch.ones(BATCH))
    held = meta.hold(x, before, proposal, torch.tensor([1.0, *[0.0] * (STEPS - 1)]).expand(BATCH, -1))
    assert torch.equal(held.code, proposal[:, :1].expand_as(proposal))
    assert torch.equal(meta.hold(x, before, proposal, torch.ones(BATCH, STEPS)).code, proposal)


@pytest.mark.parametrize("bias", [-1e3, 1e3])
def test_decoding_holds_and_replaces_alike(bias: float, observations: Tensor) -> None:
    steered = tiny_steered()
    nn.init.constant_(steered.metacontroller.switch_head.bias, bias)
    proposals = codes(BATCH, STEPS)
    decoded, _ = decode(steered, observations, proposals)
    assert torch.equal(decoded.code, proposals if bias > 0 else proposals[:, :1].expand_as(proposals))
    assert decoded.switch[:, 0].all()
    assert (decoded.switch[:, 1:] == (bias > 0)).all()


@pytest.mark.parametrize("mode", LEARNING_MODES)
def test_larger_logit_means_more_switching(mode: str) -> None:
    logit = torch.linspace(-4, 4, 9, requires_grad=True)
    noise = torch.zeros(9)
    switch = gate(logit, noise, mode, 0.7)
    assert (switch.diff() >= 0).all()
    assert switch[0] < 0.5 < switch[-1]
    switch.sum().backward()
    assert (logit.grad > 0).all()


def test_straight_through_is_a_bernoulli_sample() -> None:
    meta = tiny_metacontroller()
    logit = torch.tensor([-1.5, 0.0, 1.0])
    uniform = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    switch = gate(logit.expand(20_000, 3), uniform.logit(), "straight-through")
    assert set(switch.unique().tolist()) == {0.0, 1.0}
    assert_close(switch.mean(0), torch.sigmoid(logit), atol=0.015, rtol=0)
    x, before, proposal = reading(meta)
    found = meta.segment(x, before, proposal, "straight-through").switch
    assert set(found.unique().tolist()) == {0.0, 1.0}


# ---------------------------------------------------------------------------------- gradients and who gets them


def lesson(steered: SteeredModel, observations: Tensor) -> Lesson:
    decoded, _ = decode(steered, observations, codes(BATCH, STEPS), forget=True)
    mask = torch.arange(STEPS) < torch.tensor([STEPS, 5, 7, 3])[:, None]
    return Lesson(steered.residual(observations), decoded.code, decoded.switch, decoded.logits, mask)


def discovery(
    steered: SteeredModel, observations: Tensor, mode: str = "soft", **options: Any
) -> tuple[Tensor, Any]:
    """The discovery loss of `observations` with actions made up."""
    mask = options.pop("mask", torch.ones(observations.shape[:2], dtype=torch.bool))
    actions = torch.arange(mask.numel()).reshape(mask.shape) % 4
    options = {"kl_coef": 0.3, "switch_cost": 0.1, "mode": mode, **options}
    loss, metrics, _ = discovery_loss(steered, steered.residual(observations), actions, mask, **options)
    return loss, metrics


def trained(module: nn.Module) -> set[str]:
    """Names of the parameters that a loss has reached: not one of them may be missed, so zeros do not count."""
    return {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}


def names_of(meta: Metacontroller, *parts: str) -> set[str]:
    wanted = {id(parameter) for parameter in meta.parameters_of(*parts)}
    return {name for name, parameter in meta.named_parameters() if id(parameter) in wanted}


def test_parts_name_every_parameter_once() -> None:
    meta = tiny_metacontroller()
    parts = [meta.parameters_of(part) for part in ("history", "encoder", "switch", "controller")]
    assert sorted(id(p) for part in parts for p in part) == sorted(id(p) for p in meta.parameters())


@pytest.mark.parametrize("mode", LEARNING_MODES)
def test_discovery_reaches_all_of_the_metacontroller_and_nothing_else(
    mode: str, observations: Tensor
) -> None:
    """The switch among them; the base, through which the gradient flows, gets none."""
    steered = tiny_steered()
    discovery(steered, observations, mode)[0].backward()
    assert trained(steered.metacontroller) == {name for name, _ in steered.metacontroller.named_parameters()}
    assert all(p.grad is None and not p.requires_grad for p in steered.base.parameters())


def test_consolidation_reaches_all_but_the_encoder(observations: Tensor) -> None:
    steered = tiny_steered()
    loss, _ = consolidation_loss(steered, lesson(steered, observations), switch_coef=0.3)
    loss.backward()
    assert trained(steered.metacontroller) == names_of(
        steered.metacontroller, "history", "switch", "controller"
    )
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
    """The surrogate is then −mean A, and its gradient the plain policy gradient, which a detached log π would lose."""
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
    expected = (
        -0.5 * ((code - mean) / std) ** 2 - std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    ).sum(-1)
    close(policy.log_prob(x, code), expected)


def test_frozen_base_stays_in_evaluation_mode() -> None:
    steered = tiny_steered().train()
    assert steered.training
    assert not any(module.training for module in steered.base.modules())
    assert not steered.eval().training


# ---------------------------------------------------------------------------------- rows do not leak


def test_rows_are_independent(steered: SteeredModel, observations: Tensor) -> None:
    changed = observations.clone()
    changed[1:] = walks(BATCH, STEPS, seed=5)[1:]
    proposals, others = codes(BATCH, STEPS), codes(BATCH, STEPS)
    others[1:] = codes(BATCH, STEPS, seed=5)[1:]
    for forget in (False, True):
        first, _ = decode(steered, observations, proposals, forget)
        second, _ = decode(steered, changed, others, forget)
        for name in ("logits", "switch_logit", "code"):
            close(getattr(first, name)[0], getattr(second, name)[0])
        assert (first.logits[1:] - second.logits[1:]).abs().max() > 0.01
    full = [steered(steered.residual(o), p)[0] for o, p in ((observations, proposals), (changed, others))]
    close(*full)


@pytest.mark.parametrize("forget", [False, True])
def test_dropping_rows_leaves_the_others_as_they_were(
    forget: bool, steered: SteeredModel, observations: Tensor
) -> None:
    proposals, kept = codes(BATCH, STEPS), torch.arange(BATCH)
    whole, _ = decode(steered, observations, proposals, forget)
    decoding = steered.start(BATCH, forget)
    for t in range(STEPS):
        step = steered.step(observations[kept, t], decoding, lambda rows, _, t=t: proposals[kept[rows], t])
        close(step.logits, whole.logits[kept, t])
        close(step.switch_logit, whole.switch_logit[kept, t])
        if t in (2, 5):  # the first and the last row leave, then the others change places
            left = torch.tensor([1, 2] if t == 2 else [1, 0])
            decoding.select(left)
            kept = kept[left]


@pytest.mark.parametrize("mode", LEARNING_MODES)
def test_padding_is_ignored(mode: str, observations: Tensor) -> None:
    """Loss, what is logged, and every gradient are the same whatever stands after an episode's end."""
    lengths = torch.tensor([STEPS, 5, 7, 3])
    mask = torch.arange(STEPS) < lengths[:, None]
    results = []
    for seed in (0, 5):
        steered = tiny_steered()
        padded = torch.where(mask[..., None], observations, walks(BATCH, STEPS, seed=seed + 1))
        torch.manual_seed(0)
        loss, metrics = discovery(steered, padded, mode, mask=mask)
        loss.backward()
        results.append((metrics, [p.grad for p in steered.metacontroller.parameters()]))
    (metrics, gradients), (other_metrics, other_gradients) = results
    assert metrics == pytest.approx(other_metrics, abs=1e-6)
    for ours, theirs in zip(gradients, other_gradients, strict=True):
        close(ours, theirs)


def test_padding_changes_no_episode(observations: Tensor) -> None:
    steered, length = tiny_steered(), 5
    meta = steered.metacontroller
    found = []
    for steps in (length, STEPS):
        mask = (torch.arange(steps) < length).expand(BATCH, -1)
        residual = steered.residual(observations[:, :steps])
        x = meta.read(residual)
        proposals = meta.propose(x, meta.summarise(x), mask)
        segments = meta.segment(x, meta.summarise(x), proposals.mean, "soft")
        logits = steered(residual, segments.code)
        found.append([part[:, :length] for part in (proposals.mean, proposals.std, segments.code, logits)])
    for short, long in zip(*found, strict=True):
        close(short, long)


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


# ---------------------------------------------------------------------------------- the controller's factors


def test_controller_is_a_matrix_product() -> None:
    """U e, not e ⊙ rowsum(U): the Jacobian of what is written back is U with all its off-diagonal entries."""
    meta = tiny_metacontroller()
    residual, code = torch.randn(WIDTH), codes(1, 1)[0, 0]
    f = torch.cat([torch.relu(meta.features(code)), torch.ones(1)])
    down = torch.einsum("irk,k->ir", meta.down.unflatten(1, (SIZES.rank, -1)), f)
    up = torch.einsum("rkj,k->rj", meta.up.unflatten(0, (SIZES.rank, -1)), f)
    u = (down @ up).T.detach()
    jacobian = torch.autograd.functional.jacobian(lambda e: meta.control(e, code), residual)
    close(jacobian, torch.eye(WIDTH) + u)
    change = meta.control(residual, code).detach() - residual
    assert torch.linalg.matrix_rank(u) == SIZES.rank
    assert (change - residual * u.sum(1)).abs().max() > 0.1


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, Tensor):
                self.numel = max(self.numel, part.numel())
        return result


def test_no_matrix_of_the_width_squared_is_built() -> None:
    def largest(width: int) -> int:
        meta = Metacontroller(replace(SIZES, rank=16, controller_hidden=32), width)
        residual = torch.randn(2, 3, width, requires_grad=True)
        with Largest() as seen:
            meta.control(residual, codes(2, 3)).square().sum().backward()
        assert meta.down.grad is not None
        return seen.numel

    assert largest(2048) == 2048 * 16 * 33  # the gradient of one factor, and nothing larger
    assert largest(2048) == 2 * largest(1024)


def test_largest_tensor_would_catch_a_full_controller() -> None:
    """The counter above does see what it looks for, in either pass."""
    e = torch.randn(64, requires_grad=True)
    with Largest() as seen:
        torch.outer(e, e)
    assert seen.numel == 64 * 64


# ---------------------------------------------------------------------------------- hooks


def hooks(tap: ResidualTap) -> int:
    return sum(len(block._forward_hooks) for block in tap.blocks)


def test_hooks_are_removed_even_after_an_error(steered: SteeredModel, observations: Tensor) -> None:
    base, tap = steered.base, steered.tap
    before = base(observations).logits

    def fail(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), tap.steering(fail):
        base(observations)
    with pytest.raises(ZeroDivisionError), tap.skipping_lower_blocks(torch.zeros(1)), tap.steering(fail):
        base(observations)
    with pytest.raises(ZeroDivisionError):
        steered.step(observations[:, 0], steered.start(BATCH), lambda rows, x: fail(x))
    steered.residual(observations)
    assert hooks(tap) == 0
    assert not any("forward" in vars(block) for block in tap.blocks)
    assert torch.equal(base(observations).logits, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_hook_runs_once_under_gradient_checkpointing(reentrant: bool, observations: Tensor) -> None:
    """Checkpointing computes blocks again in the backward pass, when the tap is closed already."""
    gradients = []
    for checkpointing in (False, True):
        base = tiny_base("one-hot").requires_grad_(False)
        tap = ResidualTap(base)
        if checkpointing:
            base.backbone.activation_checkpointing_enable({"use_reentrant": reentrant})
            base.train()
        offset, calls = torch.zeros(WIDTH, requires_grad=True), []

        def steer(e: Tensor, offset: Tensor = offset, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return e + offset

        with tap.steering(steer):
            logits = base(observations).logits
        logits.square().sum().backward()
        assert len(calls) == 1
        gradients.append(offset.grad)
    close(*gradients)


def test_discovery_is_the_same_under_gradient_checkpointing(observations: Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        steered = tiny_steered()
        if checkpointing:
            steered.base.backbone.activation_checkpointing_enable()
            steered.train()
        torch.manual_seed(0)
        discovery(steered, observations)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in steered.metacontroller.parameters()]))
    close(*gradients)


def test_base_compiled_beforehand_is_refused(observations: Tensor) -> None:
    """torch.compile does not look for hooks again: without the check the tap would silently do nothing."""
    base = tiny_base("one-hot")
    tap = ResidualTap(base)
    torch._dynamo.reset()
    compiled = torch.compile(base, backend="eager")
    with torch.no_grad():
        compiled(observations)
        with pytest.raises(InternalRLError, match="torch.compile"), tap.steering(lambda e: e + 1):
            compiled(observations)
        with pytest.raises(InternalRLError, match="never reached the tap after block 1"):
            tap.read(compiled, observations=observations)
        with tap.steering(lambda e: e + 1):  # the model itself is as good as before
            steered = base(observations).logits
    assert hooks(tap) == 0
    assert (steered - base(observations).logits).abs().max() > 0.01
