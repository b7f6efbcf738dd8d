"""How the repeats of a benchmark are summed up."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np


def spread(values: Sequence[float] | np.ndarray, digits: int | None = 4) -> dict[str, float]:
    """Smallest, middle and largest of the repeats, rounded; to whole numbers if `digits` is None."""
    values = [float(value) for value in values]
    found = {"min": min(values), "median": median(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}
