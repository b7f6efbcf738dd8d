"""The counterfactual gradient of the switch: exact, confined to the switch, and without absorbing collapse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from internalrl.controller.metacontroller import Metacontroller, Proposals, Segmentation, held_code
from internalrl.controller.steered import SteeredModel
from internalrl.discovery import objective
from internalrl.discovery.evaluate import boundary_f1
from internalrl.discovery.objective import (
    SAMPLING_TEMPERATURE,
    Coefficients,
    Episodes,
    discovery_loss,
    elbo_terms,
    switch_loss,
)
from tests.support.reference_metacontroller import ReferenceMetacontroller, number, numbers
from tests.support.tiny import N_Z, SIZES, Readout, close, tiny_metacontroller

WIDTH, ACTIONS, STEPS = 6, 3, 7
LENGTHS = torch.tensor([STEPS, 4, 1, 2, 6, STEPS])
LARGEST = 0.5  # what one edit may count for here, so that some edits are cut and others are not
COEFFICIENTS = Coefficients(kl_coef=0.002, switch_cost=0.02)


class Case:
    """Episodes of different lengths, among them one of a single step, and a segmentation of them."""

    def __init__(self, meta: Metacontroller, lengths: Tensor = LENGTHS):
        meta.double()
        steps, count = int(lengths.max()), len(lengths)
        self.steered = Readout(meta, 0.3 * torch.randn(WIDTH, ACTIONS, dtype=torch.float64))
        mask = torch.arange(steps) < lengths[:, None]
        residual = torch.randn(count, steps, WIDTH, dtype=torch.float64)
        slow = torch.randn(count, steps, SIZES.slow_features, dtype=torch.float64)
        self.episodes = Episodes(residual, slow, torch.randint(ACTIONS, mask.shape), mask)
        self.x = meta.read(residual)
        self.before = meta.summarise(self.x)
        self.proposals = meta.propose(slow, mask)
        with torch.no_grad():
            given = self.x, self.before, self.proposals.sample, "straight-through", SAMPLING_TEMPERATURE
            meta.switch_head.bias -= meta.segment(*given).logit.median()  # open at about every other step
            self.drawn = meta.segment(*given)

    def loss(self, coefficients: Coefficients = COEFFICIENTS, **options: int) -> Tensor:
        given = (self.steered, self.episodes, coefficients, self.x, self.before, self.proposals, self.drawn)
        return switch_loss(*given, cost_of(*given), **options)


def cost_of(
    steered: SteeredModel,
    episodes: Episodes,
    coefficients: Coefficients,
    x: Tensor,
    before: Tensor,
    proposals: Proposals,
    drawn: Segmentation,
) -> Tensor:
    """The loss (B,) of the episodes as they were drawn."""
    code = held_code(proposals.sample, drawn.switch)
    terms = elbo_terms(steered, episodes, code, drawn.switch, proposals.kl(), coefficients)
    return terms.total(coefficients).detach()


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Fills with the steps (B,) of every edit that a switch loss makes."""
    steps: list[Tensor] = []
    choose = objective._steps_to_flip
    monkeypatch.setattr(objective, "_steps_to_flip", lambda *given: steps.append(choose(*given)) or steps[-1])
    return steps


def brute_force(case: Case, coefficients: Coefficients, chosen: list[Tensor]) -> tuple[float, list[float]]:
    """The loss and the effect of every edit, by scalar loops that compute each edited episode from its start."""
    reference = ReferenceMetacontroller(case.steered.metacontroller)
    readout, total, effects = numbers(case.steered.weight.T), 0.0, []
    proposals = case.proposals.sample, case.proposals.mean, case.proposals.std
    x, before, residual, sample, mean, std = map(numbers, (case.x, case.before, case.episodes.residual, *proposals))

    def cost(row: int, switch: list[float]) -> float:
        code, _ = reference.hold(x[row], before[row], sample[row], switch)
        actions = case.episodes.actions[row, : int(case.episodes.mask[row].sum())].tolist()
        flipped = [number(value) for value in switch]
        loss = reference.episode_loss(residual[row], actions, readout, mean[row], std[row], code, flipped, coefficients)
        return loss.item()

    for steps in chosen:
        for row, step in enumerate(steps.tolist()):
            switch = case.drawn.switch[row].tolist()
            closed, opened = ([*switch[:step], value, *switch[step + 1 :]] for value in (0.0, 1.0))
            effect = cost(row, opened) - cost(row, closed) if step > 0 else 0.0
            logit = reference.hold(x[row], before[row], sample[row], switch)[1][step].item()
            probability = 1 / (1 + math.exp(-logit))
            total -= min(abs(effect), LARGEST) * math.log(probability if effect < 0 else 1 - probability)
            effects.append(effect)
    return total / len(effects), effects


