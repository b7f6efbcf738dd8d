"""Which code next? Drawn from prior or policy, given beforehand, or asked of anyone, row by row (paper, C.5).

The first two answer for the whole batch and never ask the device whether a row has switched: decoding does not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from internalrl.errors import InternalRLError
from internalrl.metacontroller.model import gru_step
from internalrl.metacontroller.policy import Policy

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
        self.noise, self.temperature, self.policy = noise, temperature, policy
        if policy is not None:
            self.hidden = policy.log_std.new_zeros(len(noise), policy.hidden)

    def __call__(self, switch: Tensor, x: Tensor, code: Tensor) -> Tensor:
        proposal = self.temperature * self.noise.next(switch)
        if self.policy is not None:
            hidden = gru_step(self.policy.recurrent, x, self.hidden)
            self.hidden = torch.where(switch[:, None], hidden, self.hidden)
            proposal = self.policy.mean(hidden) + self.policy.log_std.exp() * proposal
        return torch.where(switch[:, None], proposal, code)


class Given:
    """Codes (B, S, n_z) that are known beforehand: one per segment; the last one stays in force."""

    def __init__(self, codes: Tensor):
        self.codes = codes
        self.rows = torch.arange(len(codes), device=codes.device)
        self.segment = torch.zeros_like(self.rows)

    def __call__(self, switch: Tensor, x: Tensor, code: Tensor) -> Tensor:
        proposal = self.codes[self.rows, self.segment.clamp(max=self.codes.shape[1] - 1)]
        self.segment += switch
        return torch.where(switch[:, None], proposal, code)


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
        self.rows = torch.arange(len(seeds), device=like.device)
        self.segment = torch.zeros_like(self.rows)
        self.table = like.new_empty(len(seeds), 0, n_z)
        self.asked = 0

    def __len__(self) -> int:
        return len(self.rows)

    def next(self, switch: Tensor) -> Tensor:
        """(B, n_z) for the segments that begin where `switch` (B,) is True; what others get is not used up."""
        if self.asked == self.table.shape[1]:  # no row can have more segments than there were questions
            shape = SEGMENTS, self.table.shape[2]
            fresh = torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])
            self.table = torch.cat([self.table, fresh.to(self.table)], 1)
        self.asked += 1
        vector = self.table[self.rows, self.segment]
        self.segment += switch
        return vector


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
