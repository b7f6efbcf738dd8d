"""The causal policy over codes π(z | e_1:t): a GRU that advances at switches, and a Gaussian (paper, C.5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from internalrl.controller.metacontroller import gru_step

if TYPE_CHECKING:
    from internalrl.controller.choosers import RowNoise


class Limits(Protocol):
    """What a policy's choices are held within; see `strategies.limits`."""

    def require_codes(self) -> None: ...

    def decide(self, codes: Tensor, redraw: Callable[[Tensor], Tensor] | None = None) -> Any: ...


class Policy(nn.Module):
    """N(mean(e at switches so far), std²); the std is learned and does not depend on the state.

    Args:
        width: n_e of the residual it reads; n_z: size of a code; hidden: width of the recurrent layer.
        initial_std: standard deviation of the first codes.
    """

    def __init__(self, width: int, n_z: int, hidden: int, initial_std: float):
        super().__init__()
        self.hidden = hidden
        self.recurrent = nn.GRU(width, hidden, batch_first=True)
        self.mean = nn.Linear(hidden, n_z)
        self.log_std = nn.Parameter(torch.full((n_z,), math.log(initial_std)))
        with torch.no_grad():
            self.mean.weight *= 0.1
            self.mean.bias.zero_()

    def forward(self, x: Tensor) -> torch.distributions.Normal:
        """Distribution of the codes (B, S, n_z) at the S switches that read x (B, S, n_e)."""
        hidden, _ = self.recurrent(x)
        return torch.distributions.Normal(self.mean(hidden), self.log_std.exp(), validate_args=False)

    def log_prob(self, x: Tensor, code: Tensor) -> Tensor:
        """log π(code | x), (B, S)."""
        return self(x).log_prob(code).sum(-1)


class PolicyActor:
    """Proposes codes for one batch of episodes and remembers what it saw and chose.

    Args:
        policy: it is not changed.
        episodes: number of rows of the batch.
        generator: of all rows together, or noise that a row has to itself.
        deterministic: propose the mean instead of a sample.
        limits: applied to what the policy chose: no code that they deny is ever proposed. What is remembered is the
            policy's choice, of which alone it knows the probability; what the limits make of it is the environment's.

    Raises:
        InternalRLError: the limits switch steering off for denied codes, which a proposal cannot.
    """

    def __init__(
        self,
        policy: Policy,
        episodes: int,
        generator: torch.Generator | RowNoise,
        deterministic: bool = False,
        limits: Limits | None = None,
    ):
        if limits is not None:
            limits.require_codes()
        self.policy, self.generator, self.deterministic, self.limits = policy, generator, deterministic, limits
        self.hidden = torch.zeros(episodes, policy.recurrent.hidden_size)
        self.events: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def __call__(self, rows: Tensor, x: Tensor) -> Tensor:
        hidden = gru_step(self.policy.recurrent, x, self.hidden[rows])
        self.hidden[rows] = hidden
        code = self.policy.mean(hidden) if self.deterministic else self._draw(rows, hidden)
        self.events.append((rows, x, code))
        if self.limits is None:
            return code
        return self.limits.decide(code, lambda denied: self._draw(rows[denied], hidden[denied])).codes

    def _draw(self, rows: Tensor, hidden: Tensor) -> Tensor:
        mean = self.policy.mean(hidden)
        if isinstance(self.generator, torch.Generator):
            noise = torch.randn(mean.shape, generator=self.generator)
        else:
            noise = self.generator.next(torch.zeros(len(self.hidden), dtype=torch.bool).index_fill(0, rows, True))[rows]
        return mean + self.policy.log_std.exp() * noise

    def segments(self) -> tuple[Tensor, Tensor, Tensor]:
        """What was read (N, S, n_e), the codes chosen (N, S, n_z) and the mask (N, S) of real switches."""
        rows, x, code = (torch.cat(parts) for parts in zip(*self.events, strict=True))
        order = torch.argsort(rows, stable=True)  # events are in order of time within each episode
        counts = torch.bincount(rows, minlength=len(self.hidden)).tolist()
        x, code = (pad_sequence(list(v[order].split(counts)), batch_first=True) for v in (x, code))
        return x, code, torch.arange(x.shape[1]) < torch.tensor(counts)[:, None]
