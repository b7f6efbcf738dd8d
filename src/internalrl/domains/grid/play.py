"""Free play on the grid world: no task, no reward, no end before the horizon; and what was visited on the way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from internalrl.domains.grid.layouts import GridConfig, Layouts
from internalrl.domains.grid.world import GridBatch

ROOM = 30
"""Steps that must be left for the two colours of a subgoal; the expert needs 10.6 on average on the paper's grid."""


class FreePlay(GridBatch):
    """The grid's rules of movement alone; `trail` keeps where every agent has been."""

    def __init__(self, config: GridConfig, layouts: Layouts) -> None:
        super().__init__(config, layouts, (0,))
        self.trail = [self.position]

    def step(self, actions: NDArray[np.integer]) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
        """Play one action (N,) per row; there is no reward, and every row ends at the horizon together."""
        target = self._next[self.position, actions]
        content = self.layouts.contents[self._rows, target]
        wall = (content >= self.config.colors) & (content < self.config.empty)
        self.position = np.where(wall, self.position, target)
        self.trail.append(self.position)
        self.steps += 1
        self.alive = self.steps < self.config.horizon
        nothing = np.zeros(len(self), bool)
        return nothing.astype(np.float32), nothing, ~self.alive

    @property
    def positions(self) -> NDArray[np.int16]:
        """(N, T): the cell where each action so far was chosen."""
        return np.stack(self.trail[:-1], 1)


def entered_colors(
    config: GridConfig, contents: NDArray[np.uint8], positions: NDArray[np.integer]
) -> NDArray[np.int16]:
    """(N, T): the colour entered by the move before step t, −1 where there is none."""
    content = np.take_along_axis(contents, positions.astype(np.int64), 1).astype(np.int16)
    entered = np.zeros(positions.shape, bool)
    entered[:, 1:] = positions[:, 1:] != positions[:, :-1]
    return np.where(entered & (content < config.colors), content, -1)


def subgoal_transitions(
    config: GridConfig, entered: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What followed each completed subgoal in `entered` (N, T).

    A subgoal k is completed when colour 2k + 1 is entered directly after colour 2k. Returns counts (S, S) of the
    subgoal that the next two colours complete, and (S,) of all that followed: also other pairs of colours, or nothing
    within the `ROOM` steps that must be left.
    """
    subgoals = config.colors // 2
    done, total = np.zeros((subgoals, subgoals), np.int64), np.zeros(subgoals, np.int64)
    for row in entered:
        times = np.flatnonzero(row >= 0)
        colors = row[times]
        pair = (colors[:-1] % 2 == 0) & (colors[1:] == colors[:-1] + 1)  # pair[i]: colours i, i + 1 are a subgoal
        for i in np.flatnonzero(pair):
            if times[i + 1] + ROOM >= len(row):
                continue
            total[colors[i] // 2] += 1
            if i + 3 < len(colors) and pair[i + 2]:
                done[colors[i] // 2, colors[i + 2] // 2] += 1
    return done, total
