"""95 % intervals of rates and means, and of how two of them differ; scipy's, which takes a second to import."""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float] | None
"""Lower and upper end; None where the values do not tell: a single one, or all equal to something between 0 and 1."""


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson's score interval of a rate, `successes` of `count` (at least 1); it is right also near 0 and 1."""
    from scipy.stats import binomtest

    found = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def mean_interval(values: ArrayLike) -> Interval:
    """Of the mean of `values` (N,): Wilson's for values of 0 and 1, Student's t otherwise."""
    from scipy.stats import ttest_1samp

    values = np.asarray(values, float)
    if _binary(values):
        return wilson(int(values.sum()), len(values))
    if len(values) < 2 or not np.ptp(values):  # equal values say nothing about how much others would differ
        return None
    found = ttest_1samp(values, 0.0).confidence_interval(0.95)
    return float(found.low), float(found.high)


def difference_interval(first: ArrayLike, second: ArrayLike) -> Interval:
    """Of the second mean less the first: Newcombe's for values of 0 and 1, Welch's t otherwise."""
    from scipy.stats import ttest_ind

    first, second = np.asarray(first, float), np.asarray(second, float)
    if _binary(first) and _binary(second):
        return _newcombe(first, second)
    if min(len(first), len(second)) < 2 or not (np.ptp(first) or np.ptp(second)):
        return None
    with warnings.catch_warnings():  # that the values of one of them are all equal, which is as it should be
        warnings.simplefilter("ignore", RuntimeWarning)
        found = ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    return float(found.low), float(found.high)


def _newcombe(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[float, float]:
    """Method 10 of Newcombe (1998), which scipy lacks: Wilson's limits of both rates, put together as independent."""
    (p, low_p, high_p), (q, low_q, high_q) = (
        (float(values.mean()), *wilson(int(values.sum()), len(values))) for values in (first, second)
    )
    return q - p - math.hypot(q - low_q, high_p - p), q - p + math.hypot(high_q - q, p - low_p)


def _binary(values: NDArray[np.float64]) -> bool:
    return bool(np.isin(values, (0, 1)).all())
