"""Grid layouts: their sizes, how they are drawn, and shortest paths on thousands of them at once.

Cells are numbered row by row (cell = row · size + column). A set of cells is a *board*: one uint64 whose bit
i is cell i, so a shortest-path search over a batch is a handful of shifts per distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from internalrl.errors import OptionError

MOVES = ("up", "right", "down", "left")
ACTIONS = len(MOVES)


@dataclass(frozen=True)
class GridConfig:
    """Sizes of the grid world; the defaults are the paper's. OptionError where the objects cannot fit."""

    size: int = 7
    """Cells along each side, 2 to 8 (a board is 64 bits)."""
    colors: int = 8
    """Coloured cells, numbered from 0; each colour is on the grid once."""
    walls: int = 4
    """Wall cells; a move into one is a no-op."""
    horizon: int = 100
    """Steps after which an episode is truncated."""

    def __post_init__(self) -> None:
        if not 2 <= self.size <= 8:
            raise OptionError("size", f"is {self.size}; a grid has 2 to 8 cells a side (a board is 64 bits).")
        for name, least in (("colors", 1), ("walls", 0), ("horizon", 1)):
            if (value := getattr(self, name)) < least:
                raise OptionError(name, f"is {value}; a grid needs at least one colour, zero walls and one step.")
        if self.channels > self.cells:
            raise OptionError(
                "size",
                f"is {self.size}; {self.colors} colours, {self.walls} walls and the agent do not fit on {self.size} × "
                f"{self.size} = {self.cells} cells; use fewer objects or a larger size.",
            )

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.size * self.size

    @property
    def channels(self) -> int:
        """Channels of one observed cell: one per colour, one per wall, one for the agent."""
        return self.colors + self.walls + 1

    @property
    def empty(self) -> int:
        """The entry of `Layouts.contents` that stands for an empty cell."""
        return self.colors + self.walls

    @property
    def observation_size(self) -> int:
        """Length of a flat observation (637 for the paper's sizes)."""
        return self.cells * self.channels


@dataclass(frozen=True)
class Layouts:
    """A batch of N grids; index it with rows to get a smaller batch."""

    contents: NDArray[np.uint8]
    """(N, cells): 0..colors−1 a colour, colors..colors+walls−1 a wall, `config.empty` nothing."""
    start: NDArray[np.int16]
    """(N,): the cell where the agent starts, always an empty one."""

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows: NDArray[np.integer] | NDArray[np.bool_] | slice) -> Layouts:
        return Layouts(self.contents[rows], self.start[rows])


def _sources(config: GridConfig, boards: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], ...]:
    """For each of `MOVES`, the board of cells from which that move lands in `boards`."""
    one, size = np.uint64(1), np.uint64(config.size)
    full = np.uint64((1 << config.cells) - 1)
    first = np.uint64(sum(1 << (row * config.size) for row in range(config.size)))
    return (
        (boards << size) & full,
        (boards & ~first) >> one,
        boards >> size,
        (boards << one) & (full & ~first),
    )


def _board(mask: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """(N, cells) booleans → (N,) boards."""
    packed = np.zeros((len(mask), 8), np.uint8)
    bits = np.packbits(mask, axis=1, bitorder="little")
    packed[:, : bits.shape[1]] = bits
    return packed.view("<u8")[:, 0]


def _connected(config: GridConfig, layouts: Layouts) -> NDArray[np.bool_]:
    """(N,): whether every colour can be entered from the empty cells around the start.

    This is the whole condition: from a colour that touches that region one can step back into it, and reach
    any other.
    """
    free = _board(layouts.contents == config.empty)
    colors = _board(layouts.contents < config.colors)
    region = np.uint64(1) << layouts.start.astype(np.uint64)
    while True:
        up, right, down, left = _sources(config, region)
        edge = up | right | down | left
        grown = region | (edge & free)
        if np.array_equal(grown, region):
            return (colors & ~edge) == 0
        region = grown


def sample_layouts(config: GridConfig, count: int, rng: np.random.Generator) -> Layouts:
    """Random layouts, uniform among the solvable ones; ValueError if hardly any layout of this config is
    solvable.

    Solvable: every colour can be reached from the start and from every other colour without entering a third
    one.
    """
    objects = config.channels  # colours, walls and the agent
    kept: list[Layouts] = []
    accepted = tried = 0
    while not kept or accepted < count:
        size = min(max(count - accepted, 256), 16384)
        order = np.tile(np.arange(config.cells, dtype=np.uint8), (size, 1))
        rows = np.arange(size)
        for k in range(objects):  # the first steps of a Fisher-Yates shuffle
            other = rng.integers(k, config.cells, size)
            chosen = order[rows, other]
            order[rows, other] = order[:, k]
            order[:, k] = chosen
        contents = np.full((size, config.cells), config.empty, np.uint8)
        contents[rows[:, None], order[:, : objects - 1]] = np.arange(objects - 1, dtype=np.uint8)
        layouts = Layouts(contents, order[:, objects - 1].astype(np.int16))
        layouts = layouts[_connected(config, layouts)]
        kept.append(layouts)
        tried, accepted = tried + size, accepted + len(layouts)
        if tried >= 100_000 and accepted < tried / 10_000:
            raise ValueError(
                f"only {accepted} of {tried} random layouts let the agent reach all {config.colors} colours "
                f"({config.size} × {config.size} cells, {config.walls} walls); use fewer objects or a larger "
                "size."
            )
    contents = np.concatenate([layouts.contents for layouts in kept])[:count]
    return Layouts(contents, np.concatenate([layouts.start for layouts in kept])[:count])


def observe(config: GridConfig, contents: NDArray[np.uint8], positions: NDArray[np.integer]) -> NDArray[np.uint8]:
    """One-hot observations (N, observation_size) or (N, T, observation_size), laid out as (cells, channels).

    `contents` is (N, cells), `positions` (N,) or (N, T). The last channel of a cell is the agent; a cell has
    two ones where the agent stands on a colour.
    """
    grid = np.zeros((len(contents), config.cells * config.channels), np.uint8)
    objects = np.flatnonzero(contents < config.empty)
    grid.reshape(-1)[objects * config.channels + contents.reshape(-1)[objects]] = 1
    observation = np.repeat(grid, positions.shape[1], axis=0) if positions.ndim > 1 else grid
    agent = positions.reshape(-1).astype(np.int64) * config.channels + config.channels - 1
    observation[np.arange(len(observation)), agent] = 1
    return observation.reshape(*positions.shape, config.observation_size)


def shortest_path_moves(config: GridConfig, contents: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The moves of shortest paths: (N, cells) contents → (N, colors, 4) boards, one per goal colour and move.

    Bit i of [n, c, m] says that in layout n move m is the first of a shortest path from cell i to colour c
    that enters no other colour on the way. Cells without such a path have no bit set.
    """
    free = _board(contents == config.empty)[:, None]
    open_cells = free | _board(contents < config.colors)[:, None]
    goal = np.argsort(contents, axis=1, kind="stable")[:, : config.colors]
    frontier = np.uint64(1) << goal.astype(np.uint64)
    unseen = open_cells & ~frontier
    moves = np.zeros((ACTIONS, *frontier.shape), np.uint64)
    while frontier.any():
        sources = _sources(config, frontier)
        for move, source in zip(moves, sources, strict=True):
            move |= source & unseen
        reached = (sources[0] | sources[1] | sources[2] | sources[3]) & unseen
        unseen &= ~reached
        frontier = reached & free
    return np.ascontiguousarray(np.moveaxis(moves, 0, -1))
