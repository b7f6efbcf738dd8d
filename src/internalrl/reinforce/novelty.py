"""Exploration while nothing is rewarded: what has failed often is avoided, and what is short is tried first.

Where all episodes fail there is no policy gradient, and the policy goes on drawing the same failures, most of them
short. What episodes came to, such as the outputs of a program, tells which have been tried. One of ℓ decisions that
came to what n others came to before is then worth

    −log(1 + n) − c ℓ

and its advantage is what that is above the mean. It is not divided by the standard deviation: where all that is tried
is new, differences are noise, which must not be enlarged. Counts are hashed (Tang et al., 2017). The cost c of a
decision keeps episodes as short as there is something new to find: a bonus for what is new, alone, is had most easily
by what is long. One success ends it, since from then on there is something to learn from. A policy over codes moves
its means alone meanwhile: few failures and long episodes are had most easily from a small standard deviation, which
then covers ever fewer outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor, nn

SLOTS = 2**20
SCALE = 0.3  # of a nat of novelty beside an advantage of 1, which is a success's standard deviation


class Novelty(nn.Module):
    """How often each outcome was met.

    Attributes:
        counts (SLOTS,): by hash; a buffer, so that checkpoints hold it.
    """

    counts: Tensor

    def __init__(self, decision_cost: float):
        super().__init__()
        self.decision_cost = decision_cost
        self.register_buffer("counts", torch.zeros(SLOTS, dtype=torch.int32))

    def advantages(self, outcomes: Sequence[str], decisions: Sequence[int]) -> Tensor:
        """(N,): `worth` above its mean, times SCALE."""
        worth = self.worth(outcomes, decisions)
        return SCALE * (worth - worth.mean())

    def worth(self, outcomes: Sequence[str], decisions: Sequence[int]) -> Tensor:
        """(N,): what N episodes with these outcomes and numbers of decisions are worth; they count from now on, each
        for those after it."""
        counts, met = self.counts.numpy(), []
        for outcome in outcomes:
            slot = int.from_bytes(blake2b(outcome.encode(), digest_size=8).digest(), "big") % SLOTS
            met.append(int(counts[slot]))
            counts[slot] += 1
        return -torch.tensor(met).log1p() - self.decision_cost * torch.tensor(decisions)
