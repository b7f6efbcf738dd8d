"""Libraries of strategies that the tests share."""

from __future__ import annotations

from typing import Any

from internalrl.strategies.library import Library, Strategy
from internalrl.strategies.limits import Limits, LimitsConfig


def library(centroids: Any, radii: Any = None, adapter: str = "any") -> Library:
    """Strategies "strategy-1", … around `centroids` (K, n_z)."""
    radii = [2.0] * len(centroids) if radii is None else radii
    made = [
        Strategy(k, f"strategy-{k}", tuple(map(float, centroid)), float(radius), 1 / len(centroids))
        for k, (centroid, radius) in enumerate(zip(centroids, radii, strict=True), 1)
    ]
    return Library(adapter, "policy", 100, 0.5, tuple(made))


def denying(found: Library, *denied: int, **options: Any) -> Limits:
    """Limits that deny the strategies of these numbers."""
    return Limits(found, LimitsConfig(strategies={f"strategy-{k}": "deny" for k in denied}, **options))
