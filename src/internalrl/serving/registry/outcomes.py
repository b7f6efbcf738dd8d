"""How the versions of an adapter do by the feedback on their answers: means, differences, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float] | None
"""A 95 % interval; None where the values do not tell: too few, or all of them equal to something between."""

_Z = 1.959964


@dataclass(frozen=True)
class Outcome:
    """Rewards of one version.

    Attributes:
        key: of the version; n: answers with feedback; mean: of their rewards.
        interval: of the mean: Wilson's score interval for rewards of 0 and 1, Student's t otherwise.
    """

    key: str
    n: int
    mean: float
    interval: Interval


@dataclass(frozen=True)
class Difference:
    """Mean reward of `key` less that of `baseline`.

    `interval`: Newcombe's of two Wilson intervals for rewards of 0 and 1, Welch's t otherwise.
    """

    key: str
    baseline: str
    difference: float
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """The versions with feedback, and each one's difference from the first of them.

    `since`: when the split that is compared began, in seconds since 1970; None without a split.
    """

    outcomes: tuple[Outcome, ...]
    differences: tuple[Difference, ...]
    since: float | None


def compare(rewards: Mapping[str, Sequence[float]], since: float | None = None) -> Comparison:
    """Compare versions by their rewards: key -> one number per answer; the first one is the baseline."""
    arms = {key: np.asarray(values, float) for key, values in rewards.items() if len(values)}
    binary = all(np.isin(values, (0, 1)).all() for values in arms.values())
    outcomes = tuple(
        Outcome(key, len(values), float(values.mean()), _wilson(values) if binary else _student(values))
        for key, values in arms.items()
    )
    differences = []
    for outcome in outcomes[1:]:
        first, second = arms[outcomes[0].key], arms[outcome.key]
        interval = _newcombe(first, second) if binary else _welch(first, second)
        differences.append(Difference(outcome.key, outcomes[0].key, outcome.mean - outcomes[0].mean, interval))
    return Comparison(outcomes, tuple(differences), since)


def _wilson(values: NDArray[np.float64]) -> tuple[float, float]:
    from internalrl.analysis.evaluate import wilson

    return wilson(int(values.sum()), len(values), _Z)


def _newcombe(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[float, float]:
    """Of two proportions: their Wilson limits, put together as independent."""
    (p, q), (low_p, high_p), (low_q, high_q) = (first.mean(), second.mean()), _wilson(first), _wilson(second)
    low = q - p - math.hypot(q - low_q, high_p - p)
    high = q - p + math.hypot(high_q - q, p - low_p)
    return float(low), float(high)


def _student(values: NDArray[np.float64]) -> Interval:
    if len(values) < 2:
        return None
    return _around(float(values.mean()), values.var(ddof=1) / len(values), len(values) - 1)


def _welch(first: NDArray[np.float64], second: NDArray[np.float64]) -> Interval:
    if min(len(first), len(second)) < 2:
        return None
    squares = [values.var(ddof=1) / len(values) for values in (first, second)]
    parts = [square**2 / (len(values) - 1) for square, values in zip(squares, (first, second), strict=True)]
    degrees = sum(squares) ** 2 / sum(parts) if any(parts) else 1.0
    return _around(float(second.mean() - first.mean()), sum(squares), degrees)


def _around(mean: float, squared_error: float, degrees: float) -> Interval:
    if squared_error == 0:  # equal values say nothing about how much others would differ
        return None
    from scipy.stats import t  # takes a second to import

    half = float(t.ppf(0.975, degrees)) * math.sqrt(squared_error)
    return mean - half, mean + half
