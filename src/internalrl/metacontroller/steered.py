"""SteeredModel: a frozen base with a metacontroller on its residual stream; the only steered forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from internalrl.base.residual import ResidualTap
from internalrl.base.trajectory import TrajectoryCache, load_trajectory_model
from internalrl.metacontroller.adapter import load_adapter, put_tensors, save_adapter
from internalrl.metacontroller.model import Metacontroller, MetacontrollerState
from internalrl.metacontroller.policy import Policy
from internalrl.stages import MetacontrollerConfig

Propose = Callable[[Tensor, Tensor], Tensor]
"""Which code next? (rows that switch (S,), what they read (S, n_e)) -> codes (S, n_z)."""


@dataclass
class Step:
    """One decoded step: action `logits` (B, A), `switch` (B,) bool, `switch_logit` (B,), `code` (B, n_z)."""

    logits: Tensor
    switch: Tensor
    switch_logit: Tensor
    code: Tensor


@dataclass
class Decoding:
    """State of a batch decoded step by step: the base's cache, the metacontroller's state, the segments."""

    cache: TrajectoryCache | None
    state: MetacontrollerState
    segments: Tensor | None
    switched: Tensor | None = None

    def continued_segments(self) -> Tensor | None:
        """Segment numbers (B, past + 1) with one more step: what `step` will let it see.

        A step at which the switch fired stands alone: what it saw, it saw from the segment before.
        """
        if self.segments is None:
            return None
        if self.switched is None:
            return self.segments.new_zeros(len(self.segments), 1)
        return torch.cat([self.segments, self.segments[:, -1:] + self.switched[:, None]], 1)

    def select(self, rows: Tensor) -> None:
        """Keep only `rows` (index tensor)."""
        if self.cache is not None:
            self.cache.select(rows)
        self.state = self.state.select(rows)
        if self.segments is not None:
            self.segments = self.segments[rows]
        if self.switched is not None:
            self.switched = self.switched[rows]


class SteeredModel(nn.Module):
    """The base model, frozen, with U(z_t) e_t added to its residual stream after block `layer`.

    What is learned on top of the base, its adapter, is `metacontroller` and, after internal RL, `policy`;
    `provenance` tells how: stage -> whatever it wants remembered.
    """

    def __init__(self, base: PreTrainedModel, config: MetacontrollerConfig):
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        self.tap = ResidualTap(base, config.layer)
        self.metacontroller = Metacontroller(config, base.config.hidden_size)
        self.policy: Policy | None = None
        self.provenance: dict[str, Any] = {}

    @classmethod
    def from_base(cls, base: PreTrainedModel | str | Path, config: MetacontrollerConfig) -> SteeredModel:
        """A new metacontroller on `base`: a model, or the folder of a saved `TrajectoryModel`."""
        return cls(base if isinstance(base, PreTrainedModel) else load_trajectory_model(base), config)

    @classmethod
    def from_pretrained(cls, base: PreTrainedModel | str | Path, folder: str | Path) -> SteeredModel:
        """The adapter in `folder` on the base it was trained on; InternalRLError says what does not fit.

        Args:
            base: the model, or the folder of a saved `TrajectoryModel`.
        """
        base = base if isinstance(base, PreTrainedModel) else load_trajectory_model(base)
        config, tensors = load_adapter(base, folder)
        with torch.device("meta"):  # shapes alone: the tensors come from the file, no random number is drawn
            steered = cls(base, config.metacontroller)
            if config.policy_hidden is not None:
                sizes = steered.metacontroller.width, config.metacontroller.n_z, config.policy_hidden
                steered.policy = Policy(*sizes, initial_std=1.0)
        put_tensors(steered, tensors, folder)
        steered.provenance = config.provenance
        return steered

    def save_pretrained(self, folder: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Write the adapter, not the base, to `folder`; see `adapter.save_adapter`.

        Args:
            provenance: added to what is known of earlier stages.
        """
        self.provenance = {**self.provenance, **(provenance or {})}
        save_adapter(self, folder)

    def train(self, mode: bool = True) -> SteeredModel:
        """Training mode for the metacontroller alone: the frozen base never drops units out."""
        super().train(mode)
        self.base.eval()
        return self

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
        """A fresh decoding of `batch` sequences; with `forget`, a segment sees nothing from before it."""
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
        meta, before = self.metacontroller, decoding.state
        taken: dict[str, Tensor] = {}

        def steer(residual: Tensor) -> Tensor:
            x = meta.read(residual[:, -1])
            switch, logit, history = meta.advance(x, before)
            code, rows = before.code, switch.nonzero().squeeze(-1)
            if len(rows):
                code = code.index_copy(0, rows, propose(rows, x[rows]))
            taken.update(switch=switch, switch_logit=logit, code=code)
            decoding.state = MetacontrollerState(history, code, torch.ones_like(switch))
            return meta.control(residual, code[:, None])

        decoding.segments = decoding.continued_segments()  # until the switch says otherwise
        with self.tap.steering(steer):
            output = self.base(
                observations[:, None],
                past_key_values=decoding.cache,
                use_cache=True,
                segments=decoding.segments,
            )
        decoding.cache = output.past_key_values
        result = Step(output.logits[:, -1], **taken)
        if decoding.segments is not None:
            decoding.switched = result.switch & before.started
            self._forget(observations, decoding, decoding.switched.nonzero().squeeze(-1), result)
        return result

    @torch.no_grad()
    def peek(self, observations: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
        """What `step` on the same arguments will see: β (B,) bool and the normalised residual (B, n_e).

        `decoding` is left as it was, and the upper blocks are not computed.
        """
        cache = decoding.cache
        length = 0 if cache is None else cache.length
        residual = self.tap.read(
            self.base,
            observations=observations[:, None],
            past_key_values=cache,
            use_cache=True,
            segments=decoding.continued_segments(),
        )
        if cache is not None:
            cache.rewind(length)
        x = self.metacontroller.read(residual[:, -1])
        return self.metacontroller.advance(x, decoding.state)[0], x

    def _forget(self, observations: Tensor, decoding: Decoding, rows: Tensor, result: Step) -> None:
        """Act in `rows`, which switched, as if the sequence began here; later steps will not see even this one."""
        if not len(rows):
            return
        assert decoding.segments is not None
        state = decoding.state
        decoding.segments[rows, -1] += 1
        state.history[rows] = 0
        with self.tap.steering(lambda residual: self.metacontroller.control(residual, state.code[rows, None])):
            result.logits[rows] = self.base(observations[rows, None]).logits[:, -1]
