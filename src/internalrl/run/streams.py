"""Random streams: every purpose has its own, so that nothing is measured on what was trained on."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What random numbers are for; streams of another purpose, seed or index are independent.

    Results depend on these numbers: give a new purpose a new one.
    """

    PRETRAIN = 1  # demonstrations of stage 1
    DISCOVER = 2  # demonstrations of stage 2, and the order of their batches
    HELD_OUT = 3  # demonstrations that stages 1 and 2 are measured on
    PROBE = 4  # those of linear probes
    REPORT = 5  # those of the report
    LESSONS = 6  # what consolidation's teacher plays
    CONSOLIDATE = 7  # the order of its lessons
    FREE_PLAY = 8  # what random codes are measured on
    REINFORCE = 9  # episodes of stage 3
    EVALUATE = 10  # episodes that success is measured on
    SLOW = 11  # demonstrations that slow features are found on
    REHEARSE = 13  # demonstrations of rehearsal, and the order of their batches
    STRATEGIES = 12  # texts and episodes that strategies are found in
    PROMPTS = 14  # the order of stage 3's prompts

    def numpy(self, seed: int, index: int = 0) -> np.random.Generator:
        """The generator of a run's `seed`; `index` tells parts of the stream apart, such as batches."""
        return np.random.default_rng(self._sequence(seed, index))

    def torch(self, seed: int, index: int = 0) -> torch.Generator:
        """The same for torch."""
        state = self._sequence(seed, index).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))

    def _sequence(self, seed: int, index: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(seed, spawn_key=(self.value, index))
