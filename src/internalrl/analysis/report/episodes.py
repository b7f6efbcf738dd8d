"""Played episodes as pictures: one that can be set in motion, and one small picture per segment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from internalrl.analysis.evaluate import Episodes
from internalrl.analysis.measure import segment_subgoal
from internalrl.analysis.report.drawing import COLORS, NEITHER
from internalrl.analysis.report.page import Part
from internalrl.domains.grid.play import entered_colors
from internalrl.domains.grid.render import PALETTE
from internalrl.domains.grid.world import GridConfig


@dataclass(frozen=True)
class Segment:
    """The steps `begin` to `end` − 1, the cells' centres on the way, and the colours entered."""

    begin: int
    end: int
    points: Sequence[tuple[int, int]]
    colors: tuple[int, ...]

    @property
    def stroke(self) -> str:
        """The colour of the subgoal it reached."""
        goal = segment_subgoal(np.array(self.colors))
        return NEITHER if goal < 0 else COLORS[goal % len(COLORS)]


@dataclass(frozen=True)
class Player(Part):
    """One episode on a square of `size` cells, each with a fill and, if it is coloured, a number; `points` are the
    centres of those where the agent was (T + 1). The first `small` segments get a small picture."""

    number: int
    ending: str
    size: int
    cells: Sequence[tuple[str, int | None]]
    points: Sequence[tuple[int, int]]
    segments: Sequence[Segment]
    small: int = 12
    unit: ClassVar[int] = 40
    """Length of a cell's side in all drawings."""

    @property
    def data(self) -> str:
        """What the page's script needs, as JSON."""
        segments = [{"begin": s.begin, "end": s.end, "stroke": s.stroke} for s in self.segments]
        return json.dumps({"points": self.points, "segments": segments}, separators=(",", ":"))


def players(grid: GridConfig, episodes: Episodes, successes: int = 2, failures: int = 1) -> list[Player]:
    """The first few successes and failures among `episodes`."""
    won = np.flatnonzero(episodes.success)[:successes]
    lost = np.flatnonzero(~episodes.success)[:failures]
    entered = entered_colors(grid, episodes.layouts.contents, episodes.positions)
    found, unit = [], Player.unit
    for number, row in enumerate([*won, *lost], start=1):
        length = int(episodes.rollout.length[row])
        opened = np.flatnonzero(episodes.rollout.switch[row, :length].numpy())
        cells = map(int, episodes.positions[row, : length + 1])
        points = [(cell % grid.size * unit + unit // 2, cell // grid.size * unit + unit // 2) for cell in cells]
        segments = [
            Segment(int(a), int(b), points[a : b + 1], tuple(int(c) for c in entered[row, a + 1 : b + 1] if c >= 0))
            for a, b in pairwise([*opened, length])
        ]
        if episodes.success[row]:
            ending = "solved"
        else:
            ending = "out of time" if episodes.truncated[row] else "failed: a wrong colour"
        board = [_cell(grid, int(content)) for content in episodes.layouts.contents[row]]
        found.append(Player(number, ending, grid.size, board, points, segments))
    return found


def _cell(grid: GridConfig, content: int) -> tuple[str, int | None]:
    """Colours are pale, so that a path stands out."""
    if content >= grid.colors:
        return "#484e58" if content < grid.empty else "#eff1f4", None
    tint = (round(255 - 0.55 * (255 - part)) for part in PALETTE[content % len(PALETTE)])
    return "#{:02x}{:02x}{:02x}".format(*tint), content
