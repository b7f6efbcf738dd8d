"""Which bases can be served, and how they read sequences together: tried before the first request."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from internalrl.base.caches import cache_input, require_filled
from internalrl.errors import InternalRLError
from internalrl.players.engine.packed import PackedBase, Pass
from internalrl.players.engine.separate import SeparateBase
from internalrl.players.engine.trays import Shape, Trays


@torch.no_grad()
def check_base(base: PreTrainedModel, context: int | None) -> tuple[PackedBase | SeparateBase, Shape]:
    """How to run `base`, and what it keeps of a token; InternalRLError unless it can be served.

    Two sequences must continue side by side as they do alone.
    """
    if not base.can_generate():
        raise InternalRLError(f"{type(base).__name__} does not generate tokens; give a causal language model.")
    try:
        shape = _shape(base, context)
        texts = [[0, 1, 0, 0, 1, 0], [1, 0, 1]]
        alone = torch.cat([base(torch.tensor([text], device=base.device)).logits[:, -1] for text in texts])
        complaint = "it continues sequences otherwise together than alone"
        for kind in (PackedBase, SeparateBase):
            try:
                way = kind(base)
                together = _continued(way, shape, texts)
            except Exception as error:
                complaint = f"it does not work with a cache of keys and values alone ({error})"
                continue
            if (together - alone).abs().max() < 0.05 * alone.std():
                return way, shape
        raise InternalRLError(complaint)
    except InternalRLError as error:
        raise InternalRLError(
            f"{type(base).__name__} cannot be served: {error}; the engine needs full attention over a cache of keys "
            "and values in every block."
        ) from error


def _shape(base: PreTrainedModel, context: int | None) -> Shape:
    cache = DynamicCache(config=base.config)
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer and not (context and context <= layer.sliding_window):
            raise InternalRLError(
                f"it attends to the last {layer.sliding_window} tokens, which is less than the engine's context"
            )
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise InternalRLError(f"a block keeps its past in a {type(layer).__name__}")
    try:
        base(torch.zeros(1, 2, dtype=torch.long, device=base.device), use_cache=True, **cache_input(base, cache))
        require_filled(cache, 2, base)
    except Exception as error:
        raise InternalRLError(f"it does not work with a cache of keys and values alone ({error})") from error
    blocks: list[Any] = cache.layers
    found = {(layer.keys.shape, layer.values.shape) for layer in blocks}
    if len(found) != 1:
        raise InternalRLError("its blocks keep keys and values of different sizes")
    key, value = blocks[0].keys, blocks[0].values
    return Shape(len(blocks), key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device)


def _continued(way: PackedBase | SeparateBase, shape: Shape, texts: list[list[int]]) -> torch.Tensor:
    """The logits (len(texts), V) behind texts whose last tokens are read in a pass of their own."""
    trays = Trays(shape, len(texts))
    rows = [trays.row(len(text)) for text in texts]
    logits: list[torch.Tensor] = []
    for part in (slice(0, -1), slice(-1, None)):
        pieces = [(row, text[part]) for row, text in zip(rows, texts, strict=True)]
        logits = []
        for together in [pieces] if way.joint else [[piece] for piece in pieces]:
            read = Pass(together, shape.device)
            logits.append(way(read, range(len(together))))
            read.keep()
    return torch.cat(logits)
