"""Slow features: a latent that persists is found in what the base infers, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from internalrl.base.batches import held_out
from internalrl.controller.steered import SteeredModel
from internalrl.discovery import train
from internalrl.discovery.grid import GridMaterial
from internalrl.discovery.objective import Episodes
from internalrl.discovery.slow import slow_features
from internalrl.errors import InternalRLError
from internalrl.settings.stages import DiscoverConfig
from tests.support.finished import SMALL, small_base, small_steered
from tests.support.tiny import SIZES, STEPS, close, tiny_base

PERSISTENCE = (0.95, 0.8, 0.0, 0.0, 0.0, -0.5)
"""Correlation of each source with itself a step later: two that last, noise, and one that alternates."""
LAG = 3


def sources(count: int = 200, steps: int = 40) -> Tensor:
    """(count, steps, 6) of unit variance, without correlation among each other: first-order autoregressions."""
    generator = torch.Generator().manual_seed(0)
    rho = torch.tensor(PERSISTENCE)
    noise = torch.randn(steps, count, len(rho), generator=generator)
    found = [noise[0]]
    for fresh in noise[1:]:
        found.append(rho * found[-1] + (1 - rho**2).sqrt() * fresh)
    return torch.stack(found, 1)


def mixed(latent: Tensor) -> Tensor:
    """Ten linear readings of the six sources, the slow ones the faintest, and an offset."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(6, 10, generator=generator) * torch.tensor([0.6, 0.6, 1, 1, 1, 1])[:, None]
    return latent @ mixing + torch.randn(10, generator=generator)


MASK = torch.arange(40) < torch.randint(10, 41, (200, 1), generator=torch.Generator().manual_seed(2))


def correlation(a: Tensor, b: Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1]))


def test_slow_sources_are_recovered_from_a_mixture() -> None:
    latent = sources()
    x = mixed(latent)
    mean, projection, persistence = slow_features(x, MASK, 2, LAG)
    assert (mean.shape, projection.shape, persistence.shape) == ((10,), (10, 2), (10,))
    close(mean, x[MASK].mean(0))
    found = ((x - mean) @ projection)[MASK]
    for k in range(2):
        assert correlation(found[:, k], latent[MASK][:, k]) > 0.97
    assert found.std(0).tolist() == pytest.approx([1, 1], abs=0.08)  # some of the variance goes to the ridge
    assert correlation(found[:, 0], found[:, 1]) < 0.03


def test_persistence_falls_and_is_that_of_the_features() -> None:
    """The largest first, as the autocorrelation of the feature at the lag; noise has none, zigzag a negative one."""
    x = mixed(sources())
    mean, projection, persistence = slow_features(x, MASK, 10, LAG)
    assert (persistence.diff() <= 0).all()
    assert persistence[:2].tolist() == pytest.approx([0.95**LAG, 0.8**LAG], abs=0.08)
    assert persistence[2:-1].abs().max() < 0.08
    assert float(persistence[-1]) == pytest.approx((-0.5) ** LAG, abs=0.05)
    found = (x - mean) @ projection
    both = MASK[:, LAG:]
    for k in range(2):
        own = torch.corrcoef(torch.stack([found[:, :-LAG, k][both], found[:, LAG:, k][both]]))[0, 1]
        assert float(own) == pytest.approx(float(persistence[k]), abs=0.05)


def test_what_persists_does_so_in_either_direction_of_time() -> None:
    x, whole = mixed(sources()), MASK | True
    mean, _, persistence = slow_features(x, whole, 2, LAG)
    same_mean, _, same = slow_features(x.flip(1), whole, 2, LAG)
    close(mean, same_mean)
    close(persistence, same)


def test_padding_is_not_looked_at() -> None:
    x = mixed(sources())
    garbage = torch.where(MASK[..., None], x, 1e3 * torch.ones(10))
    for ours, theirs in zip(slow_features(x, MASK, 3, LAG), slow_features(garbage, MASK, 3, LAG), strict=True):
        assert torch.equal(ours, theirs)


def test_what_has_no_slow_features_is_refused() -> None:
    x = mixed(sources(20))
    with pytest.raises(InternalRLError, match=r"^slow_lag is 40, but no episode has more than 40 steps; give less\.$"):
        slow_features(x, MASK[:20] | True, 2, lag=40)
    slow_features(x, MASK[:20] | True, 2, lag=39)
    with pytest.raises(InternalRLError, match="infers nothing from the past"):
        slow_features(torch.ones_like(x), MASK[:20], 2, LAG)


# ---------------------------------------------------------------------------------- what the base has inferred


def test_nothing_is_inferred_at_the_first_step(steered: SteeredModel, observations: Tensor) -> None:
    residual = steered.residual(observations)
    inferred = steered.inferred(observations, residual)
    close(inferred[:, 0], torch.zeros_like(inferred[:, 0]))
    assert inferred[:, 1:].abs().mean() > 0.1 * residual.abs().mean()


def test_what_is_inferred_comes_from_the_past(steered: SteeredModel, observations: Tensor) -> None:
    """It differs after another past, and does not depend on what is yet to come."""
    other = torch.where((torch.arange(STEPS) == 2)[:, None], observations.roll(1, 1), observations)
    first, second = (steered.inferred(o, steered.residual(o)) for o in (observations, other))
    close(first[:, :2], second[:, :2])
    assert (first[:, 4:] - second[:, 4:]).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("encoder", ["one-hot", "planner"])
def test_a_base_that_looks_at_the_present_alone_infers_nothing(encoder: str, observations: Tensor) -> None:
    """Not even what the planner's embedding keeps of the step before."""
    base = tiny_base(encoder)
    for block in base.backbone.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    steered = SteeredModel(base, SIZES)
    inferred = steered.inferred(observations, steered.residual(observations))
    close(inferred, torch.zeros_like(inferred))


def test_discovery_begins_by_finding_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On demonstrations of all lengths, the same for every run of a seed; training leaves them alone."""
    steered, again = (small_steered(small_base()) for _ in range(2))
    seen: list[Tensor] = []

    def finding(x: Tensor, mask: Tensor, *sizes: int) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(mask.sum(1).float())
        return slow_features(x, mask, *sizes)

    monkeypatch.setattr(train, "slow_features", finding)
    for model in (steered, again):
        train.find_slow_features(model, GridMaterial(SMALL, seed=0), DiscoverConfig())
    meta, other = steered.metacontroller, again.metacontroller
    assert torch.equal(meta.slow, other.slow)
    assert torch.equal(meta.slow_mean, other.slow_mean)
    fresh = held_out(SMALL, 256, seed=0)
    assert seen[0].std() > 0.8 * fresh.mask.sum(1).float().std()
    found = Episodes.of(steered, fresh).slow[fresh.mask]
    assert found.shape[1] == SIZES.slow_features
    assert found.mean(0).tolist() == pytest.approx([0, 0], abs=0.1)
    assert found.std(0).tolist() == pytest.approx([1, 1], abs=0.15)
    assert {"slow", "slow_mean"} == meta.state_dict().keys() - {name for name, _ in meta.named_parameters()}
