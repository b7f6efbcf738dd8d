"""A metacontroller at work on a batch: what the tap calls with e, for whole prompts and for single tokens alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from internalrl.base.residual import ResidualTap, Steer
from internalrl.controller.adapter import Adapter
from internalrl.controller.choosers import Choose
from internalrl.controller.metacontroller import Metacontroller, MetacontrollerState
from internalrl.errors import InternalRLError


class Steering:
    """Takes the residual stream column by column: switches, adopts codes, writes back.

    It is called with chunks (B, T, n_e) that follow each other: all steps of a sequence; a prompt, whole or in parts,
    and then one token at a time; or one step of an environment. A row's first decision always opens a segment.

    Args:
        metacontroller: it is not changed.
        choose: says which codes are in force.
        state: before the first column.
        prompt: number of columns at the start that enter the history and are neither steered nor decided.
        mask: (B, columns) bool, False where a row is padded: nothing of the row changes there. Columns beyond it
            are real in every row.
        fresh: (B,) bool, rows whose context was just cut: their switch knows nothing yet and does not fire.
        silent: (B,) bool, rows that only read these columns, as they do a prompt: the next that they do not opens a
            segment.
        control: writes the codes back in place of `Metacontroller.control`.

    Attributes:
        state: after the last column.
        switch, logit, code: per decided column, lists of (B,) bool, (B,) and (B, n_z).
    """

    def __init__(
        self,
        metacontroller: Metacontroller,
        choose: Choose,
        state: MetacontrollerState,
        prompt: int = 0,
        mask: Tensor | None = None,
        fresh: Tensor | None = None,
        silent: Tensor | None = None,
        control: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self.metacontroller, self.choose, self.state = metacontroller, choose, state
        self.prompt, self.mask, self.fresh, self.silent = prompt, mask, fresh, silent
        self.control = control or metacontroller.control
        self.columns = 0
        self.switch: list[Tensor] = []
        self.logit: list[Tensor] = []
        self.code: list[Tensor] = []

    def __call__(self, residual: Tensor) -> Tensor:
        meta, length = self.metacontroller, residual.shape[1]
        if length > 1 and self.columns > self.prompt:
            raise InternalRLError("The base decodes without a cache, which steering needs: no token is decided twice.")
        x = meta.read(residual)
        silent = min(max(self.prompt - self.columns, 0), length)
        if silent:
            mask = None if self.mask is None else self.mask[:, self.columns : self.columns + silent]
            history = meta.remember(x[:, :silent], self.state.history, mask)[:, -1]
            self.state = replace(self.state, history=history)
        for t in range(silent, length):
            self._decide(x[:, t], self._real(self.columns + t))
        self.columns += length
        if silent == length:
            return residual
        steered = self.control(residual[:, silent:], torch.stack(self.code[silent - length :], 1))
        if self.silent is not None:
            steered = torch.where(self.silent[:, None, None], residual[:, silent:], steered)
        return torch.cat([residual[:, :silent], steered], 1) if silent else steered

    def _real(self, column: int) -> Tensor | None:
        """(B,) bool, rows that are not padded there; None when that is all of them."""
        return self.mask[:, column] if self.mask is not None and column < self.mask.shape[1] else None

    def _decide(self, x: Tensor, real: Tensor | None) -> None:
        before = self.state
        switch, logit, history = self.metacontroller.advance(x, before)
        if real is not None:
            switch, history = switch & real, torch.where(real[:, None], history, before.history)
        if self.fresh is not None:
            switch = switch & ~self.fresh
        if self.silent is not None:
            switch = switch & ~self.silent
        code, started = self.choose(switch, x, before.code), before.started | switch
        if self.silent is not None:
            code, started = code.masked_fill(self.silent[:, None], 0), started & ~self.silent
        self.state = MetacontrollerState(history, code, started)
        self.switch.append(switch)
        self.logit.append(logit)
        self.code.append(code)


@dataclass(frozen=True)
class Share:
    """The rows of a batch that one adapter steers: those in `rows`, an index tensor, or all if it is None."""

    adapter: Adapter
    rows: Tensor | None

    def of(self, values: Tensor) -> Tensor:
        """The share's part of something that has an entry per row of the batch."""
        return values if self.rows is None else values[self.rows]

    def at_tap(self, steer: Steer) -> tuple[ResidualTap, Steer]:
        """Where `steer` acts, and what it does to the whole batch."""
        rows = self.rows
        if rows is None:
            return self.adapter.tap, steer
        return self.adapter.tap, lambda residual: residual.index_copy(0, rows, steer(residual.index_select(0, rows)))

    def deciding(self, choose: Choose, batch: int, prompt: int = 0, mask: Tensor | None = None) -> Steering:
        """Steers as the metacontroller decides; `prompt` and `mask`, of the whole batch, as in `Steering`."""
        meta = self.adapter.metacontroller
        state = meta.start(batch if self.rows is None else len(self.rows), meta.down.device)
        return Steering(meta, choose, state, prompt, None if mask is None else self.of(mask).to(meta.down.device))

    def given(self, code: Tensor, where: Tensor | None) -> Steer:
        """Steers with codes that are known; `code` and `where` as `SteeredModel.forward` takes them."""
        code = self.of(code) if code.ndim > 1 else code
        code = code[:, None] if code.ndim == 2 else code
        here = None if where is None else self.of(where)[..., None]

        def steer(residual: Tensor) -> Tensor:
            steered = self.adapter.metacontroller.control(residual, code)
            return steered if here is None else torch.where(here, steered, residual)

        return steer


@contextmanager
def open_taps(base: nn.Module, *parts: tuple[ResidualTap, Steer]) -> Iterator[None]:
    """While open, forward passes of the base continue, at each tap, from what its function makes of e.

    The functions compute in their own precision, also where the base runs under autocast.
    """
    if parts and getattr(base, "_compiled_call_impl", None) is not None:
        raise InternalRLError(
            "The base was compiled in place, and torch.compile does not see the tap; load it anew, uncompiled."
        )
    with ExitStack() as stack:
        for tap, steer in parts:
            stack.enter_context(tap.steering(_without_autocast(steer)))
        yield


def _without_autocast(steer: Steer) -> Steer:
    def steer_precisely(residual: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(residual.device.type):
            return steer(residual)
        with torch.autocast(residual.device.type, enabled=False):
            return steer(residual)

    return steer_precisely