@pytest.mark.parametrize("weighting", ["switch-weighted", "every-step"])
def test_loss_is_that_of_brute_force(weighting: str, chosen: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "LARGEST_EFFECT", LARGEST)
    case, coefficients = Case(tiny_metacontroller(WIDTH)), replace(COEFFICIENTS, kl=weighting)
    ours = case.loss(coefficients, edits=3)
    expected, effects = brute_force(case, coefficients, chosen)
    assert ours.item() == pytest.approx(expected, abs=1e-5)
    assert min(effects) < 0 < max(effects)
    assert min(effect for effect in map(abs, effects) if effect) < LARGEST < max(map(abs, effects))


def test_discovery_adds_it_to_the_loss_of_the_same_segmentation() -> None:
    """The codes and the controller learn from the drawn switches as if they were given."""
    case = Case(tiny_metacontroller(WIDTH))
    meta, episodes = case.steered.metacontroller, case.episodes
    torch.manual_seed(1)
    loss, metrics = discovery_loss(case.steered, episodes, COEFFICIENTS, "counterfactual")
    torch.manual_seed(1)
    case.proposals = meta.propose(episodes.slow, episodes.mask)
    with torch.no_grad():
        given = case.x, case.before, case.proposals.sample, "straight-through", SAMPLING_TEMPERATURE
        case.drawn = meta.segment(*given)
    learned = case.loss()
    code, kl = held_code(case.proposals.sample, case.drawn.switch), case.proposals.kl()
    terms = objective.elbo_terms(case.steered, episodes, code, case.drawn.switch, kl, COEFFICIENTS)
    plain = terms.total(COEFFICIENTS).sum() / episodes.mask.sum()
    assert metrics["loss"] == pytest.approx(plain.item())
    close(loss, plain + learned)


