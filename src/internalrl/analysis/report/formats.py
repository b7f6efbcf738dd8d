"""How a report writes numbers and settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def percent(value: float) -> str:
    return f"{100 * value:.{1 if 0 < value < 0.1 else 0}f} %"


def decimals(count: int) -> Callable[[float], str]:
    """Numbers with `count` of them."""
    return f"{{:.{count}f}}".format


def duration(seconds: float | Mapping[str, float]) -> str:
    """74.2 → 1 min 14 s; of several durations their `total`, or else the sum."""
    if isinstance(seconds, Mapping):
        seconds = seconds.get("total", sum(seconds.values()))
    total = round(seconds)
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    if hours:
        return f"{hours}\u00a0h {minutes}\u00a0min"
    return f"{minutes}\u00a0min {rest}\u00a0s" if minutes else f"{rest}\u00a0s"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as one list, with names like discover.steps and values as they are written."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:.4g}"
        else:
            yield f"{prefix}{name}", "none" if value is None else str(value)
