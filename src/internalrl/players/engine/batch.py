"""The keys and values of all running sequences in one cache whose rows come and go.

    column      first                      end        capacity
    row 0         · · · a b c d e f g h i j | free ...
    row 1         x y z a b c d e f g h i j |
    row 2         · · · · · · · · · a b c d |

Every row is padded on the left, so that all of them grow at the same column; the model sees the columns from `first`
on, which is where the longest row begins. A sequence that ends gives its row to the last one. When the columns run
out, what is left is moved to the middle of the memory, or of twice as much: one copy in as many steps as rows are long.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from internalrl.errors import InternalRLError


class _Layer(CacheLayerMixin):
    """Keys and values (slots, heads, capacity, size) of one block, none before the first row is added."""

    keys: Tensor
    values: Tensor

    def __init__(self, joint: JointCache, sliding: bool):
        super().__init__()
        self.joint, self.is_sliding = joint, sliding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shapes = [(self.joint.slots, states.shape[1], 0, states.shape[3]) for states in (key_states, value_states)]
        self.keys, self.values = key_states.new_zeros(shapes[0]), value_states.new_zeros(shapes[1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        joint, rows = self.joint, len(key_states)
        self.keys[:rows, :, joint.end] = key_states[:, :, 0]
        self.values[:rows, :, joint.end] = value_states[:, :, 0]
        window = slice(joint.first, joint.end + 1)
        return self.keys[:rows, :, window], self.values[:rows, :, window]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.joint.end - self.joint.first

    def get_max_length(self) -> int:
        return -1


class JointCache(Cache):
    """Caches of up to `slots` sequences of a base, to be given to its forward pass of one token per row.

    What a column holds before a row begins is masked, but must be finite: 0 · nan is no 0.

    Attributes:
        starts: the column at which each row begins.
        mask: (slots, capacity), 1 where a row has a token.
    """

    layers: list[Any]

    def __init__(self, base: PreTrainedModel, slots: int, context: int | None):
        blocks: list[Any] = plain_cache(base, context).layers
        super().__init__(layers=[_Layer(self, block.is_sliding) for block in blocks])
        self.slots = slots
        self.starts: list[int] = []
        self.first = self.end = self.capacity = 0
        self.mask = torch.zeros(slots, 0, dtype=torch.long, device=base.device)
        # some bases count their positions themselves, from the mask
        self._takes_positions = "position_ids" in inspect.signature(base.forward).parameters

    def __len__(self) -> int:
        return len(self.starts)

    def inputs(self) -> dict[str, Any]:
        """What the base's forward pass needs besides one token per row (B, 1); `grow` comes after it."""
        self._make_room(0)
        rows = len(self)
        self.mask[:rows, self.end] = 1
        inputs = {"past_key_values": self, "attention_mask": self.mask[:rows, self.first : self.end + 1]}
        if self._takes_positions:
            inputs["position_ids"] = (self.end - self._starts)[:, None]
        return inputs

    def grow(self) -> None:
        """Count the column that a forward pass has filled."""
        self.end += 1

    def add(self, prefilled: DynamicCache) -> None:
        """Add a row with the content of a cache of one sequence."""
        length, row = prefilled.get_seq_length(), len(self)
        blocks: list[Any] = prefilled.layers
        for own, other in zip(self.layers, blocks, strict=True):
            if not own.is_initialized:
                own.lazy_initialization(other.keys, other.values)
        self._make_room(length)
        start = self.end - length
        for own, other in zip(self.layers, blocks, strict=True):
            for mine, theirs in ((own.keys, other.keys), (own.values, other.values)):
                mine[:row, :, start : self.first] = 0  # nothing where the window is wide enough
                mine[row, :, min(start, self.first) : start] = 0
                mine[row, :, start : self.end] = theirs[0]
        self._rows_are([*self.starts, start])

    def drop(self, rows: list[int]) -> list[int]:
        """Forget `rows`. Returns the old number of each row that is left: the last ones fill the gaps."""
        order = list(range(len(self)))
        for row in sorted(rows, reverse=True):
            last = order.pop()
            if row < len(order):
                for layer in self.layers:
                    for mine in (layer.keys, layer.values):
                        mine[row, :, self.first : self.end] = mine[len(order), :, self.first : self.end]
                order[row] = last
        self._rows_are([self.starts[row] for row in order])
        return order

    def _rows_are(self, starts: list[int]) -> None:
        self.starts, self._starts = starts, torch.tensor(starts, dtype=torch.long, device=self.mask.device)
        self.first = min(starts, default=self.end)
        columns = torch.arange(self.capacity, device=self.mask.device)
        self.mask[: len(starts)] = (columns >= self._starts[:, None]) & (columns < self.end)

    def _make_room(self, length: int) -> None:
        """Make sure that a row of `length` can end at `end`, and that there is a column behind it."""
        if length <= self.end < self.capacity:
            return
        width = self.end - self.first
        before, first = self.capacity, self.first
        self.capacity = max(before, 2 * max(length, width) + 64)
        self.end = self.capacity // 2
        for layer in self.layers:
            layer.keys, layer.values = (
                self._moved(tensor, first, width, before) for tensor in (layer.keys, layer.values)
            )
        self.mask = self.mask.new_zeros(self.slots, self.capacity)
        self._rows_are([start - first + self.end - width for start in self.starts])

    def _moved(self, tensor: Tensor, first: int, width: int, before: int) -> Tensor:
        """`tensor` with its `width` columns from `first` on at their new place, which ends at `end`."""
        rows = len(self)
        content = tensor[:rows, :, first : first + width]
        if self.capacity > before:
            tensor = tensor.new_zeros(*tensor.shape[:2], self.capacity, tensor.shape[3])
        else:
            content = content.clone()
        tensor[:rows, :, self.end - width : self.end] = content
        return tensor


