"""One forward pass of a base over tokens of many sequences: next tokens of some, parts of the prompts of others.

The tokens lie side by side, (1, N), each with its own position. What a sequence sees of the others is decided where
they would meet, in the attention, which this module takes over while a pass runs: it writes the new keys and values
into the rows' trays and lets every token attend to its own row. Rows of one tray are computed together, without a
copy of what they have read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from internalrl.base.logits import logits_at
from internalrl.players.engine.trays import Row, Tray

NAME = "internalrl_packed"
"""Of the attention, where transformers looks it up."""


@dataclass
class Part:
    """Tokens that attend together: one of each row in `places` of a tray, or several of a single row.

    Attributes:
        columns: of the pass.
        starts: the column of the tray that each row's first new token goes to.
        width: columns of the tray that are looked at.
    """

    tray: Tray
    columns: slice
    places: list[int]
    starts: list[int]
    width: int

    def prepare(self) -> None:
        """Make what is the same for all blocks, once all rows are known."""
        self.tray.use(self.width)
        device = self.tray.keys.device
        self.place, self.start = (torch.tensor(numbers, device=device) for numbers in (self.places, self.starts))
        self.mask: Tensor | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """(tokens, heads, size) for a query (tokens, heads, size) and the new keys and values (tokens, kv heads, …)."""
        tray, heads = self.tray, key.shape[1]
        keys, values = tray.keys[layer], tray.values[layer]
        if len(self.places) == 1:
            place, new = self.places[0], slice(self.starts[0], self.starts[0] + len(key))
            keys[place, :, new], values[place, :, new] = key.transpose(0, 1), value.transpose(0, 1)
            rows = slice(place, place + 1)
            query = query.view(1, len(query), heads, -1, query.shape[-1]).permute(0, 2, 3, 1, 4).flatten(2, 3)
        else:
            keys[self.place, :, self.start], values[self.place, :, self.start] = key, value
            rows = slice(0, self.places[-1] + 1)
            query = query.view(len(query), heads, -1, query.shape[-1])
            if rows.stop > len(self.places):  # between them are rows that read nothing in this pass
                query = query.new_zeros(rows.stop, *query.shape[1:]).index_copy(0, self.place, query)
        if self.mask is None:
            self.mask = self._mask(query)
        found = F.scaled_dot_product_attention(
            query, keys[rows, :, : self.width], values[rows, :, : self.width], attn_mask=self.mask, scale=scaling
        )
        if len(self.places) == 1:
            return found[0].unflatten(1, (-1, len(key))).flatten(0, 1).transpose(0, 1)
        return (found if rows.stop == len(self.places) else found[self.place]).flatten(1, 2)

    def _mask(self, query: Tensor) -> Tensor:
        """(rows, 1, tokens, width), added to the scores of a query (rows, kv heads, tokens, size)."""
        columns = torch.arange(self.width, device=query.device)
        if len(self.places) == 1:
            tokens = self.columns.stop - self.columns.start
            last = self.start + torch.arange(tokens, device=query.device)
            hidden = (columns > last[:, None]).repeat(query.shape[2] // tokens, 1)[None, None]
        else:
            last = self.start.new_zeros(len(query)).index_copy(0, self.place, self.start)
            hidden = (columns > last[:, None])[:, None, None]
        return torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, float("-inf"))


class Pass:
    """A pass in which each of `rows` reads the tokens that are given with it, behind what it has read.

    Nothing has changed after it but what lies behind the rows' ends, until `keep`.

    Attributes:
        columns: where each row's tokens are in the pass, in the order of `rows`.
        tokens, positions: (1, N).
        layers: how many blocks have attended.
    """

    def __init__(self, rows: Sequence[tuple[Row, Sequence[int]]], device: torch.device):
        order = sorted(range(len(rows)), key=lambda at: (len(rows[at][1]) > 1, id(rows[at][0].tray), rows[at][0].place))
        self.columns = [slice(0, 0)] * len(rows)
        self.parts: list[Part] = []
        self.layers = 0
        tokens: list[int] = []
        positions: list[int] = []
        for at in order:
            row, new = rows[at]
            own = self.columns[at] = slice(len(tokens), len(tokens) + len(new))
            tokens += new
            positions += range(row.length, row.length + len(new))
            width, last = row.length + len(new), self.parts[-1] if self.parts else None
            if last is None or len(new) > 1 or last.tray is not row.tray:
                self.parts.append(Part(row.tray, own, [row.place], [row.length], width))
            else:
                last.columns = slice(last.columns.start, own.stop)
                last.places.append(row.place)
                last.starts.append(row.length)
                last.width = max(last.width, width)
        for part in self.parts:
            part.prepare()
        self.rows = rows
        self.tokens = torch.tensor([tokens], device=device)
        self.positions = torch.tensor([positions], device=device)

    def keep(self) -> None:
        """Count what the rows have read."""
        for row, new in self.rows:
            row.length += len(new)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """(1, N, heads, size) of a block, for its (1, heads, N, size) each."""
        self.layers += 1
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        found = [
            part.attend(layer, query[part.columns], key[part.columns], value[part.columns], scaling)
            for part in self.parts
        ]
        return (found[0] if len(found) == 1 else torch.cat(found))[None]


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    packed: Pass,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every block of a base, for `Pass`."""
    for what, given in (("softcap", softcap), ("s_aux", s_aux), ("position_bias", position_bias)):
        if given is not None:
            raise ValueError(f"its attention takes {what}")
    if sliding_window is not None and max(part.width for part in packed.parts) > sliding_window:
        raise ValueError(f"it attends to the last {sliding_window} tokens")
    layer: Any = module.layer_idx
    return packed.attend(layer, query, key, value, scaling), None


AttentionInterface.register(NAME, _attend)


class PackedBase:
    """A base whose forward pass takes a `Pass`."""

    joint = True
    """Whether passes may have several rows."""

    def __init__(self, base: PreTrainedModel):
        self.base = base
        configs = [module.config for module in base.modules() if hasattr(module, "config")]
        self._configs: list[Any] = list({id(config): config for config in configs}.values())

    def __call__(self, read: Pass, wanted: Sequence[int]) -> Tensor:
        """The logits (len(wanted), V) that follow the last tokens of those of the pass's rows that are `wanted`."""
        last = [read.columns[at].stop - 1 for at in wanted]
        early: dict[str, Any] = logits_at(self.base, last)
        with self._attending():
            output = self.base(
                input_ids=read.tokens, position_ids=read.positions, use_cache=False, packed=read, **early
            )
        if read.layers != len(read.rows[0][0].tray.keys):
            raise ValueError("not all of its blocks take their attention from outside")
        logits: Tensor = output.logits[0]
        return logits if early else logits[last]

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """While open, the base's attention is that of a `Pass`."""
        before = [config._attn_implementation_internal for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = NAME
        try:
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = name
