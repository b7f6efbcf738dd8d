"""Decoding step by step, for environments: `SteeredModel.start`, `step` and `peek`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internalrl.base.caches import cache_input, require_filled, token_cache
from internalrl.base.logits import logits_at
from internalrl.base.trajectory import TrajectoryModel
from internalrl.controller.choosers import Propose, asking
from internalrl.controller.metacontroller import MetacontrollerState
from internalrl.controller.steering import Steering

if TYPE_CHECKING:
    from internalrl.controller.steered import SteeredModel


@dataclass
class Step:
    """One decoded step: action `logits` (B, A), `switch` (B,) bool, `switch_logit` (B,), `code` (B, n_z)."""

    logits: Tensor
    switch: Tensor
    switch_logit: Tensor
    code: Tensor


@dataclass
class Decoding:
    """State of a batch decoded step by step: the base's cache, the metacontroller's state, the segments.

    `segments` (B, past) numbers the segments of the steps in the cache, which holds those alone that some row can still
    see; None means that rows see their whole past.
    """

    cache: Any  # a TrajectoryCache or a TokenCache
    state: MetacontrollerState
    segments: Tensor | None
    switched: Tensor | None = None  # with `segments`, the rows whose switch fired in the last step
    mask: Tensor | None = None  # (B, past), False at the padding of prompts; None where there is none

    def continued_segments(self) -> Tensor | None:
        """Segment numbers (B, past + 1) with one more step: what `step` will let it see.

        A step at which the switch fired stands alone: what it saw, it saw from the segment before.
        """
        if self.segments is None:
            return None
        if self.switched is None:
            return self.segments.new_zeros(len(self.segments), 1)
        return torch.cat([self.segments, self.segments[:, -1:] + self.switched[:, None]], 1)

    def drop_unseen(self) -> None:
        """Free the steps that no row's next one can see: a forgetful batch remembers its longest segment, no more."""
        if self.segments is None or self.switched is None:
            return
        seen = ((self.segments == self.segments[:, -1:]) & ~self.switched[:, None])[:, :-1].any(0)
        first = int(seen.byte().argmax()) if seen.any() else len(seen)  # the newest stays, to count from
        self.segments = self.segments[:, first:]
        self.cache.drop(first)

    def select(self, rows: Tensor) -> None:
        """Keep only `rows` (index tensor)."""
        self.cache.select(rows)
        self.state = self.state.select(rows)
        if self.segments is not None:
            self.segments = self.segments[rows]
        if self.switched is not None:
            self.switched = self.switched[rows]
        if self.mask is not None:
            self.mask = self.mask[rows]


def start(self: SteeredModel, batch: int, forget: bool = False) -> Decoding:
    """A fresh decoding of `batch` sequences; with `forget`, which language models cannot, a segment sees nothing from
    before it.

    Raises:
        InternalRLError: the base is a language model whose cache cannot drop rows.
    """
    base = self.base
    cache = base.empty_cache() if isinstance(base, TrajectoryModel) else token_cache(base)
    state = self.metacontroller.start(batch)
    return Decoding(cache, state, torch.zeros(batch, 0, dtype=torch.long) if forget else None)


@torch.no_grad()
def step(
    self: SteeredModel, observations: Tensor, decoding: Decoding, propose: Propose, silent: Tensor | None = None
) -> Step:
    """Decode one step for every row: read e_t, switch where β fires, ask for new codes there, steer.

    Args:
        observations: (B, observation_size). Of a language model, tokens (B, T): first the prompts, −1 where they are
            padded, on the left; then one more each time. As in `generate`, a first segment opens at the last token of
            the prompts.
        decoding: from `start`; advanced in place.
        propose: asked for a code at every switch.
        silent: (B,) bool, rows in which nothing is decided: they read the token as if it were a prompt's.

    Raises:
        InternalRLError: the base did not add exactly these steps to its cache.
    """
    before, cache = decoding.state, decoding.cache
    if self.base.main_input_name == "input_ids":
        inputs, prompt = _token_inputs(self, observations, decoding), observations.shape[1] - 1
    else:
        decoding.segments = decoding.continued_segments()  # until the switch says otherwise
        inputs, prompt = {"observations": observations[:, None], "segments": decoding.segments}, 0
    mask = None if decoding.mask is None else decoding.mask[:, -prompt - 1 :]
    steering = Steering(self.metacontroller, asking(propose), before, prompt, mask, decoding.switched, silent)
    length = cache.get_seq_length() + prompt + 1
    with self.open_taps((self.tap, steering)):
        output = self.base(use_cache=True, **cache_input(self.base, cache), **inputs)
    require_filled(cache, length, self.base)
    decoding.state = steering.state
    result = Step(output.logits[:, -1], steering.switch[0], steering.logit[0], steering.code[0])
    if decoding.segments is not None:
        decoding.switched = result.switch & before.started
        _forget(self, observations, decoding, decoding.switched.nonzero().squeeze(-1), result)
        decoding.drop_unseen()
    return result


def _token_inputs(self: SteeredModel, tokens: Tensor, decoding: Decoding) -> dict[str, Any]:
    """What a language model's forward pass needs besides the cache."""
    if not decoding.cache.get_seq_length():
        decoding.mask = None if (tokens >= 0).all() else tokens >= 0
    elif decoding.mask is not None:
        decoding.mask = F.pad(decoding.mask, (0, 1), value=True)
    inputs: dict[str, Any] = {"input_ids": tokens.clamp(min=0), **logits_at(self.base)}
    if decoding.mask is not None:
        positions = decoding.mask.cumsum(1)[:, -tokens.shape[1] :] - 1
        inputs |= {"attention_mask": decoding.mask.long(), "position_ids": positions.clamp(min=0)}
    return inputs


@torch.no_grad()
def peek(self: SteeredModel, observations: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """What `step` on the same arguments will see: β (B,) bool and the normalised residual (B, n_e).

    `decoding` is left as it was, and the upper blocks are not computed. Raises InternalRLError as `step` does.
    """
    cache = decoding.cache
    residual = self.tap.read(
        self.base,
        observations=observations[:, None],
        use_cache=True,
        segments=decoding.continued_segments(),
        **cache_input(self.base, cache),
    )
    require_filled(cache, cache.length + 1, self.base, self.tap.layer)
    cache.rewind()
    x = self.metacontroller.read(residual[:, -1])
    switch, _, _ = self.metacontroller.advance(x, decoding.state)
    return (switch if decoding.switched is None else switch & ~decoding.switched), x


def _forget(self: SteeredModel, observations: Tensor, decoding: Decoding, rows: Tensor, result: Step) -> None:
    """Act in `rows`, which switched, as if the sequence began here; later steps will not see even this one."""
    if not len(rows):
        return
    assert decoding.segments is not None
    state = decoding.state
    decoding.segments[rows, -1] += 1
    state.history[rows] = 0
    with self.open_taps((self.tap, lambda residual: self.metacontroller.control(residual, state.code[rows, None]))):
        result.logits[rows] = self.base(observations[rows, None]).logits[:, -1]