def plain_cache(base: PreTrainedModel, context: int | None) -> DynamicCache:
    """An empty cache for a sequence of at most `context` tokens, or InternalRLError if rows of it cannot be joined."""
    cache = DynamicCache(config=base.config)
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer and context is not None and context <= layer.sliding_window:
            continue  # it never slides
        if type(layer) is not DynamicLayer:
            raise InternalRLError(
                f"{type(base).__name__} cannot be served: {_complaint(layer)}; the engine needs full attention over "
                "a cache of keys and values in every block."
            )
    return cache


def _complaint(layer: Any) -> str:
    if type(layer) is DynamicSlidingWindowLayer:
        return f"it attends to the last {layer.sliding_window} tokens, which is less than the engine's context"
    return f"a block keeps its past in a {type(layer).__name__}"


@torch.no_grad()
def check_base(base: PreTrainedModel, context: int | None) -> None:
    """InternalRLError unless two sequences of the base continue in a joint cache as they do alone."""
    if not base.can_generate():
        raise InternalRLError(f"{type(base).__name__} does not generate tokens; give a causal language model.")
    prompts = [torch.tensor([row], device=base.device) for row in ([0, 1, 0, 0, 1], [1, 0])]
    following = torch.tensor([[0], [1]], device=base.device)
    whole = [torch.cat([prompt, token[None]], 1) for prompt, token in zip(prompts, following, strict=True)]
    try:
        alone = [base(tokens, attention_mask=torch.ones_like(tokens)).logits[:, -1] for tokens in whole]
        joint = JointCache(base, 2, context)
        for prompt in prompts:
            cache = plain_cache(base, context)
            base(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, use_cache=True)
            joint.add(cache)
        together = base(following, use_cache=True, **joint.inputs()).logits[:, -1]
    except InternalRLError:
        raise
    except Exception as error:
        raise InternalRLError(
            f"{type(base).__name__} cannot be served: it does not work with a cache of keys and values alone ({error})."
        ) from error
    expected = torch.cat(alone)
    if not (together - expected).abs().max() < 0.05 * expected.std():
        raise InternalRLError(
            f"{type(base).__name__} cannot be served: it continues sequences of different lengths otherwise together "
            "than alone."
        )