def test_gradient_reaches_switch_and_history_alone() -> None:
    """What was read and proposed is taken as it is: codes must not change to suit the switch."""
    meta = tiny_metacontroller(WIDTH)
    Case(meta).loss().backward()
    reached = {id(p) for p in meta.parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == {id(p) for p in meta.parameters_of("switch", "history")}
    assert all(p.grad is None for p in meta.parameters_of("encoder", "controller"))


# ---------------------------------------------------------------------------------- which steps are flipped


def test_steps_are_real_and_never_the_first(chosen: list[Tensor]) -> None:
    case = Case(tiny_metacontroller(WIDTH))
    case.loss(edits=200)
    for row, length in enumerate(LENGTHS.tolist()):
        flipped = {int(steps[row]) for steps in chosen}
        assert flipped == (set(range(1, length)) if length > 1 else {0})


def test_half_of_the_flips_close_a_switch_where_there_is_any() -> None:
    switch, mask = torch.zeros(2000, 11), torch.ones(2000, 11, dtype=torch.bool)
    switch[:, [0, 4]] = 1
    assert objective._steps_to_flip(switch, mask).eq(4).float().mean() == pytest.approx(0.5 + 0.5 / 10, abs=0.05)
    switch[:, 4] = 0
    assert objective._steps_to_flip(switch, mask).bincount(minlength=11)[1:].min() > 2000 / 10 * 0.7


def test_flips_in_the_padding_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced there, they change nothing that is charged for."""
    monkeypatch.setattr(objective, "_steps_to_flip", lambda switch, mask: torch.full((len(mask),), 5))
    case = Case(tiny_metacontroller(WIDTH), torch.tensor([6, 5, 3, 1]))
    assert case.loss().item() > 1e-3
    case.episodes.mask[:, 5] = False
    assert case.loss().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1,), (2, 1)])
def test_episodes_of_one_step_have_nothing_to_learn(lengths: tuple[int, ...]) -> None:
    meta = tiny_metacontroller(WIDTH)
    case = Case(meta, torch.tensor(lengths))
    loss = case.loss()
    loss.backward()
    assert (loss.item() == 0) == (max(lengths) == 1)
    assert all(bool(p.grad.isfinite().all()) for p in meta.parameters_of("switch"))
    assert math.isfinite(discovery_loss(case.steered, case.episodes, COEFFICIENTS, "counterfactual")[0].item())


# ---------------------------------------------------------------------------------- no collapse is absorbing


@pytest.mark.parametrize("bias", [-30.0, 30.0])
def test_a_collapsed_gate_still_learns(bias: float) -> None:
    """Every switch that does not pay pushes an open gate, every one that would pay a closed one."""
    meta = tiny_metacontroller(WIDTH)
    case = Case(meta, LENGTHS.repeat(10))
    nn.init.zeros_(meta.switch_head.weight)
    nn.init.constant_(meta.switch_head.bias, bias)
    gradients = {}
    for mode in ("straight-through", "counterfactual"):
        meta.zero_grad()
        discovery_loss(case.steered, case.episodes, COEFFICIENTS, mode)[0].backward()
        gradients[mode] = meta.switch_head.bias.grad.item()
    assert abs(gradients["straight-through"]) < 1e-9
    assert math.copysign(1, bias) * gradients["counterfactual"] > 0.05


class CodeIsAction:
    """Stands in for a steered model that does what the code says, whatever it reads."""

    def __init__(self, meta: Metacontroller):
        self.metacontroller = meta

    def __call__(self, residual: Tensor, code: Tensor, where: Tensor | None = None) -> Tensor:
        return 4 * code


def marked_episodes(count: int, steps: int = 16) -> tuple[Episodes, Tensor, Tensor]:
    """Episodes whose action changes where feature 0 of the residual says so, and nowhere else.

    Returns them, the boundaries (B, T) and codes (B, T, n_z) that name each step's action.
    """
    boundary = torch.rand(count, steps) < 0.2
    boundary[:, 0] = False
    actions = (torch.randint(N_Z, (count, 1)) + boundary.cumsum(1)) % N_Z
    residual = torch.randn(count, steps, WIDTH)
    residual[..., 0] = torch.where(boundary, 4.0, -4.0)
    mask = torch.arange(steps) < torch.randint(2, steps + 1, (count, 1))
    slow = torch.zeros(count, steps, SIZES.slow_features)  # codes are given
    return Episodes(residual, slow, actions, mask), boundary & mask, nn.functional.one_hot(actions, N_Z).float()


@pytest.mark.parametrize("bias", [-6.0, 6.0])
def test_the_switch_learns_to_fire_where_it_pays(bias: float) -> None:
    """From a gate that is shut or open throughout, and from this loss alone."""
    meta = Metacontroller(replace(SIZES, n_z=N_Z), WIDTH)
    nn.init.constant_(meta.switch_head.bias, bias)
    steered, optimizer = CodeIsAction(meta), torch.optim.Adam(meta.parameters_of("switch"), lr=0.02)

    def segments(episodes: Episodes, sample: Tensor, mode: str) -> tuple[Tensor, Tensor, Segmentation]:
        x = meta.read(episodes.residual)
        before = meta.summarise(x).detach()
        return x, before, meta.segment(x, before, sample, mode, SAMPLING_TEMPERATURE)

    for _ in range(250):
        episodes, _, sample = marked_episodes(64)
        proposals = Proposals(sample, torch.full_like(sample, 0.5), sample)
        x, before, drawn = segments(episodes, sample, "straight-through")
        drawn.switch = drawn.switch.detach()
        given = (steered, episodes, Coefficients(0.1, 0.2), x, before, proposals, drawn)
        loss = switch_loss(*given, cost_of(*given))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    episodes, boundary, sample = marked_episodes(256)
    switch = segments(episodes, sample, "hard")[2].switch > 0.5
    assert boundary_f1(switch, boundary, episodes.mask, tolerance=0) == 1
