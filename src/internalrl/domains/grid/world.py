"""The grid world of arXiv 2512.20605 (appendix A, "gridworld-pinpad"): tasks, rules, expert; all batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from internalrl.domains.grid.layouts import (
    ACTIONS,
    MOVES,
    GridConfig,
    Layouts,
    observe,
    sample_layouts,
    shortest_path_moves,
)

__all__ = [
    "ACTIONS",
    "MOVES",
    "POST_TRAINING_TASK",
    "PRETRAINING_TASKS",
    "Demonstrations",
    "GridBatch",
    "GridConfig",
    "Layouts",
    "demonstrate",
    "observe",
    "parse_task",
    "pretraining_tasks",
    "sample_layouts",
    "task_table",
]

PRETRAINING_TASKS: tuple[tuple[int, ...], ...] = (
    (0, 1, 4, 5, 0, 1), (0, 1, 4, 5, 2, 3), (0, 1, 6, 7, 2, 3), (2, 3, 0, 1, 4, 5),
    (2, 3, 6, 7, 2, 3), (2, 3, 6, 7, 4, 5), (4, 5, 0, 1, 4, 5), (4, 5, 0, 1, 6, 7),
    (4, 5, 2, 3, 6, 7), (6, 7, 2, 3, 0, 1), (6, 7, 2, 3, 6, 7), (6, 7, 4, 5, 0, 1),
    (0, 1, 6, 7, 4, 5), (2, 3, 0, 1, 6, 7), (4, 5, 2, 3, 0, 1), (6, 7, 4, 5, 2, 3),
)  # fmt: skip
"""The paper's 16 tasks for 8 colours: subgoal k (colours 2k, 2k + 1) is never followed by k + 1 mod 4."""

POST_TRAINING_TASK: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3)
"""The paper's post-training task: made of exactly the transitions that the pretraining tasks leave out."""


def pretraining_tasks(config: GridConfig, length: int = 3) -> tuple[tuple[int, ...], ...]:
    """All tasks of `length` subgoals that contain no withheld transition.

    Subgoal k is the pair of colours 2k, 2k + 1; with n of them, the transitions k → k + 1 mod n are withheld
    and k → k does not occur. With 8 colours and length 3 these are the paper's 16, in the paper's order.
    ValueError for an odd number of colours, or fewer than 6, where no transition would be left to show.
    """
    if (config.colors, length) == (8, 3):
        return PRETRAINING_TASKS
    subgoals = config.colors // 2
    if config.colors % 2 or subgoals < 3 or length < 1:
        raise ValueError(
            f"no pretraining tasks of {length} subgoals for {config.colors} colours; a subgoal is a pair of "
            "colours, so use an even number of colours, 6 or more, and at least one subgoal."
        )
    chains = product(range(subgoals), repeat=length)
    allowed = (c for c in chains if all((b - a) % subgoals > 1 for a, b in pairwise(c)))
    return tuple(tuple(color for k in chain for color in (2 * k, 2 * k + 1)) for chain in allowed)


def parse_task(text: str, config: GridConfig) -> tuple[int, ...]:
    """The text 0-1-4-5 → (0, 1, 4, 5); ValueError if empty, or a colour is unknown or follows itself."""
    try:
        task = tuple(int(part) for part in text.split("-"))
    except ValueError:
        raise ValueError(f"task {text!r} is not a list of colours; write colour numbers like 0-1-4-5.") from None
    unknown = [color for color in task if color >= config.colors]
    if unknown:
        raise ValueError(f"task {text!r} names colour {unknown[0]}; this grid has colours 0 to {config.colors - 1}.")
    if any(a == b for a, b in pairwise(task)):
        raise ValueError(f"task {text!r} seeks a colour twice in a row; put another colour in between.")
    return task


def task_table(tasks: Sequence[Sequence[int]]) -> NDArray[np.int16]:
    """Tasks as one (K, L) array, the shorter ones padded with −1."""
    table = np.full((len(tasks), max(map(len, tasks))), -1, np.int16)
    for row, task in zip(table, tasks, strict=True):
        row[: len(task)] = task
    return table


_STATE = ("position", "progress", "steps", "alive")


