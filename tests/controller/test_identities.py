"""What must hold exactly between the ways of running the steered model, its switch and its controller."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from internalrl.controller.metacontroller import Metacontroller, gate
from internalrl.controller.policy import Policy, PolicyActor
from internalrl.controller.steered import SteeredModel
from internalrl.players.stepwise import rollout
from internalrl.reinforce.recording import Recording
from tests.support.tiny import (
    BATCH,
    GRID,
    N_Z,
    RELAXED_MODES,
    SIZES,
    STEPS,
    WIDTH,
    close,
    codes,
    decode,
    environment,
    tiny_metacontroller,
    tiny_steered,
)

pytestmark = pytest.mark.versions

MODES = (*RELAXED_MODES, "hard")


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
        output = steered.base(observations[:, t : t + 1], cache=cache, use_cache=True)
        cache = output.cache
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
        steered.step(observations[:, t], decoding, lambda rows, x: seen.append(x) or codes(len(rows), 1)[:, 0])
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
    played = rollout(steered, environment(24), actor, temperature=1.0, generator=torch.Generator().manual_seed(0))
    _, chosen, mask = actor.segments()
    assert torch.equal(mask.sum(1), played.switch.sum(1))
    assert torch.equal(chosen[mask], played.code[played.switch])


# ---------------------------------------------------------------------------------- segments that forget


def forgetful_segments(switch: Tensor) -> Tensor:
    """Segment numbers (B, T): a step at which the switch fires, after the first, sees and is seen by no other."""
    alone = switch.clone()
    alone[:, 0] = False
    after = torch.zeros_like(alone)
    after[:, 1:] = alone[:, :-1]
    return (alone | after).long().cumsum(1)


def test_forgetting_is_a_full_forward_with_segments(steered: SteeredModel, observations: Tensor) -> None:
    decoded, decoding = decode(steered, observations, codes(BATCH, STEPS), forget=True)
    assert varied(decoded.switch)
    segments = forgetful_segments(decoded.switch)
    kept = decoding.cache.length
    assert torch.equal(decoding.segments.diff(dim=1) != 0, segments[:, -kept:].diff(dim=1) != 0)
    residual = steered.residual(observations, segments)
    close(decoded.logits, steered(residual, decoded.code, segments=segments))
    remembered, _ = decode(steered, observations, codes(BATCH, STEPS))
    assert (remembered.logits - decoded.logits).abs().max() > 1e-3


def test_forgetting_is_each_segment_alone(steered: SteeredModel, observations: Tensor) -> None:
    decoded, _ = decode(steered, observations, codes(BATCH, STEPS), forget=True)
    for row, numbers in enumerate(forgetful_segments(decoded.switch)):
        starts = [0, *(numbers.diff().nonzero().squeeze(-1) + 1).tolist(), STEPS]
        for begin, end in pairwise(starts):
            part = slice(begin, end)
            alone, code = observations[row : row + 1, part], decoded.code[row : row + 1, part]
            close(steered(steered.residual(alone), code)[0], decoded.logits[row, part])
            again, _ = decode(steered, alone, code)
            close(again.logits[0], decoded.logits[row, part])
            # within the segment the switch, too, remembers nothing of what came before
            close(again.switch_logit[0, 1:], decoded.switch_logit[row, begin + 1 : end])


def test_a_fresh_context_does_not_fire(steered: SteeredModel, observations: Tensor) -> None:
    """A switch that is always open fires at every other step once it is made to forget: at the first two, since
    nothing is cut at the first. Where it must not fire, the code stays."""
    nn.init.constant_(steered.metacontroller.switch_head.bias, 1e3)
    proposals = codes(BATCH, STEPS)
    remembered, _ = decode(steered, observations, proposals)
    assert remembered.switch.all()
    decoded, decoding = decode(steered, observations, proposals, forget=True)
    assert decoding.cache.length <= 2, "steps that nobody can see any more are dropped"
    assert (decoded.switch_logit > 0).all()
    assert decoded.switch.tolist() == [[True] + [t % 2 == 1 for t in range(1, STEPS)]] * BATCH
    opened = [0, *(t if t % 2 else t - 1 for t in range(1, STEPS))]
    assert torch.equal(decoded.code, proposals[:, opened])


def test_peek_sees_what_step_will_see_and_leaves_no_trace(steered: SteeredModel, observations: Tensor) -> None:
    for forget in (False, True):
        silenced = 0
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
            silenced += int(((step.switch_logit > 0) & ~switch).sum())
            assert torch.equal(step.logits, plain.logits[:, t])
            if switch.any():
                assert torch.equal(seen["x"], x[seen["rows"]])
        assert (silenced > 0) == forget


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
    """β = 1 adopts the new code and β = 0 keeps the old one, exactly; an inverted gate fails here."""
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


@pytest.mark.parametrize("mode", RELAXED_MODES)
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


def test_a_controller_that_was_built_does_what_control_does() -> None:
    """Also after rows were exchanged, taken out and added."""
    meta = tiny_metacontroller()
    residual, code, other = torch.randn(4, 3, WIDTH), codes(4, 1), codes(2, 1, seed=1)
    built = meta.controller(code[:, 0])
    close(built(residual), meta.control(residual, code))
    built.put(torch.tensor([2, 0]), meta.controller(other[:, 0]))
    built = built.select(torch.tensor([0, 3, 1])).join(meta.controller(code[2:3, 0]))
    close(built(residual), meta.control(residual, torch.stack([other[1], code[3], code[1], code[2]])))


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
