"""How the versions of an adapter do by the feedback on their answers: means, differences, and their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from internalrl.analysis.statistics import Interval, difference_interval, mean_interval


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
    outcomes = tuple(
        Outcome(key, len(values), float(values.mean()), mean_interval(values)) for key, values in arms.items()
    )
    differences = tuple(
        Difference(
            outcome.key,
            outcomes[0].key,
            outcome.mean - outcomes[0].mean,
            difference_interval(arms[outcomes[0].key], arms[outcome.key]),
        )
        for outcome in outcomes[1:]
    )
    return Comparison(outcomes, differences, since)
