"""ResidualTap: the one place where a model's residual stream is read and written (paper, Eq 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from internalrl.errors import InternalRLError

Steer = Callable[[Tensor], Tensor]


class _Stop(Exception):  # noqa: N818 (it ends a forward pass early, which is no error)
    def __init__(self, residual: Tensor):
        self.residual = residual


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks of any Hugging Face model: its longest ModuleList of equally many blocks."""
    depth = getattr(model.config, "num_hidden_layers", None)
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
        InternalRLError: no block list was found, or `layer` is out of range.
    """

    def __init__(self, model: PreTrainedModel, layer: int | str = "middle"):
        self.blocks = find_blocks(model)
        depth = len(self.blocks)
        self.layer = depth // 2 if layer == "middle" else int(layer)
        if not 1 <= self.layer <= depth - 1:
            raise InternalRLError(
                f"layer is {layer}, but this model has {depth} blocks: choose 1 to {depth - 1}, or 'middle'."
            )

    @contextmanager
    def steering(self, steer: Steer) -> Iterator[None]:
        """While open, every forward pass continues from `steer(e)` in place of e (B, T, n_e)."""

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (steer(output[0]), *output[1:])
            return steer(output)

        handle = self.blocks[self.layer - 1].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def read(self, model: nn.Module, **inputs: Any) -> Tensor:
        """The residual stream (B, T, n_e) of `model(**inputs)` at the tap; later blocks are not computed."""

        def stop(residual: Tensor) -> Tensor:
            raise _Stop(residual)

        try:
            with self.steering(stop):
                model(**inputs)
        except _Stop as stopped:
            return stopped.residual
        raise InternalRLError(f"{type(model).__name__} never ran its block {self.layer}; is it called as usual?")

    @contextmanager
    def skipping_lower_blocks(self, residual: Tensor) -> Iterator[None]:
        """While open, the blocks up to `layer` return `residual` at once: only the upper blocks are computed."""
        lower = self.blocks[: self.layer]
        for block in lower:
            block.forward = lambda *args, **kwargs: residual
        try:
            yield
        finally:
            for block in lower:
                del block.forward