class GridBatch:
    """The rules, for N episodes at once, each with its own layout.

    `position`, `progress` (colours of the task done so far), `steps` are (N,) integers, `alive` is (N,)
    booleans. A move into a wall or off the grid leaves the agent where it is. A colour counts as visited only
    when it is entered from another cell: the sought one advances `progress`, any other ends the episode with
    reward 0. Completing the task gives reward 1 and ends the episode; `config.horizon` steps truncate it.
    """

    given = None  # every move is the agent's own

    def __init__(self, config: GridConfig, layouts: Layouts, task: Sequence[int] | NDArray[np.integer]) -> None:
        """`task` is one task for all rows, or (N, L), a task per row padded with −1 (see `task_table`)."""
        self.config = config
        self.layouts = layouts
        self.task = np.broadcast_to(np.asarray(task, np.int16), (len(layouts), np.shape(task)[-1]))
        self._length = (self.task >= 0).sum(1)
        self._next = _next_cells(config.size)
        self._rows = np.arange(len(layouts))
        self.position = layouts.start.copy()
        self.progress = np.zeros(len(layouts), np.int16)
        self.steps = np.zeros(len(layouts), np.int16)
        self.alive = np.ones(len(layouts), bool)

    def __len__(self) -> int:
        return len(self.position)

    @property
    def sought(self) -> NDArray[np.int16]:
        """(N,): the colour each row is to visit next; for a completed task, its last colour."""
        return self.task[self._rows, np.minimum(self.progress, self._length - 1)]

    def observe(self) -> NDArray[np.uint8]:
        """(N, observation_size) one-hot observations of the current state."""
        return observe(self.config, self.layouts.contents, self.position)

    def step(self, actions: NDArray[np.integer]) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
        """Play one action (N,) per row; returns reward, terminated, truncated, each (N,).

        Rows that had already ended stay as they are and give 0, False, False.
        """
        target = self._next[self.position, actions]
        content = self.layouts.contents[self._rows, target]
        wall = (content >= self.config.colors) & (content < self.config.empty)
        moved = self.alive & ~wall & (target != self.position)
        entered = moved & (content < self.config.colors)
        correct = entered & (content == self.sought)
        self.position = np.where(moved, target, self.position)
        self.progress += correct
        self.steps += self.alive
        success = correct & (self.progress == self._length)
        terminated = success | (entered & ~correct)
        truncated = self.alive & ~terminated & (self.steps >= self.config.horizon)
        self.alive &= ~(terminated | truncated)
        return success.astype(np.float32), terminated, truncated

    def select(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> GridBatch:
        """A new batch of only these rows, in their current state."""
        batch = GridBatch(self.config, self.layouts[rows], self.task[rows])
        for name in _STATE:
            setattr(batch, name, getattr(self, name)[rows].copy())
        return batch

    def replace(self, rows: NDArray[np.integer], other: GridBatch) -> None:
        """Put the episodes of `other` (tasks of the same padded length) in the place of these rows."""
        contents, start, task = self.layouts.contents.copy(), self.layouts.start.copy(), self.task.copy()
        contents[rows], start[rows], task[rows] = other.layouts.contents, other.layouts.start, other.task
        self.layouts, self.task, self._length = Layouts(contents, start), task, (task >= 0).sum(1)
        for name in _STATE:
            getattr(self, name)[rows] = getattr(other, name)


@cache
def _next_cells(size: int) -> NDArray[np.int16]:
    """(cells, 4): where each of `MOVES` leads on a grid without walls; off the grid means staying."""
    row, column = np.divmod(np.arange(size * size), size)
    up, down = np.maximum(row - 1, 0), np.minimum(row + 1, size - 1)
    left, right = np.maximum(column - 1, 0), np.minimum(column + 1, size - 1)
    moves = [up * size + column, row * size + right, down * size + column, row * size + left]
    return np.stack(moves, 1).astype(np.int16)


# -------------------------------------------------------------------------------------------------- expert


@dataclass(frozen=True)
class Demonstrations:
    """N episodes of the expert, T the longest of them; steps t ≥ lengths[n] are padding and repeat the
    last."""

    layouts: Layouts
    """The N layouts."""
    tasks: tuple[tuple[int, ...], ...]
    """The tasks that were drawn from."""
    task: NDArray[np.int64]
    """(N,): index into `tasks`."""
    positions: NDArray[np.int16]
    """(N, T): the cell where the agent stood when it chose actions[n, t]."""
    actions: NDArray[np.int8]
    """(N, T): moves, as numbered by `MOVES`."""
    progress: NDArray[np.int16]
    """(N, T): how many colours of the task were done at step t."""
    lengths: NDArray[np.int64]
    """(N,): number of actions."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(N, T): True at steps that are not padding."""
        return np.arange(self.actions.shape[1]) < self.lengths[:, None]

    @property
    def sought(self) -> NDArray[np.int16]:
        """(N, T): the colour the agent was heading for."""
        return task_table(self.tasks)[self.task[:, None], self.progress]

    @property
    def subgoal(self) -> NDArray[np.int16]:
        """(N, T): the true subgoal, that is the pair of colours (2k, 2k + 1) that `sought` belongs to."""
        return self.sought // 2

    @property
    def boundaries(self) -> NDArray[np.bool_]:
        """(N, T): True at the first step of each subgoal but an episode's first one; False in the padding."""
        first = np.zeros(self.actions.shape, bool)
        first[:, 1:] = np.diff(self.subgoal, axis=1) != 0
        return first


def _choices() -> NDArray[np.int8]:
    """(16, 12): [a set of moves as 4 bits, a number below 12] → one move of the set.

    12 is a multiple of every set's size, so a uniform number gives a uniform move; of the empty set, any.
    """
    sets = [[move for move in range(ACTIONS) if bits >> move & 1] for bits in range(16)]
    return np.array([np.resize(members or range(ACTIONS), 12) for members in sets], np.int8)


_CHOICE = _choices()


def optimal_moves(
    boards: NDArray[np.uint64], sought: NDArray[np.integer], positions: NDArray[np.integer]
) -> NDArray[np.uint8]:
    """(N,): the optimal moves as 4 bits (bit m: `MOVES[m]`), one query for each row of
    `shortest_path_moves`."""
    query = np.arange(len(boards)) * boards.shape[1] + sought
    found = boards.reshape(-1, ACTIONS).take(query, axis=0) >> positions.astype(np.uint64)[:, None]
    return (found.astype(np.uint8) & 1) @ np.array([1, 2, 4, 8], np.uint8)


def demonstrate(
    config: GridConfig,
    count: int,
    tasks: Sequence[Sequence[int]],
    rng: np.random.Generator,
    noise: float = 0.0,
) -> Demonstrations:
    """Episodes of the stochastic shortest-path expert, each on a new layout with a task drawn uniformly.

    The expert moves uniformly among the first moves of all shortest paths to the colour it seeks that enter
    no other colour. With probability `noise` it plays a uniformly random move instead; it may then enter a
    wrong colour, which ends the episode (as the horizon does), and that move is its last. Where noise has led
    it into a pocket that only wrong colours border, no path is left and it moves at random.
    """
    if not 0 <= noise <= 1:
        raise ValueError(f"noise is {noise}; it is a probability, between 0 and 1.")
    table = task_table(tasks)
    if table.max() >= config.colors:
        raise ValueError(f"the tasks name colour {table.max()}; this grid has colours 0 to {config.colors - 1}.")
    layouts = sample_layouts(config, count, rng)
    task = rng.integers(0, len(tasks), count)
    record = np.zeros((3, config.horizon, count), np.int16)  # position, action, progress
    lengths = np.zeros(count, np.int64)
    for begin in range(0, count, _CHUNK):
        part = slice(begin, begin + _CHUNK)
        batch = GridBatch(config, layouts[part], table[task[part]])
        lengths[part] = _play_expert(batch, rng, noise, record[:, :, part])
    record = record[:, : lengths.max(initial=0)].transpose(0, 2, 1)
    last = np.minimum(np.arange(record.shape[2]), lengths[:, None] - 1)
    positions, actions, progress = np.take_along_axis(record, last[None], axis=2)
    return Demonstrations(
        layouts, tuple(map(tuple, tasks)), task, positions, actions.astype(np.int8), progress, lengths
    )


_CHUNK = 4096
"""Episodes played at once: few enough for the working set to stay in the cache."""


def _play_expert(
    batch: GridBatch, rng: np.random.Generator, noise: float, record: NDArray[np.int16]
) -> NDArray[np.int64]:
    """Play `batch` to its end; (N,) lengths. Fills `record` (3, horizon, N): position, action, progress."""
    boards = shortest_path_moves(batch.config, batch.layouts.contents)
    rows = np.arange(len(batch))
    lengths = np.zeros(len(batch), np.int64)
    for step in range(batch.config.horizon):
        optimal = optimal_moves(boards, batch.sought, batch.position)
        actions = _CHOICE[optimal, rng.integers(0, 12, len(batch), np.uint8)]
        if noise:
            stray = rng.random(len(batch)) < noise
            actions = np.where(stray, rng.integers(0, ACTIONS, len(batch), np.int8), actions)
        for values, taken in zip(record, (batch.position, actions, batch.progress), strict=True):
            values[step, rows] = taken
        lengths[rows] += batch.alive
        batch.step(actions)
        if batch.alive.mean() < 0.8:  # dropping finished rows costs a copy: do it now and then
            keep = np.flatnonzero(batch.alive)
            if not len(keep):
                break
            batch, rows, boards = batch.select(keep), rows[keep], boards[keep]
    return lengths
