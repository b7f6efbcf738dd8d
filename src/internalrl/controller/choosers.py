"""Which code next? Drawn from prior or policy, given beforehand, or asked of anyone, row by row (paper, C.5).

The first two answer for the whole batch and hardly ever ask the device whether a row has switched: decoding does not
wait. Their rows can come and go: `select` keeps some, `join` adds those of another batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from internalrl.controller.metacontroller import gru_step
from internalrl.controller.policy import Policy
from internalrl.errors import InternalRLError

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Codes in force from this step on: (switch (B,) bool, x (B, n_e) as read, code (B, n_z) so far) -> (B, n_z)."""

Propose = Callable[[Tensor, Tensor], Tensor]
"""Which code next? (rows that switch (S,), what they read (S, n_e)) -> codes (S, n_z)."""

SEGMENTS = 64
"""Segments that `RowNoise` draws at a time; a row's numbers depend on it."""


def asking(propose: Propose) -> Choose:
    """Ask `propose` about the rows that switch; it is not asked when there are none."""

    def choose(switch: Tensor, x: Tensor, code: Tensor) -> Tensor:
        rows = switch.nonzero().squeeze(-1)
        return code.index_copy(0, rows, propose(rows, x[rows])) if len(rows) else code

    return choose


class Drawn:
    """Codes drawn from N(0, I), or from `policy`, whose recurrence advances at switches.

    Args:
        noise: what is drawn, one vector per row and segment.
        temperature: factor on the standard deviation; 0 takes the mean.
    """

    def __init__(self, noise: RowNoise, temperature: float = 1.0, policy: Policy | None = None):
        self.noise, self.policy = noise, policy
        self.temperature = noise.table.new_full((len(noise), 1), temperature)
        self.hidden = noise.table.new_zeros(len(noise), 0 if policy is None else policy.hidden)

    def __call__(self, switch: Tensor, x: Tensor, code: Tensor) -> Tensor:
        if switch.device.type == "cpu" and not switch.any():  # where asking is for free
            return code
        if self.policy is not None:
            hidden = gru_step(self.policy.recurrent, x, self.hidden)
            self.hidden = torch.where(switch[:, None], hidden, self.hidden)
        return torch.where(switch[:, None], self.draw(switch), code)

    def ready(self, count: int) -> Drawn:
        """Have what `count` calls may draw, and return what is to go on from here, should they be taken back."""
        self.noise.fill(count)
        before = copy.copy(self)
        before.noise = copy.copy(self.noise)
        return before

    def draw(self, switch: Tensor) -> Tensor:
        """Codes (B, n_z) for the segments that have just begun where `switch` (B,) is True; each call draws anew."""
        proposal = self.temperature * self.noise.next(switch)
        if self.policy is not None:
            proposal = self.policy.mean(self.hidden) + self.policy.log_std.exp() * proposal
        return proposal

    def select(self, rows: list[int]) -> None:
        self.noise.select(rows)
        self.temperature, self.hidden = self.temperature[rows], self.hidden[rows]

    def join(self, other: Drawn) -> None:
        """Add the rows of `other`, which draws from the same policy."""
        self.noise.join(other.noise)
        self.temperature = torch.cat([self.temperature, other.temperature])
        self.hidden = torch.cat([self.hidden, other.hidden])


