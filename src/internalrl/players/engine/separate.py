"""The forward pass of a base whose attention nobody can take over: it reads the tokens of one sequence at a time."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from internalrl.base.caches import cache_input
from internalrl.base.logits import logits_at
from internalrl.errors import InternalRLError
from internalrl.players.engine.packed import Pass
from internalrl.players.engine.trays import Row


class _Layer(DynamicLayer):
    """What a row's tray holds of one block, and how many steps were `written` behind it."""

    def __init__(self, row: Row, layer: int):
        super().__init__()
        self.row, self.layer, self.is_initialized = row, layer, True
        self.written = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is memory already."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        tray, place = self.row.tray, slice(self.row.place, self.row.place + 1)
        end = self.row.length + key_states.shape[2]
        self.written += key_states.shape[2]
        found = []
        for states, kept in ((key_states, tray.keys), (value_states, tray.values)):
            kept[self.layer, place, :, self.row.length : end] = states
            found.append(kept[self.layer, place, :, :end])
        return found[0], found[1]

    def get_seq_length(self) -> int:
        return self.row.length


class SeparateBase:
    """A base that reads a `Pass` of a single row."""

    joint = False
    """Whether passes may have several rows."""

    def __init__(self, base: PreTrainedModel):
        self.base = base
        self._takes_positions = "position_ids" in inspect.signature(base.forward).parameters

    def __call__(self, read: Pass, wanted: Sequence[int]) -> Tensor:
        """The logits (len(wanted), V) that follow the last token, where that is `wanted`."""
        [(row, new)] = read.rows
        layers: list[Any] = [_Layer(row, layer) for layer in range(len(row.tray.keys))]
        cache = cache_input(self.base, Cache(layers=layers))
        mask = read.tokens.new_ones(1, row.length + len(new))
        inputs = logits_at(self.base)
        if self._takes_positions:
            inputs["position_ids"] = read.positions
        output = self.base(read.tokens, use_cache=True, attention_mask=mask, **cache, **inputs)
        if any(layer.written != len(new) for layer in layers):
            raise InternalRLError(
                f"{type(self.base).__name__} did not write every token once into the cache that it was given: it "
                "decodes without its past; give a base that fills its cache, or another release of transformers."
            )
        logits: Tensor = output.logits[:, -1]
        return logits[: len(wanted)]
