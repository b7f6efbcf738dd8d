"""Played episodes as pictures: one that can be set in motion, and one small picture per segment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from internalrl.analysis.evaluate import Episodes
from internalrl.analysis.measure import segment_subgoal
from internalrl.analysis.report.figures import COLORS, NEITHER
from internalrl.domains.grid.play import entered_colors
from internalrl.domains.grid.render import PALETTE
from internalrl.domains.grid.world import GridConfig

CELL = 40
"""Units of a cell's side in all drawings."""
STRIP = 12
"""Most segments that get a small picture."""


@dataclass(frozen=True)
class Segment:
    """The moves of steps `begin` to `end` − 1, and the colours entered by them."""

    begin: int
    end: int
    colors: tuple[int, ...]

    @property
    def stroke(self) -> str:
        """The colour of the subgoal it reached."""
        goal = segment_subgoal(np.array(self.colors))
        return NEITHER if goal < 0 else COLORS[goal % len(COLORS)]


@dataclass(frozen=True)
class Story:
    """One episode to be drawn: what is in the cells, where the agent was (T + 1), and its segments."""

    contents: NDArray[np.uint8]
    path: tuple[int, ...]
    segments: tuple[Segment, ...]
    ending: str


def stories(grid: GridConfig, episodes: Episodes, successes: int = 2, failures: int = 1) -> list[Story]:
    """The first few successes and failures among `episodes`."""
    won = np.flatnonzero(episodes.success)[:successes]
    lost = np.flatnonzero(~episodes.success)[:failures]
    entered = entered_colors(grid, episodes.layouts.contents, episodes.positions)
    found = []
    for row in [*won, *lost]:
        length = int(episodes.rollout.length[row])
        opened = np.flatnonzero(episodes.rollout.switch[row, :length].numpy())
        colors = entered[row]
        segments = [
            Segment(int(a), int(b), tuple(int(c) for c in colors[a + 1 : b + 1] if c >= 0))
            for a, b in pairwise([*opened, length])
        ]
        if episodes.success[row]:
            ending = "solved"
        else:
            ending = "out of time" if episodes.truncated[row] else "failed: a wrong colour"
        path = tuple(int(cell) for cell in episodes.positions[row, : length + 1])
        found.append(Story(episodes.layouts.contents[row], path, tuple(segments), ending))
    return found


def player(grid: GridConfig, story: Story, number: int) -> str:
    """HTML of one episode; the page's script finds it by its class and sets it in motion.

    Without the script the whole path is seen, coloured by segment.
    """
    name, steps = f"grid-{number}", len(story.path) - 1
    data = {
        "points": [[round(x, 1) for x in _center(grid, cell)] for cell in story.path],
        "segments": [{"begin": s.begin, "end": s.end, "stroke": s.stroke, "colors": s.colors} for s in story.segments],
    }
    x, y = _center(grid, story.path[-1])
    strip = "".join(_small(grid, story, name, k) for k in range(min(len(story.segments), STRIP)))
    if len(story.segments) > STRIP:
        strip += f'<p class="more">and {len(story.segments) - STRIP} more segments</p>'
    side = grid.size * CELL
    return f"""<div class="episode" data-episode="{escape(json.dumps(data, separators=(",", ":")))}">
<div class="stage">
<h3>Episode {number} <span>{escape(story.ending)} after {steps} steps</span></h3>
<svg viewBox="0 0 {side} {side}" role="img" aria-label="Episode {number}, {escape(story.ending)}">
<defs>{_board(grid, story.contents, name)}</defs><use href="#{name}"/>
<g class="whole">{_whole(grid, story)}</g><polyline class="casing"/><polyline class="trail"/>
<use href="#{name}-numbers"/>
<circle class="agent" cx="{x:g}" cy="{y:g}" r="{CELL * 0.24:g}"/></svg>
<div class="controls"><button type="button" aria-label="play or pause">Play</button>
<input type="range" min="0" max="{steps}" value="{steps}" aria-label="step"></div>
<p class="status">&nbsp;</p>
</div>
<ol class="strip">{strip}</ol>
</div>"""


def _small(grid: GridConfig, story: Story, name: str, k: int) -> str:
    """One segment's own picture."""
    segment, side = story.segments[k], grid.size * CELL
    points = [_center(grid, cell) for cell in story.path[segment.begin : segment.end + 1]]
    reached = ", ".join(map(str, segment.colors)) or "no colour"
    (x, y), (u, v) = points[0], points[-1]
    return (
        f'<li><svg viewBox="0 0 {side} {side}" role="img" aria-label="Segment {k + 1}: {reached}">'
        f'<use href="#{name}"/>{_line(points, segment.stroke, 1.6)}'
        f'<circle cx="{x:g}" cy="{y:g}" r="6" class="start"/>'
        f'<circle cx="{u:g}" cy="{v:g}" r="8" class="agent"/><use href="#{name}-numbers"/></svg>'
        f"<span>segment {k + 1}: {reached}</span></li>"
    )


def _whole(grid: GridConfig, story: Story) -> str:
    """All segments at once, shifted against each other so that repeated ways stay visible."""
    drawn = []
    for k, segment in enumerate(story.segments):
        shift = ((k % 5) - 2) * CELL * 0.08
        cells = story.path[segment.begin : segment.end + 1]
        points = [(x + shift, y + shift) for x, y in (_center(grid, cell) for cell in cells)]
        drawn.append(_line(points, segment.stroke, 1.2))
        drawn.append(f'<circle cx="{points[0][0]:g}" cy="{points[0][1]:g}" r="5" class="start"/>')
    return "".join(drawn)


def _line(points: Sequence[tuple[float, float]], stroke: str, width: float) -> str:
    """A coloured line with a white casing, so that it is seen on any cell."""
    text = " ".join(f"{x:g},{y:g}" for x, y in points)
    return (
        f'<polyline points="{text}" fill="none" stroke="#fff" stroke-width="{width * 6:g}"/>'
        f'<polyline points="{text}" fill="none" stroke="{stroke}" stroke-width="{width * 3.4:g}"/>'
    )


def _center(grid: GridConfig, cell: int) -> tuple[float, float]:
    row, column = divmod(cell, grid.size)
    return (column + 0.5) * CELL, (row + 0.5) * CELL


def _board(grid: GridConfig, contents: NDArray[np.uint8], name: str) -> str:
    """The cells `name`, and their numbers to be laid over a path, for all pictures of one episode.

    Colours are pale, so that a path stands out. The size of the numbers is that of the text around.
    """
    cells, numbers = [], []
    for cell, content in enumerate(contents):
        row, column = divmod(cell, grid.size)
        x, y, side = column * CELL + 1.5, row * CELL + 1.5, CELL - 3
        fill = "#eff1f4"
        if content < grid.colors:
            tint = (round(255 - 0.55 * (255 - part)) for part in PALETTE[content % len(PALETTE)])
            fill = "#{:02x}{:02x}{:02x}".format(*tint)
            numbers.append(f'<text x="{x + 3:g}" y="{y + 2:g}" dy=".82em">{content}</text>')
        elif content < grid.empty:
            fill = "#484e58"
        cells.append(f'<rect x="{x:g}" y="{y:g}" width="{side}" height="{side}" rx="6" fill="{fill}"/>')
    return f'<g id="{name}">{"".join(cells)}</g><g id="{name}-numbers" class="numbers">{"".join(numbers)}</g>'
