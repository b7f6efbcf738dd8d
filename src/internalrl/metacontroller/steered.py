"""SteeredModel: a frozen base model with a metacontroller on its residual stream; the only steered forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from internalrl.base.residual import ResidualTap
from internalrl.base.trajectory import TrajectoryCache
from internalrl.metacontroller.model import Metacontroller, MetacontrollerState
from internalrl.stages import MetacontrollerConfig

Propose = Callable[[Tensor, Tensor], Tensor]
"""Which code next? (rows that switch (S,), what they read (S, n_e)) -> codes (S, n_z)."""


@dataclass
class Step:
    """One decoded step: action `logits` (B, A), `switch` (B,) bool, its `switch_logit` (B,), and the `code` held."""

    logits: Tensor
    switch: Tensor
    switch_logit: Tensor
    code: Tensor


@dataclass
class Decoding:
    """State of a batch that is decoded step by step: the base's cache, the metacontroller's state, segment numbers."""

    cache: TrajectoryCache | None
    state: MetacontrollerState
    segments: Tensor | None

    def select(self, rows: Tensor) -> None:
        """Keep only `rows` (index tensor)."""
        if self.cache is not None:
            self.cache.select(rows)
        self.state = self.state.select(rows)
        if self.segments is not None:
            self.segments = self.segments[rows]


class SteeredModel(nn.Module):
    """The base model, frozen, with U(z_t) e_t added to its residual stream after block `layer`."""

    def __init__(self, base: PreTrainedModel, config: MetacontrollerConfig):
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        self.tap = ResidualTap(base, config.layer)
        self.metacontroller = Metacontroller(config, base.config.hidden_size)

    @torch.no_grad()
    def residual(self, observations: Tensor, segments: Tensor | None = None) -> Tensor:
        """The residual stream (B, T, n_e) at the tap; the upper blocks are not computed."""
        return self.tap.read(self.base, observations=observations, segments=segments)

    def forward(self, residual: Tensor, code: Tensor, **inputs: Any) -> Tensor:
        """Action logits (B, T, A) of the base continued from `residual`, steered by `code` (B, T, n_z)."""
        with (
            self.tap.skipping_lower_blocks(residual),
            self.tap.steering(lambda e: self.metacontroller.control(e, code)),
        ):
            return self.base(inputs_embeds=residual, **inputs).logits

    def start(self, batch: int, forget: bool = False) -> Decoding:
        """A fresh decoding of `batch` sequences; with `forget`, each segment sees nothing of what came before it."""
        state = self.metacontroller.start(batch)
        return Decoding(None, state, torch.zeros(batch, 0, dtype=torch.long) if forget else None)

    @torch.no_grad()
    def step(self, observations: Tensor, decoding: Decoding, propose: Propose) -> Step:
        """Decode one step for every row: read e_t, switch where β fires, ask for new codes there, steer.

        Args:
            observations: (B, observation_size).
            decoding: from `start`; advanced in place.
            propose: asked for a code at every switch.
        """
        meta, before, taken = self.metacontroller, decoding.state, {}

        def steer(residual: Tensor) -> Tensor:
            x = meta.read(residual[:, -1])
            switch, logit, history = meta.advance(x, before)
            code, rows = before.code, switch.nonzero().squeeze(-1)
            if len(rows):
                code = code.index_copy(0, rows, propose(rows, x[rows]))
            taken.update(switch=switch, switch_logit=logit, code=code)
            decoding.state = MetacontrollerState(history, code, torch.ones_like(switch))
            return meta.control(residual, code[:, None])

        if decoding.segments is not None:  # until the switch says otherwise, this step continues its segment
            last = decoding.segments[:, -1:] if decoding.segments.shape[1] else before.started[:, None].long()
            decoding.segments = torch.cat([decoding.segments, last], 1)
        with self.tap.steering(steer):
            output = self.base(
                observations[:, None], past_key_values=decoding.cache, use_cache=True, segments=decoding.segments
            )
        decoding.cache = output.past_key_values
        result = Step(output.logits[:, -1], **taken)
        reopened = (result.switch & before.started).nonzero().squeeze(-1)
        if decoding.segments is not None and len(reopened):
            self._forget(observations, decoding, reopened, result)
        return result

    def _forget(self, observations: Tensor, decoding: Decoding, rows: Tensor, result: Step) -> None:
        """Compute this step of `rows` again as the first of a sequence, and put it into the state and the cache."""
        meta, state = self.metacontroller, decoding.state

        def steer(residual: Tensor) -> Tensor:
            _, _, history = meta.advance(meta.read(residual[:, -1]), meta.start(len(rows)))
            state.history[rows] = history
            return meta.control(residual, state.code[rows, None])

        with self.tap.steering(steer):
            output = self.base(observations[rows, None], use_cache=True)
        decoding.cache.overwrite_last(rows, output.past_key_values)
        decoding.segments[rows, -1] += 1
        result.logits[rows] = output.logits[:, -1]
