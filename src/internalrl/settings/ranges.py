"""Ranges of options: declared as their types, `crop: Fraction = 0.5`, and checked whenever a config is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, get_type_hints

from internalrl.errors import OptionError


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`; with `above`, without `low` itself."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high and value < math.inf

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"a number from {self.low:g} to {self.high:g}"
        return f"a number above {self.low:g}" if self.above else f"{self.low:g} or more"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]


class Checked:
    """Base of the configs: making one raises OptionError where a number is outside the `Range` of its type."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for allowed in getattr(hint, "__metadata__", ()):
                if isinstance(allowed, Range) and isinstance(value, int | float) and value not in allowed:
                    raise OptionError(name, f"is {value}; give {allowed}.")
