"""ResidualTap: the one place where a model's residual stream is read and written (paper, Eq 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from internalrl.errors import InternalRLError

Steer = Callable[[Tensor], Tensor]


class _Stop(Exception):  # noqa: N818 (it ends a forward pass early, which is no error)
    pass


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks of any Hugging Face model: its first ModuleList as long as it is deep."""
    config: Any = model.config
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    for _, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise InternalRLError(
        f"No list of {depth} decoder blocks was found in {type(model).__name__}; "
        "a metacontroller needs a decoder-only model with one residual stream."
    )


class ResidualTap:
    """Hands the residual stream after block `layer` (1-based) to a function and puts back what it returns.

    Args:
        model: any Hugging Face decoder.
        layer: number of blocks below the tap, 1 to depth − 1; "middle" is depth // 2.

    Raises:
        InternalRLError: no block list was found, or `layer` is out of range; later, when the model turns out to
            have several residual streams, or when a forward pass does not come by the tap exactly once: never when
            torch.compile compiled the model before the tap was opened, several times when blocks are used again.
    """

    def __init__(self, model: PreTrainedModel, layer: int | str = "middle"):
        self.model, self.blocks = model, find_blocks(model)
        depth = len(self.blocks)
        chosen = depth // 2 if layer == "middle" else layer
        if not isinstance(chosen, int) or not 1 <= chosen <= depth - 1:
            raise InternalRLError(
                f"layer is {layer}, but this model has {depth} blocks: choose 1 to {depth - 1}, or 'middle'."
            )
        self.layer = chosen
        self._outputs: int | None = None  # how many values a block returns together; 0 is a bare tensor

    @contextmanager
    def steering(self, steer: Steer) -> Iterator[None]:
        """While open, every forward pass continues from `steer(e)` in place of e (B, T, n_e)."""
        reached, visits = False, 0

        def begin(*_: Any) -> None:
            nonlocal visits
            visits = 0

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            nonlocal reached, visits
            reached, visits = True, visits + 1
            if visits > 1:
                raise InternalRLError(
                    f"Block {self.layer} runs several times in one forward pass, so that it would be steered several "
                    "times; give a decoder that runs every block once."
                )
            several = isinstance(output, tuple | list)
            residual = output[0] if several else output
            if residual.ndim > 3:
                raise InternalRLError(
                    f"Block {self.layer} returns a residual of the shape {tuple(residual.shape)}, expected (batch, "
                    "steps, width): a metacontroller needs a decoder with a single residual stream."
                )
            return (steer(residual), *output[1:]) if several else steer(residual)

        def end(*_: Any) -> None:
            if not visits:
                raise InternalRLError(self._missed())

        handles = [
            self.model.register_forward_pre_hook(begin),
            self.blocks[self.layer - 1].register_forward_hook(hook),
            self.model.register_forward_hook(end),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if not reached:
            raise InternalRLError(self._missed())

    def _missed(self) -> str:
        return (
            f"The forward pass never reached the tap after block {self.layer}: it ran another model, or one that "
            "torch.compile compiled without the tap; call the tapped model itself, uncompiled."
        )

    def read(self, model: nn.Module, **inputs: Any) -> Tensor:
        """The residual stream (B, T, n_e) of `model(**inputs)` at the tap; later blocks are not computed."""
        found: list[Tensor] = []

        def stop(residual: Tensor) -> Tensor:
            found.append(residual)
            raise _Stop

        with suppress(_Stop), self.steering(stop):
            model(**inputs)
        return found[0]

    @contextmanager
    def skipping_lower_blocks(self, residual: Tensor) -> Iterator[None]:
        """While open, the blocks up to `layer` return `residual`: only the upper ones are computed."""

        def skipping(compute: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if self._outputs is None:  # only running a block tells what it returns; one does
                    with torch.no_grad():
                        output = compute(*args, **kwargs)
                    self._outputs = len(output) if isinstance(output, tuple | list) else 0
                return (residual, *[None] * (self._outputs - 1)) if self._outputs else residual

            return forward

        lower = self.blocks[: self.layer]
        for block in lower:
            block.forward = skipping(block.forward)
        try:
            yield
        finally:
            for block in lower:
                del block.forward