class Given:
    """Codes (B, S, n_z) that are known beforehand: one per segment; the last one stays in force."""

    def __init__(self, codes: Tensor):
        self.codes = codes
        self.rows = torch.arange(len(codes), device=codes.device)
        self.segment = torch.zeros_like(self.rows)
        self.last = torch.full_like(self.rows, codes.shape[1] - 1)

    def __call__(self, switch: Tensor, x: Tensor, code: Tensor) -> Tensor:
        proposal = self.codes[self.rows, self.segment.minimum(self.last)]
        self.segment = self.segment + switch
        return torch.where(switch[:, None], proposal, code)

    def ready(self, count: int) -> Given:
        """As `Drawn.ready`; nothing is drawn here."""
        return copy.copy(self)

    def select(self, rows: list[int]) -> None:
        self.codes, self.segment, self.last = self.codes[rows], self.segment[rows], self.last[rows]
        self.rows = torch.arange(len(rows), device=self.codes.device)

    def join(self, other: Given) -> None:
        """Add the rows of `other`."""
        most = max(self.codes.shape[1], other.codes.shape[1])
        padded = [F.pad(codes, (0, 0, 0, most - codes.shape[1])) for codes in (self.codes, other.codes)]
        self.codes, self.last = torch.cat(padded), torch.cat([self.last, other.last])
        self.segment = torch.cat([self.segment, other.segment])
        self.rows = torch.arange(len(self.codes), device=self.codes.device)


class RowNoise:
    """Standard normal vectors, one per row and segment; those of a row depend on its seed alone.

    Whatever else is in the batch, wherever other rows switch: a row gets the same numbers. They are drawn on the
    CPU, so that they are the same on every device.

    Args:
        seeds: one per row.
        like: a tensor of the device and type that they are needed in.
    """

    def __init__(self, seeds: Sequence[int], n_z: int, like: Tensor):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.drawn = [torch.empty(0, n_z) for _ in seeds]
        self.segment = torch.zeros(len(seeds), dtype=torch.long, device=like.device)  # the next of a row's `drawn`
        self._clear(like)

    def __len__(self) -> int:
        return len(self.segment)

    def next(self, switch: Tensor) -> Tensor:
        """(B, n_z) for the segments that begin where `switch` (B,) is True; what others get is not used up."""
        self.fill(1)
        self.asked += 1
        vector = self.table[self.rows, self.segment]
        self.segment = self.segment + switch
        return vector

    def fill(self, count: int) -> None:
        """Have the vectors that the next `count` questions may use: no row uses more than one for each."""
        if self.asked + count > self.table.shape[1]:
            self._refill(max(count, SEGMENTS))

    def select(self, rows: list[int]) -> None:
        self.generators = [self.generators[row] for row in rows]
        self.drawn = [self.drawn[row] for row in rows]
        self.segment = self.segment[rows]
        self._clear(self.table)

    def join(self, other: RowNoise) -> None:
        """Add the rows of `other`."""
        self.generators = self.generators + other.generators
        self.drawn = self.drawn + other.drawn
        self.segment = torch.cat([self.segment, other.segment])
        self._clear(self.table)

    def _clear(self, like: Tensor) -> None:
        """Empty the table (B, S, n_z) of the rows' next vectors."""
        self.table = like.new_empty(len(self), 0, self.drawn[0].shape[1])
        self.rows = torch.arange(len(self), device=like.device)
        self.asked = 0

    def _refill(self, count: int) -> None:
        for row, used in enumerate(self.segment.tolist()):
            left = self.drawn[row][used:]
            while len(left) < count:
                more = torch.randn(SEGMENTS, left.shape[1], generator=self.generators[row])
                left = torch.cat([left, more])
            self.drawn[row] = left
        self.segment = torch.zeros_like(self.segment)
        self.table = torch.stack([left[:count] for left in self.drawn]).to(self.table)
        self.asked = 0


def row_seeds(
    generator: torch.Generator | Sequence[torch.Generator | None] | None, rows: int, copies: int = 1
) -> list[int]:
    """A seed for each of `rows` · `copies` rows, copies of a row side by side.

    Args:
        generator: one for all rows, one per row, or None for torch's own. A row's seeds depend on its number in the
            batch and on its copies in the first case, and on nothing but its own generator in the second.
    """
    if generator is None or isinstance(generator, torch.Generator):
        generator = [generator] * rows
    if len(generator) != rows:
        raise InternalRLError(f"There are {len(generator)} generators for {rows} rows; give one, or one per row.")
    seeds: list[int] = []
    for source in generator:
        device = "cpu" if source is None else source.device
        seeds += torch.randint(2**62, (copies,), generator=source, device=device).tolist()
    return seeds
