"""The metacontroller against the same equations written as scalar loops: values and gradients to 1e-5."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from internalrl.controller.metacontroller import Metacontroller, Proposals, gate
from internalrl.discovery.objective import Coefficients, Episodes, discovery_loss
from tests.support.reference_metacontroller import (
    ReferenceMetacontroller,
    array,
    kl,
    kl_by_integration,
    normalise,
    number,
    numbers,
)
from tests.support.tiny import SIZES, Readout, tiny_metacontroller

WIDTH, N_Z, BATCH, STEPS, ACTIONS = 4, 2, 2, 5, 3
LENGTHS = (STEPS, 3)
MASK = torch.arange(STEPS) < torch.tensor(LENGTHS)[:, None]
TINY = replace(SIZES, n_z=N_Z, n_h=3, encoder_hidden=4, switch_hidden=3, controller_hidden=3)
MODES = ("soft", "gumbel", "straight-through", "hard")
TEMPERATURE = 0.7


def close(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def meta(inputs: tuple[Tensor, ...]) -> Metacontroller:
    """Its switch fires at about every other step of `inputs`."""
    meta = tiny_metacontroller(WIDTH, TINY).double()
    with torch.no_grad():
        meta.switch_head.bias -= meta.segment(*inputs, "soft").logit.median()
    return meta


@pytest.fixture
def reference(meta: Metacontroller) -> ReferenceMetacontroller:
    return ReferenceMetacontroller(meta)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """What is read (B, T, n_e), the histories before (B, T, n_h) and proposals (B, T, n_z)."""
    return draw(BATCH, STEPS, WIDTH), draw(BATCH, STEPS, TINY.n_h, seed=1), draw(BATCH, STEPS, N_Z, seed=2)


@pytest.fixture
def slow() -> Tensor:
    """Slow features (B, T, k), also where there are no steps any more."""
    return draw(BATCH, STEPS, TINY.slow_features, seed=3)


def compare_gradients(meta: Metacontroller, reference: ReferenceMetacontroller, touched: tuple[str, ...]) -> None:
    """Gradients of every parameter; exactly those of the parts in `touched` must have one."""
    expected = {id(parameter) for parameter in meta.parameters_of(*touched)}
    for name, parameter in meta.named_parameters():
        theirs = reference.weights[name].grad
        assert (parameter.grad is not None) == (theirs is not None) == (id(parameter) in expected), name
        if theirs is not None:
            close(parameter.grad, theirs)


def weighted_sum(*parts: Tensor) -> Tensor:
    """A scalar in which every number counts differently, so that no two gradients can be mixed up."""
    return sum((draw(*part.shape, seed=9 + i) * part).sum() for i, part in enumerate(parts))


def test_read_normalises_over_units(meta: Metacontroller, inputs: tuple[Tensor, ...]) -> None:
    residual = 3 * inputs[0] + 1
    close(meta.read(residual), array([[normalise(x) for x in row] for row in numbers(residual)]))


def test_summarise(meta: Metacontroller, reference: ReferenceMetacontroller, inputs: tuple[Tensor, ...]) -> None:
    x = inputs[0]
    ours, theirs = meta.summarise(x), array([reference.summarise(row) for row in numbers(x)])
    close(ours, theirs)
    weighted_sum(ours).backward()
    weighted_sum(theirs).backward()
    compare_gradients(meta, reference, ("history",))


def test_slow_features(meta: Metacontroller, reference: ReferenceMetacontroller, inputs: tuple[Tensor, ...]) -> None:
    inferred = 3 * inputs[0] + 1
    ours = meta.slow_features(inferred)
    close(ours, array([[reference.slow_features(step) for step in row] for row in numbers(inferred)]))
    assert ours.std() > 0.1


def test_propose_with_right_padding(meta: Metacontroller, reference: ReferenceMetacontroller, slow: Tensor) -> None:
    ours = meta.propose(slow, MASK)
    theirs = [reference.propose(row, length) for row, length in zip(numbers(slow), LENGTHS, strict=True)]
    mean, std = (torch.cat([array(row[part]) for row in theirs]) for part in (0, 1))
    close(ours.mean[MASK], mean)
    close(ours.std[MASK], std)
    weighted_sum(ours.mean[MASK], ours.std[MASK]).backward()
    weighted_sum(mean, std).backward()
    compare_gradients(meta, reference, ("encoder",))


def test_embedding_sees_the_horizon_and_no_further(meta: Metacontroller) -> None:
    """Of t, t + 1, …, and nothing before; the end of the episode shows."""
    slow = leaf(1, STEPS, TINY.slow_features)
    for t in range(STEPS):
        gradient = torch.autograd.grad(meta.embed_future(slow, MASK[:1])[0, t].sum(), slow)[0][0].abs().sum(1)
        assert (gradient > 0).tolist() == [t <= step < t + TINY.horizon for step in range(STEPS)]
    ended = meta.embed_future(torch.zeros(2, STEPS, TINY.slow_features).double(), MASK)
    assert torch.equal(ended[0, 0], ended[1, 0])
    assert not torch.allclose(ended[0, 1], ended[1, 1])


def test_proposal_is_mean_plus_std_times_noise(meta: Metacontroller, slow: Tensor) -> None:
    torch.manual_seed(3)
    ours = meta.propose(slow, MASK)
    torch.manual_seed(3)
    close(ours.sample, ours.mean + ours.std * torch.randn(BATCH, STEPS, N_Z, dtype=torch.float64))


def test_parse(
    meta: Metacontroller, reference: ReferenceMetacontroller, inputs: tuple[Tensor, ...], slow: Tensor
) -> None:
    """Hard switches on the histories of the residual, mean codes; no random number is drawn."""
    residual, state = 3 * inputs[0] + 1, torch.get_rng_state()
    segments, proposals = meta.parse(residual, slow, MASK)
    assert torch.equal(state, torch.get_rng_state())
    nothing = numbers(torch.full((STEPS,), torch.nan))
    switches = []
    for row, length in enumerate(LENGTHS):
        x = [normalise(step) for step in numbers(residual[row, :length])]
        means, stds = reference.propose(numbers(slow[row]), length)
        code, switch, logit = reference.segment(x, reference.summarise(x), means, nothing, "hard", 1.0)
        for ours, theirs in zip((segments.code, segments.switch, segments.logit), (code, switch, logit), strict=True):
            close(ours[row, :length], array(theirs))
        close(proposals.kl()[row, :length], array([kl(*step) for step in zip(means, stds, strict=True)]))
        switches += [float(value) for value in switch[1:]]
    assert 0 < sum(switches) < len(switches)


def test_kl(inputs: tuple[Tensor, ...]) -> None:
    mean, std = inputs[2], draw(BATCH, STEPS, N_Z, seed=4).exp()
    ours = Proposals(mean, std, mean).kl()
    pairs = [zip(*rows, strict=True) for rows in zip(numbers(mean), numbers(std), strict=True)]
    close(ours, array([[kl(*step) for step in row] for row in pairs]))
    by_hand = sum(kl_by_integration(float(mean[0, 0, i]), float(std[0, 0, i])) for i in range(N_Z))
    assert float(ours[0, 0]) == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("mode", MODES)
def test_gate(mode: str, temperature: float, reference: ReferenceMetacontroller) -> None:
    """A sample is 1 with probability σ(logit / temperature); a temperature of 0.3 sharpens it, 2 blurs it."""
    logit, uniform = leaf(300), torch.rand(300, dtype=torch.float64)
    noise = torch.logit(uniform) if mode in ("gumbel", "straight-through") else torch.zeros(300)
    ours = gate(logit, noise, mode, temperature)
    theirs = [reference.gate(*pair, mode, temperature) for pair in zip(logit, uniform, strict=True)]
    close(ours, array(theirs))
    if mode != "hard":
        gradient = torch.autograd.grad(ours.sum(), logit)[0]
        close(gradient, torch.autograd.grad(array(theirs).sum(), logit)[0])
    if mode == "straight-through":
        frequency = gate(torch.tensor(0.6), torch.logit(torch.rand(100_000)), mode, temperature).mean()
        assert float(frequency) == pytest.approx(1 / (1 + math.exp(-0.6 / temperature)), abs=0.01)


@pytest.mark.parametrize("mode", MODES)
def test_segment(
    mode: str, meta: Metacontroller, reference: ReferenceMetacontroller, inputs: tuple[Tensor, ...]
) -> None:
    x, before, proposal = inputs
    torch.manual_seed(5)
    ours = meta.segment(x, before, proposal, mode, TEMPERATURE)
    torch.manual_seed(5)
    uniform = torch.rand(BATCH, STEPS, dtype=torch.float64)
    theirs = [
        reference.segment(*rows, mode, TEMPERATURE) for rows in zip(*map(numbers, (*inputs, uniform)), strict=True)
    ]
    code, switch, logit = (array([row[part] for row in theirs]) for part in range(3))
    close(ours.code, code)
    close(ours.switch, switch)
    close(ours.logit, logit)
    assert 0 < switch[:, 1:].detach().mean() < 1  # both kinds of steps occur
    weighted_sum(ours.code, ours.switch, ours.logit).backward()
    weighted_sum(code, switch, logit).backward()
    compare_gradients(meta, reference, ("switch",))


def test_hold(meta: Metacontroller, reference: ReferenceMetacontroller, inputs: tuple[Tensor, ...]) -> None:
    switch = torch.tensor([[1, 0, 1, 1, 0], [1, 0, 0, 0, 1]]).double()
    ours = meta.hold(*inputs, switch)
    theirs = [reference.hold(*rows) for rows in zip(*map(numbers, (*inputs, switch)), strict=True)]
    code, logit = (array([row[part] for row in theirs]) for part in range(2))
    close(ours.code, code)
    close(ours.logit, logit)
    assert torch.equal(ours.switch, switch)
    weighted_sum(ours.logit).backward()
    weighted_sum(logit).backward()
    compare_gradients(meta, reference, ("switch",))


def test_switch_logit(meta: Metacontroller, reference: ReferenceMetacontroller, inputs: tuple[Tensor, ...]) -> None:
    x, before, code = (part[0, 0] for part in inputs)
    ours = meta.switch_logit(meta.switch_context(torch.cat([x, before])), code)
    close(ours, reference.switch_logit(*map(numbers, (x, before, code))))


def test_advance_is_the_step_of_segment_and_summarise(
    meta: Metacontroller, reference: ReferenceMetacontroller, inputs: tuple[Tensor, ...]
) -> None:
    x, before, code = (part[:, 1] for part in inputs)
    state = meta.start(BATCH)
    state.history, state.code, state.started = before, code, torch.tensor([True, False])
    switch, logit, history = meta.advance(x, state)
    for row in range(BATCH):
        expected = reference.switch_logit(*(numbers(part[row]) for part in (x, before, code)))
        close(logit[row], expected)
        close(history[row], array(reference.gru("history", numbers(x[row]), numbers(before[row]))))
        assert bool(switch[row]) == bool(expected > 0 or row == 1)


def test_control(meta: Metacontroller, reference: ReferenceMetacontroller, inputs: tuple[Tensor, ...]) -> None:
    residual, _, code = inputs
    ours = meta.control(residual, code)
    pairs = [zip(*rows, strict=True) for rows in zip(numbers(residual), numbers(code), strict=True)]
    theirs = array([[reference.control(*step) for step in row] for row in pairs])
    close(ours, theirs)
    assert (ours - residual).detach().abs().mean() > 0.1
    weighted_sum(ours).backward()
    weighted_sum(theirs).backward()
    compare_gradients(meta, reference, ("controller",))


def reference_loss(
    reference: ReferenceMetacontroller,
    residual: Tensor,
    slow: Tensor,
    actions: Tensor,
    readout: Tensor,
    noise: Tensor,
    uniform: Tensor,
    mode: str,
    coefficients: Coefficients,
) -> Tensor:
    """The discovery loss, one episode at a time; mode "random" switches where `uniform` < 0.5."""
    total = number(0.0)
    for row, length in enumerate(LENGTHS):
        e = numbers(residual[row])
        x = [normalise(step) for step in e]
        before = reference.summarise(x)
        means, stds = reference.propose(numbers(slow[row]), length)
        proposal = [
            [m + s * n for m, s, n in zip(*step, strict=True)]
            for step in zip(means, stds, numbers(noise[row, :length]), strict=True)
        ]
        if mode == "random":
            switches = [number(1.0 if t == 0 or uniform[row, t] < 0.5 else 0.0) for t in range(length)]
            found, _ = reference.hold(x[:length], before[:length], proposal, switches)
        else:
            found, switches, _ = reference.segment(
                x[:length], before[:length], proposal, numbers(uniform[row]), mode, TEMPERATURE
            )
        acted = actions[row, :length].tolist()
        total = total + reference.episode_loss(e, acted, numbers(readout.T), means, stds, found, switches, coefficients)
    return total / sum(LENGTHS)


@pytest.mark.parametrize("weighting", ["switch-weighted", "every-step"])
@pytest.mark.parametrize("mode", [*MODES, "random"])
def test_discovery_loss(
    mode: str,
    weighting: str,
    meta: Metacontroller,
    reference: ReferenceMetacontroller,
    slow: Tensor,
) -> None:
    residual, actions = draw(BATCH, STEPS, WIDTH, seed=6), torch.tensor([[0, 2, 1, 1, 0], [2, 2, 0, 0, 0]])
    readout = draw(WIDTH, ACTIONS, seed=7)
    coefficients = Coefficients(kl_coef=0.3, switch_cost=0.2, kl=weighting)
    warmup = mode == "random"
    torch.manual_seed(8)
    loss, _ = discovery_loss(
        Readout(meta, readout),
        Episodes(residual, slow, actions, MASK),
        coefficients,
        mode="soft" if warmup else mode,
        temperature=TEMPERATURE,
        random_switch=0.5 if warmup else None,
    )
    torch.manual_seed(8)
    noise = torch.randn(BATCH, STEPS, N_Z, dtype=torch.float64)
    uniform = torch.rand(BATCH, STEPS, dtype=None if warmup else torch.float64)
    expected = reference_loss(reference, residual, slow, actions, readout, noise, uniform, mode, coefficients)
    close(loss, expected)
    loss.backward()
    expected.backward()
    learned = ("encoder", "controller", "history", "switch")
    compare_gradients(meta, reference, learned[:2] if mode in ("hard", "random") else learned)


# ---------------------------------------------------------------------------------------------- gradcheck


def seeded(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The same noise at every call, as numerical differentiation needs."""

    def call(*args: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return function(*args)

    return call


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed).requires_grad_()


def test_gradcheck_control(meta: Metacontroller) -> None:
    assert torch.autograd.gradcheck(meta.control, (leaf(2, WIDTH), leaf(2, N_Z, seed=1)))


@pytest.mark.parametrize("mode", ["soft", "gumbel"])
def test_gradcheck_segment(meta: Metacontroller, mode: str) -> None:
    def segment(x: Tensor, before: Tensor, proposal: Tensor) -> tuple[Tensor, ...]:
        found = meta.segment(x, before, proposal, mode, TEMPERATURE)
        return found.code, found.switch, found.logit

    leaves = (leaf(1, 3, WIDTH), leaf(1, 3, TINY.n_h, seed=1), leaf(1, 3, N_Z, seed=2))
    assert torch.autograd.gradcheck(seeded(segment), leaves)


def test_gradcheck_propose(meta: Metacontroller) -> None:
    def propose(slow: Tensor) -> tuple[Tensor, ...]:
        found = meta.propose(slow, MASK[:, :4])
        return found.mean, found.std, found.sample, found.kl()

    assert torch.autograd.gradcheck(seeded(propose), (leaf(BATCH, 4, TINY.slow_features),))
