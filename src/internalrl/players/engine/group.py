"""Running sequences that one adapter steers with codes from one kind of source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from internalrl.base.residual import ResidualTap, Steer
from internalrl.controller.adapter import Adapter
from internalrl.controller.choosers import Drawn, Given
from internalrl.controller.metacontroller import Controller
from internalrl.controller.steering import Steering
from internalrl.strategies.limits import Decisions, Limits


@dataclass(frozen=True)
class Opening:
    """A segment that begins with the next token.

    Attributes:
        row: its sequence's, in the group.
        code: in force; empty where the limits have switched steering off.
        logit: the switch's.
        strategy, violation: as the limits tell.
        error: why the limits gave no answer; the segment is not steered.
    """

    row: int
    code: tuple[float, ...]
    logit: float
    strategy: str | None = None
    violation: str | None = None
    error: Exception | None = None


class Group:
    """What the metacontroller knows of R sequences; those of other requests can join, and leave.

    Args:
        choose: says which codes are in force; it has one row.
        limits: consulted about every new code.
    """

    def __init__(self, adapter: Adapter, choose: Drawn | Given, limits: Limits | None):
        self.adapter, self.choose, self.limits = adapter, choose, limits
        self.state = adapter.metacontroller.start(1, adapter.metacontroller.down.device)
        self.controller = adapter.metacontroller.controller(self.state.code)  # of the open segments
        self.opened: list[int] = []  # rows that have switched in this forward pass
        self.decided: Decisions | Exception | None = None
        self.steering: Steering | None = None
        self._before = choose, self.controller
        self._replaced: tuple[Tensor, Controller] | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """Groups of the same kind can be joined."""
        policy = self.choose.policy if isinstance(self.choose, Drawn) else None
        return self.adapter, id(self.limits), type(self.choose), policy

    def join(self, other: Group) -> None:
        """Add the rows of `other`, whose prompt was read."""
        self.state, self.controller = self.state.join(other.state), self.controller.join(other.controller)
        self.choose.join(other.choose)  # type: ignore[arg-type]

    def select(self, rows: list[int]) -> None:
        """Keep only `rows`."""
        kept = torch.tensor(rows)
        self.state, self.controller = self.state.select(kept), self.controller.select(kept)
        self.choose.select(rows)

    # -- in a forward pass --------------------------------------------------------------------------------

    def part(self, columns: Tensor, prompt: int = 0) -> tuple[ResidualTap, Steer]:
        """Where and how to steer one forward pass of the base; `finish` or `undo` comes after it.

        Args:
            columns: of the pass (1, N), in which the rows are: one of each row, or several of the only one.
            prompt: number of columns at the start that enter the history and are neither steered nor decided.
        """
        self.opened, self.decided, self._replaced = [], None, None
        redraws = 0 if self.limits is None else self.limits.config.redraws
        self._before = self.choose.ready(1 + redraws), self.controller
        meta, rows = self.adapter.metacontroller, len(self.state.started)
        steering = Steering(meta, self._choose, self.state, prompt, control=lambda e, _: self.controller(e))
        self.steering = steering

        def steer(residual: Tensor) -> Tensor:
            own = residual[0].index_select(0, columns).view(rows, -1, residual.shape[2])
            steered = steering(own)
            return residual if steered is own else residual.index_copy(1, columns, steered.view(1, len(columns), -1))

        return self.adapter.tap, steer

    def undo(self) -> None:
        """Be as before the forward pass, which failed."""
        if self.steering is None:
            return
        self.steering = None
        self.choose, self.controller = self._before
        if self._replaced is not None:
            self.controller.put(*self._replaced)

    def finish(self) -> Iterator[Opening]:
        """Take over what the forward pass has changed; the segments that it has opened."""
        steering, self.steering = self.steering, None
        assert steering is not None
        self.state = steering.state
        if not self.opened:
            return
        logits, codes = steering.logit[-1][self.opened].tolist(), steering.code[-1][self.opened].tolist()
        decided = self.decided
        for at, row in enumerate(self.opened):
            code = tuple(codes[at])
            if decided is None:
                yield Opening(row, code, logits[at])
            elif isinstance(decided, Exception):
                yield Opening(row, (), logits[at], error=decided)
            else:
                code = code if decided.steer[at] else ()
                yield Opening(row, code, logits[at], decided.strategies[at], decided.violations[at])

    def _choose(self, switch: Tensor, x: Tensor, code: Tensor) -> Tensor:
        code = self.choose(switch, x, code)
        rows = switch.nonzero().squeeze(-1)
        self.opened = rows.tolist()
        if not self.opened:
            return code
        off = None
        if self.limits is not None:
            code, off = self._limited(self.limits, switch, rows, code)
        controller = self.adapter.metacontroller.controller(code[rows])
        if off is not None:
            for factor in (controller.down, controller.offset, controller.up):
                factor.masked_fill_(off[:, None, None], 0)
        if len(rows) == len(switch):
            self.controller = controller
        else:
            self._replaced = rows, self.controller.select(rows)
            self.controller.put(rows, controller)
        return code

    def _limited(self, limits: Limits, switch: Tensor, rows: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """The codes (R, n_z) that the limits make of new ones in `rows` (S,), and which of these are off, (S,) bool."""
        choose = self.choose

        def redraw(denied: Tensor) -> Tensor:
            assert isinstance(choose, Drawn)
            again = rows[denied]
            return choose.draw(torch.zeros_like(switch).index_fill(0, again, True))[again]

        try:  # codes that were chosen beforehand cannot be drawn again
            decisions = self.decided = limits.decide(code[rows], redraw if isinstance(choose, Drawn) else None)
        except Exception as error:  # it is told to the requests of these rows alone
            self.decided = error
            return code, torch.ones_like(rows, dtype=torch.bool)
        return code.index_copy(0, rows, decisions.codes.to(code)), ~decisions.steer.to(rows.device)
