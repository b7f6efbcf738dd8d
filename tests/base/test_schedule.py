"""What changes from step to step in discovery and pretraining: α, the cost of a switch, the learning rate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from internalrl.base import pretrain
from internalrl.discovery.train import coefficients_at, rate_at
from internalrl.settings.options import PRESETS
from internalrl.settings.schema import from_dict
from internalrl.settings.stages import DiscoverConfig, PretrainConfig, ReinforceConfig

# Forms in steps 0-9, squeezes in 10-29, holds in 30-34, rises in 35-44, ends after 129.
PHASES = DiscoverConfig(
    form_steps=10, squeeze_steps=20, switch_steps=100, hold_steps=5, rise_steps=10,
    kl_coef_form=0.01, kl_coef_squeeze=0.04, kl_coef=0.16, switch_cost_start=0.1, switch_cost=0.4, decay=0.5,
)  # fmt: skip
TOTAL = 130


def constant_from(step: int, config: DiscoverConfig) -> bool:
    """Whether α and c have their final values from `step` on, and α not before."""
    found = [coefficients_at(k, config) for k in range(TOTAL)]
    settled = [(c.kl_coef, c.switch_cost) == pytest.approx((config.kl_coef, config.switch_cost)) for c in found]
    return settled == [k >= step for k in range(TOTAL)]


@pytest.mark.parametrize(
    ("step", "kl_coef", "switch_cost"),
    [
        (0, 0.01, 0.1),
        (10, 0.01, 0.1),
        (20, 0.02, 0.1),
        (30, 0.04, 0.1),
        (35, 0.04, 0.1),
        (40, 0.08, 0.2),
        (45, 0.16, 0.4),
    ],
)
def test_phases(step: int, kl_coef: float, switch_cost: float) -> None:
    found = coefficients_at(step, PHASES)
    assert (found.kl_coef, found.switch_cost) == pytest.approx((kl_coef, switch_cost))
    assert constant_from(45, PHASES)


@pytest.mark.parametrize(
    ("absent", "first", "constant"),
    [
        ({"form_steps": 0}, 0.01, 35),
        ({"squeeze_steps": 0}, 0.01, 25),
        ({"rise_steps": 0}, 0.01, 35),
        ({"form_steps": 0, "squeeze_steps": 0}, 0.04, 15),
        ({"squeeze_steps": 0, "hold_steps": 0, "rise_steps": 0}, 0.01, 10),
        ({"form_steps": 0, "squeeze_steps": 0, "hold_steps": 0, "rise_steps": 0}, 0.16, 0),
    ],
)
def test_a_phase_without_steps_is_over_when_it_begins(absent: dict[str, int], first: float, constant: int) -> None:
    config = replace(PHASES, **absent)
    assert coefficients_at(0, config).kl_coef == pytest.approx(first)
    assert constant_from(constant, config)


def test_squeezing_at_once() -> None:
    config = replace(PHASES, squeeze_steps=0)
    assert [coefficients_at(step, config).kl_coef for step in (9, 10)] == pytest.approx([0.01, 0.04])


def test_alpha_can_be_zero() -> None:
    """It is one of the paper's; nothing is lost but the penalty."""
    config = replace(PHASES, kl_coef_form=0, kl_coef_squeeze=0, kl_coef=0, switch_cost_start=0, switch_cost=0)
    assert all(coefficients_at(step, config).kl_coef == 0 for step in range(TOTAL))


@pytest.mark.parametrize(
    ("decay", "step", "factor"),
    [
        (0.0, 0, 1), (0.0, 30, 1), (0.0, 129, 1),
        (0.5, 29, 1), (0.5, 80, 1), (0.5, 105, 0.5), (0.5, 129, 0.02),
        (1.5, 29, 1), (1.5, 30, 2 / 3), (1.5, 80, 1 / 3),
    ],
)  # fmt: skip
def test_learning_rate_of_discovery(decay: float, step: int, factor: float) -> None:
    assert rate_at(step, replace(PHASES, decay=decay)) == pytest.approx(factor)


def paper(stage: str, config: type, **changed: Any) -> Any:
    return replace(from_dict(config, PRESETS["paper"][stage]), **changed)


def test_the_paper_neither_cuts_contexts_nor_crops() -> None:
    assert not paper("reinforce", ReinforceConfig).forget
    assert paper("discover", DiscoverConfig).crop == 0


def test_the_papers_rates_and_alpha_are_constant() -> None:
    """After stage 1's short warm-up; whatever α is asked for, it holds from the first step."""
    config = paper("pretrain", PretrainConfig, steps=100)
    assert {pretrain.rate_at(step, config) for step in range(pretrain.WARMUP_STEPS, 100)} == {1.0}
    for kl_coef in (0.0, 0.05, 0.17, 1.0):
        config = paper("discover", DiscoverConfig, switch_steps=100, kl_coef=kl_coef)
        found = [coefficients_at(step, config) for step in range(100)]
        assert {(c.kl_coef, c.switch_cost, c.kl) for c in found} == {(kl_coef, 0.0, "every-step")}
        assert {rate_at(step, config) for step in range(100)} == {1.0}
