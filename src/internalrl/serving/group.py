"""Running sequences that one adapter steers with codes from one kind of source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from internalrl.base.residual import ResidualTap, Steer
from internalrl.metacontroller.adapter import Adapter
from internalrl.metacontroller.codes import Drawn, Given
from internalrl.metacontroller.limits import Decisions, Limits
from internalrl.metacontroller.steering import Share, Steering


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
        self.off = torch.zeros_like(self.state.started)  # rows that the limits keep from being steered
        self.decided: Decisions | Exception | None = None
        self.steering: Steering | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """Groups of the same kind can be joined."""
        policy = self.choose.policy if isinstance(self.choose, Drawn) else None
        return self.adapter, id(self.limits), type(self.choose), policy

    def join(self, other: Group) -> None:
        """Add the rows of `other`."""
        self.state, self.off = self.state.join(other.state), torch.cat([self.off, other.off])
        self.choose.join(other.choose)  # type: ignore[arg-type]

    def select(self, rows: list[int]) -> None:
        """Keep only `rows`."""
        self.state, self.off = self.state.select(torch.tensor(rows)), self.off[rows]
        self.choose.select(rows)

    # -- in a forward pass --------------------------------------------------------------------------------

    def part(self, rows: Tensor | None, prompt: int = 0) -> tuple[ResidualTap, Steer]:
        """Where and how to steer one forward pass of the base; `finish` comes after it.

        Args:
            rows: of the batch; None is all of them.
            prompt: number of columns at the start that enter the history and are neither steered nor decided.
        """
        self.decided = None
        self.steering = steering = Steering(self.adapter.metacontroller, self._choose, self.state, prompt)

        def steer(residual: Tensor) -> Tensor:
            steered = steering(residual)
            return steered if self.limits is None else torch.where(self.off[:, None, None], residual, steered)

        return Share(self.adapter, rows).at_tap(steer)

    def finish(self) -> Iterator[Opening]:
        """Take over what the forward pass has changed; the segments that it has opened."""
        steering, self.steering = self.steering, None
        assert steering is not None
        self.state = steering.state
        if not steering.switch:  # it read nothing but prompts
            return
        rows = [row for row, switched in enumerate(steering.switch[-1].tolist()) if switched]
        if not rows:
            return
        logits, codes = steering.logit[-1][rows].tolist(), steering.code[-1][rows].tolist()
        decided = self.decided
        for at, row in enumerate(rows):
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
        if self.limits is None or not switch.any():
            return code
        rows, choose = switch.nonzero().squeeze(-1), self.choose

        def redraw(denied: Tensor) -> Tensor:
            assert isinstance(choose, Drawn)
            again = rows[denied]
            return choose.draw(torch.zeros_like(switch).index_fill(0, again, True))[again]

        try:  # codes that were chosen beforehand cannot be drawn again
            decisions = self.limits.decide(code[rows], redraw if isinstance(choose, Drawn) else None)
            code = code.index_copy(0, rows, decisions.codes.to(code))
            self.off = self.off.index_copy(0, rows, ~decisions.steer.to(self.off))
            self.decided = decisions
        except Exception as error:  # it is told to the requests of these rows alone
            self.decided = error
            self.off = self.off.index_fill(0, rows, True)
        return code
