"""Intervals have the values of their sources, and serving gets them without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from internalrl.analysis.statistics import difference_interval, mean_interval, wilson

FIRST = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
SECOND = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)
"""Hours of sleep gained by two drugs, from Student (1908)."""


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (8, 10, 0.490163, 0.943318),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (1, 1, 0.206549, 1.0),
        (81, 263, 0.255289, 0.366214),
    ],
)
def test_wilson_interval(successes: int, count: int, low: float, high: float) -> None:
    assert wilson(successes, count) == pytest.approx((low, high), abs=1e-5)
    assert mean_interval([1] * successes + [0] * (count - successes)) == pytest.approx((low, high), abs=1e-5)


def test_intervals_of_means() -> None:
    assert mean_interval(FIRST) == pytest.approx((-0.529780, 2.029780), abs=1e-6)
    assert mean_interval(SECOND) == pytest.approx((0.897678, 3.762322), abs=1e-6)
    assert difference_interval(FIRST, SECOND) == pytest.approx((-0.205483, 3.365483), abs=1e-6), "Welch"
    rates = [1] * 48 + [0] * 32, [1] * 56 + [0] * 14
    assert difference_interval(*rates) == pytest.approx((0.0524, 0.3339), abs=1e-4), "Newcombe (1998), method 10"


def test_values_that_do_not_tell_have_no_interval() -> None:
    assert mean_interval([0.5]) is None
    assert mean_interval([0.3] * 3) is None
    assert difference_interval([0.5], FIRST) is None
    assert difference_interval([0.5] * 3, [0.3] * 3) is None
    assert difference_interval([0.5] * 3, FIRST) is not None, "one of them varies"


def test_comparing_versions_loads_no_torch() -> None:
    code = (
        "import sys; from internalrl.serving.registry.outcomes import compare;"
        "compare({'a@1': [1, 0], 'a@2': [0.5, 0.2]}); print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
