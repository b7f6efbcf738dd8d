"""Successes that are learned from again: self-imitation (Oh et al., 2018) in its smallest form.

Where one program in fifty thousand succeeds, one iteration moves the policy towards it, but not far enough to find it
again soon. So the newest successes join every batch as if they had just been played: their ratio is 1 in the first
pass, and they are compared with the batch. Once the policy succeeds by itself, they are few among many.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from internalrl.controller.policy import Policy
from internalrl.reinforce.agents import Decisions
from internalrl.run.processes import Processes

SEGMENTS = 32
"""Episodes of more decisions are not kept."""


class Replay(nn.Module):
    """The newest `size` successful episodes of a `policy`, as buffers, so that checkpoints hold them.

    Attributes:
        seen (size, SEGMENTS, n_e), chosen (size, SEGMENTS, n_z), mask (size, SEGMENTS), reward (size,), groups (size,):
            the oldest first. Rows that are not used yet have no decisions.
    """

    seen: Tensor
    chosen: Tensor
    mask: Tensor
    reward: Tensor
    groups: Tensor

    def __init__(self, size: int, policy: Policy):
        super().__init__()
        self.register_buffer("seen", torch.zeros(size, SEGMENTS, policy.recurrent.input_size))
        self.register_buffer("chosen", torch.zeros(size, SEGMENTS, policy.mean.out_features))
        self.register_buffer("mask", torch.zeros(size, SEGMENTS, dtype=torch.bool))
        self.register_buffer("reward", torch.zeros(size))
        self.register_buffer("groups", torch.zeros(size, dtype=torch.long))

    def join(
        self, decisions: Decisions, reward: Tensor, groups: Tensor | None, own: list[int], processes: Processes
    ) -> tuple[Decisions, Tensor, Tensor, list[int]]:
        """A batch with the earlier successes behind it, whose own are then kept.

        Args:
            decisions: of this process's episodes; reward, groups: (N,), of all processes' episodes.
            own: which of them are this process's.

        Returns:
            The same with R earlier successes, which are the first process's to learn from.
        """
        groups = torch.zeros(len(reward), dtype=torch.long) if groups is None else groups
        used, longest = self.mask.any(1), int(self.mask.sum(1).max())
        earlier = Decisions(self.seen[used, :longest], self.chosen[used, :longest], self.mask[used, :longest])
        both = torch.cat([reward, self.reward[used]]), torch.cat([groups, self.groups[used]])
        self._keep(decisions, reward[own], groups[own], processes)
        if not processes.first or not used.any():
            return decisions, *both, own
        return Decisions.join([decisions, earlier]), *both, own + list(range(len(reward), len(both[0])))

    def _keep(self, decisions: Decisions, reward: Tensor, groups: Tensor, processes: Processes) -> None:
        counts = decisions.mask.sum(1).tolist()
        rows = [row for row, count in enumerate(counts) if reward[row] > 0 and 0 < count <= SEGMENTS]
        found = [
            (decisions.seen[row, : counts[row]], decisions.chosen[row, : counts[row]], reward[row], groups[row])
            for row in rows[-len(self.reward) :]
        ]
        for seen, chosen, worth, group in processes.gather(found)[-len(self.reward) :]:
            for buffer in self.buffers():
                buffer.copy_(buffer.roll(-1, 0))
            count = len(seen)
            self.seen[-1, :count], self.chosen[-1, :count] = seen, chosen
            self.mask[-1] = torch.arange(SEGMENTS) < count
            self.reward[-1], self.groups[-1] = worth, group
