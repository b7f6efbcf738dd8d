"""Keys and values of many sequences that grow together by a step at a time, and of which some end early."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from internalrl.errors import InternalRLError


class PreallocatedLayer(DynamicLayer):
    """Keys and values written in place into a buffer that doubles, instead of concatenated at every step."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.used = 0
            self.buffer = key_states.new_empty(2, *key_states.shape[:2], 0, key_states.shape[-1])
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
