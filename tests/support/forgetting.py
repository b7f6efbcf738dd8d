"""Bases that lose what they have read, as a release of another library may make them: no error, and other outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Cache

from internalrl.base.caches import cache_input

LOSSES: dict[str, Callable[[Any], Cache | None]] = {"dropped": lambda cache: None, "stale": copy.deepcopy}
"""What such a base works with in place of the cache that it is given."""


def make_forgetful(model: nn.Module, loss: str) -> None:
    """From now on the model's forward pass leaves the cache that it is given as it was."""
    forward = model.forward
    name = next(iter(cache_input(model, Cache(layers=[]))))

    def forgetful(*args: Any, **inputs: Any) -> Any:
        if name in inputs:
            inputs[name] = LOSSES[loss](inputs[name])
        return forward(*args, **inputs)

    model.forward = forgetful
