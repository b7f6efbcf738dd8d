"""Keys and values of many sequences that grow together by a step at a time, and of which some end early.

A base fills the cache that it is given. What a forward pass returns as its cache is not read: it is called otherwise in
every few releases of transformers, and a base that has lost the past would go on without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from internalrl.errors import InternalRLError


class PreallocatedLayer(DynamicLayer):
    """Keys and values written in place into a buffer that doubles, instead of concatenated at every step."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.used = 0
            self.buffer = key_states.new_empty(2, *key_states.shape[:2], 0, key_states.shape[-1])
        if len(key_states) != self.buffer.shape[1]:  # one row would be written into all of them
            raise InternalRLError(
                f"The cache has the past of {self.buffer.shape[1]} rows, but the step is of {len(key_states)}; give a "
                "step of every row, or select rows first."
            )
        end = self.used + key_states.shape[-2]
        if end > self.buffer.shape[-2]:
            grown = self.buffer.new_empty(*self.buffer.shape[:-2], max(2 * self.used, end, 16), self.buffer.shape[-1])
            grown[..., : self.used, :] = self.buffer[..., : self.used, :]
            self.buffer = grown
        self.buffer[0, :, :, self.used : end] = key_states
        self.buffer[1, :, :, self.used : end] = value_states
        self.used = end
        self.keys, self.values = self.buffer[0, :, :, :end], self.buffer[1, :, :, :end]
        return self.keys, self.values

    def rewind(self, length: int) -> None:
        """Forget the steps after the first `length`."""
        if not self.is_initialized:
            return
        self.used = min(self.used, length)
        self.keys, self.values = self.buffer[0, :, :, : self.used], self.buffer[1, :, :, : self.used]

    def drop(self, length: int) -> None:
        """Forget the first `length` steps."""
        self.buffer = self.buffer[..., length:, :]
        self.used -= length
        self.rewind(self.used)

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        if self.buffer.device.type == "cpu" and (indices.diff() > 0).all():
            # in place: on a CPU, memory that the process has not touched yet costs several times the copying
            for row, old in enumerate(indices.tolist()):
                if row < old:
                    self.buffer[:, row, :, : self.used] = self.buffer[:, old, :, : self.used]
            self.buffer = self.buffer[:, : len(indices)]
        else:
            self.buffer = self.buffer[:, indices]
        self.rewind(self.used)


class TokenCache(DynamicCache):
    """The cache of a batch of texts; `select` drops finished rows."""

    layers: list[Any]

    def select(self, rows: Tensor) -> None:
        """Keep only `rows` (an index tensor) of the batch."""
        self.batch_select_indices(rows)


def token_cache(base: PreTrainedModel) -> TokenCache:
    """An empty cache for a language model; InternalRLError if its rows cannot be dropped one by one."""
    cache = TokenCache(config=base.config)
    for number, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise InternalRLError(
                f"{type(base).__name__} keeps its past in a {type(layer).__name__}, from which finished texts cannot "
                "be dropped; give a model with attention in every block."
            )
        if type(layer) is DynamicLayer:
            cache.layers[number] = PreallocatedLayer()
    return cache


def cache_input(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """`cache` as the model's forward pass takes it: by the name `cache`, or `past_key_values` as it was called before.

    Raises InternalRLError when the forward pass takes neither.
    """
    name = _cache_name(type(model).forward)
    if name is None:
        raise InternalRLError(
            f"{type(model).__name__} takes no cache of keys and values, without which it cannot decode step by step; "
            "give a decoder with attention in every block."
        )
    return {name: cache}


@lru_cache
def _cache_name(forward: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def require_filled(cache: Cache, length: int, model: nn.Module, blocks: int | None = None) -> None:
    """InternalRLError unless every block holds `length` steps, as it does after a forward pass that kept the past.

    Args:
        blocks: how many of the first blocks to look at; by default all. Others have no steps after a pass that was
            stopped at a tap.
    """
    layers: list[Any] = cache.layers[:blocks]
    held = sorted({layer.get_seq_length() for layer in layers})
    if held != [length]:
        found = " or ".join(map(str, held)) or "no"
        raise InternalRLError(
            f"{type(model).__name__} left {found} steps in the cache that it was given, expected {length}: it decodes "
            "without its past; give a base that fills its cache, or another release of transformers."
        )
