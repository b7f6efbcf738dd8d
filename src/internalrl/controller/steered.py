"""SteeredModel: a frozen base with a metacontroller on its residual stream; the only steered forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from internalrl.base.loading import Base, load_base
from internalrl.base.residual import ResidualTap, Steer
from internalrl.controller import decode as decoding
from internalrl.controller import generate as generation
from internalrl.controller.adapter import Adapter, load_adapter, save_adapter
from internalrl.controller.choosers import Propose
from internalrl.controller.decode import Decoding, Step
from internalrl.controller.metacontroller import Metacontroller
from internalrl.controller.policy import Policy
from internalrl.controller.steering import Share, open_taps
from internalrl.errors import InternalRLError
from internalrl.settings.stages import MetacontrollerConfig

__all__ = ["Decoding", "Propose", "SteeredModel", "Step", "bare"]


class SteeredModel(nn.Module):
    """The base model, frozen, with U(z_t) e_t added to its residual stream after block `layer`.

    What is learned on top of the base is an adapter: a metacontroller and, after internal RL, a policy. A base can
    carry several, by name; `metacontroller`, `policy`, `tap` and `provenance` are those of the active one.

    Args:
        base: a causal language model or a `TrajectoryModel`; it is frozen, and is shared, not copied.
        adapter: the first adapter, or the sizes of a new one.
        name: what it is called.
    """

    generate = generation.generate
    start, step, peek = decoding.start, decoding.step, decoding.peek

    def __init__(self, base: PreTrainedModel, adapter: Adapter | MetacontrollerConfig, name: str = "default"):
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        self.adapters = nn.ModuleDict()
        self.active, self.enabled = name, True
        self._add(name, adapter if isinstance(adapter, Adapter) else Adapter(base, adapter))

    @classmethod
    def from_base(cls, base: Base, config: MetacontrollerConfig) -> SteeredModel:
        """A new metacontroller on `base`: a model, or the folder of a saved one; see `load_base`."""
        return cls(load_base(base), config)

    @classmethod
    def from_pretrained(cls, base: Base, folder: str | Path, name: str = "default") -> SteeredModel:
        """The adapter in `folder` on the base it was trained on; InternalRLError says what does not fit."""
        base = load_base(base)
        return cls(base, load_adapter(base, folder), name)

    def save_pretrained(self, folder: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Write the active adapter, not the base, to `folder`; see `adapter.save_adapter`.

        Args:
            provenance: added to what is known of earlier stages.
        """
        self.adapter.provenance = {**self.provenance, **(provenance or {})}
        save_adapter(self.adapter, self.base, folder)

    # -- adapters -----------------------------------------------------------------------------------------

    def load_adapter(self, folder: str | Path, name: str) -> None:
        """Read one more adapter of this base and call it `name`; `set_adapter` makes it the active one."""
        self._add(name, load_adapter(self.base, folder))

    def set_adapter(self, name: str) -> None:
        """Make `name` the active adapter."""
        self._named(name)
        self.active = name

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter that is not the active one."""
        self._named(name)
        if name == self.active:
            raise InternalRLError(f"Adapter {name!r} is the active one; call set_adapter with another name first.")
        del self.adapters[name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """While open, `forward` and `generate` are the bare base's."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @property
    def adapter(self) -> Adapter:
        """The active adapter."""
        return self._named(self.active)

    @property
    def metacontroller(self) -> Metacontroller:
        return self.adapter.metacontroller

    @property
    def policy(self) -> Policy | None:
        return self.adapter.policy

    @policy.setter
    def policy(self, policy: Policy | None) -> None:
        self.adapter.policy = policy

    @property
    def tap(self) -> ResidualTap:
        return self.adapter.tap

    @property
    def provenance(self) -> dict[str, Any]:
        return self.adapter.provenance

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)  # torch would register a module under the name, past its setter
        else:
            super().__setattr__(name, value)

    def _add(self, name: str, adapter: Adapter) -> None:
        if name in self.adapters:
            raise InternalRLError(f"There is an adapter {name!r} already; choose another name, or delete it first.")
        device = next(adapter.tap.blocks[adapter.tap.layer - 1].parameters()).device
        try:
            self.adapters[name] = adapter.to(device)
        except KeyError as error:  # torch's rules for names
            raise InternalRLError(f"{name!r} cannot name an adapter ({error}); choose a plain word.") from error

    def _named(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise InternalRLError(f"There is no adapter {name!r}; known are {', '.join(self.adapters)}.")
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    # -- the steered forward ------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> SteeredModel:
        """Training mode for the adapters alone: the frozen base never drops units out."""
        super().train(mode)
        self.base.eval()
        return self

    @contextmanager
    def open_taps(self, *parts: tuple[ResidualTap, Steer]) -> Iterator[None]:
        """While open, forward passes of the base are steered; see `steering.open_taps`."""
        with open_taps(self.base, *parts):
            yield

    @torch.no_grad()
    def residual(self, inputs: Tensor, segments: Tensor | None = None, **more: Any) -> Tensor:
        """The residual stream (B, T, n_e) at the tap; the upper blocks are not computed.

        Args:
            inputs: tokens (B, T), or observations (B, T, observation_size); `segments` goes with these.
            more: as the base takes it, such as attention_mask.
        """
        if segments is not None:
            more["segments"] = segments
        return self.tap.read(self.base, **{self.base.main_input_name: inputs}, use_cache=False, **more)

    def view(self, inputs: Tensor, residual: Tensor) -> Tensor:
        """What the encoder's slow features are taken from, (B, T, n_e), as the metacontroller's `view` says.

        Args:
            inputs: tokens (B, T), or observations (B, T, observation_size); residual: (B, T, n_e) of these.
        """
        if self.metacontroller.config.view == "inferred":
            return self.inferred(inputs, residual)
        following = self.base.get_input_embeddings()(inputs[:, 1:]).detach()
        return F.pad(following, (0, 0, 0, 1)).to(residual.dtype)

    @torch.no_grad()
    def inferred(self, observations: Tensor, residual: Tensor) -> Tensor:
        """What the past adds to the `residual` (B, T, n_e): its difference from that of every step seen alone.

        It holds what the base has inferred, its belief about the hidden subgoal above all, and little of what the
        present observation shows by itself. Both sides start from the same embeddings, so what an encoder keeps of
        the step before is no inference. For a `TrajectoryModel` whose attention is masked by `segments`, and for
        language models, whose tokens are read as texts of their own.
        """
        if self.base.main_input_name == "input_ids":
            tokens, index = observations.unique(return_inverse=True)
            return residual - self.residual(tokens[:, None])[index, 0]
        alone = torch.arange(residual.shape[1], device=residual.device).expand(residual.shape[:2])
        embeddings, _ = self.base.encoder(observations)
        return residual - self.tap.read(self.base, inputs_embeds=embeddings, segments=alone)

    def forward(
        self,
        residual: Tensor | None = None,
        code: Tensor | None = None,
        where: Tensor | None = None,
        adapter_names: Sequence[str | None] | None = None,
        **inputs: Any,
    ) -> Any:
        """The base's forward pass, steered.

        From tokens, `steered(input_ids=..., attention_mask=..., ...)`, it takes and returns what the base does. From
        a `residual` (B, T, n_e) at the active tap it computes the upper blocks alone and returns the logits (B, T, A).

        Args:
            code: in force, (n_z,), (B, n_z) or (B, T, n_z). None lets the adapters decide, step by step from the
                first one on: their switch, and codes from their policy or, without one, from N(0, I).
            where: (B, T) bool, the steps at which `code` steers; None is all of them.
            adapter_names: the adapter of each row, None for the bare base; by default the active one is everyone's.
            inputs: as the base takes them.
        """
        entry = inputs.get(self.base.main_input_name) if residual is None else residual
        if entry is None or not (residual is None or residual.is_floating_point()):
            raise InternalRLError(f"forward was given no {self.base.main_input_name}; pass the inputs by their names.")
        if residual is not None and adapter_names is not None:
            raise InternalRLError("A residual belongs to the active adapter's tap; with adapter_names, give tokens.")
        if residual is not None and generation.given_cache(inputs) is not None:
            raise InternalRLError("From a residual the lower blocks are not computed, so that no cache can be filled.")
        shares = self.shares(len(entry), adapter_names)
        if code is not None:
            steers: list[Steer] = [share.given(code, where) for share in shares]
        else:
            steers = generation.deciding(shares, len(entry), inputs)
        parts = [share.at_tap(steer) for share, steer in zip(shares, steers, strict=True)]
        if residual is None:
            with self.open_taps(*parts):
                return self.base(**inputs)
        with self.tap.skipping_lower_blocks(residual), self.open_taps(*parts):
            # a copy, since some models scale their embeddings in place
            return self.base(inputs_embeds=residual.clone(), use_cache=False, **inputs).logits

    def shares(self, batch: int, adapter_names: Sequence[str | None] | None = None) -> list[Share]:
        """Which adapter steers which rows of a batch; nothing while adapters are disabled.

        Args:
            adapter_names: one per row, None for the bare base; by default the active one is everyone's.
        """
        if adapter_names is None:
            return [Share(self.adapter, None)] if self.enabled else []
        if len(adapter_names) != batch:
            raise InternalRLError(f"There are {len(adapter_names)} adapter_names for {batch} rows; name one per row.")
        shares = []
        for name in dict.fromkeys(adapter_names):
            if name is not None and self.enabled:
                rows = [row for row, own in enumerate(adapter_names) if own == name]
                shares.append(Share(self._named(name), torch.tensor(rows, device=self.base.device)))
        return shares


def bare(base: Base) -> SteeredModel:
    """The base alone, as a steered model whose controller is zero whatever the code."""
    steered = SteeredModel.from_base(base, MetacontrollerConfig())
    nn.init.zeros_(steered.metacontroller.up)
    return steered
