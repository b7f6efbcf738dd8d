"""Pictures of the grid world, as text or as pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from internalrl.domains.grid.layouts import GridConfig

PALETTE: tuple[tuple[int, int, int], ...] = (
    (0, 119, 187), (238, 119, 51), (0, 153, 136), (238, 51, 119),
    (51, 187, 238), (204, 187, 68), (170, 68, 153), (153, 221, 153),
)  # fmt: skip
"""Colours of the cells (RGB), chosen to stay apart under the common colour-vision deficiencies; they repeat
after eight, and every cell bears its number."""

_BACKGROUND, _EMPTY, _WALL, _AGENT = (255, 255, 255), (238, 240, 243), (72, 78, 88), (24, 26, 32)
_DIGITS = (
    "111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
    "111100111001111", "111100111101111", "111001001001001", "111101111101111", "111101111001111",
)  # fmt: skip
"""The digits 0 to 9 as 5 rows of 3 pixels."""


def render_text(config: GridConfig, contents: NDArray[np.uint8], position: int) -> str:
    """One line per row: a colour's number, # a wall, . nothing, @ the agent."""
    width = len(str(config.colors - 1))
    symbols = [*map(str, range(config.colors)), *"#" * config.walls, "."]
    cells = ["@" if cell == position else symbols[content] for cell, content in enumerate(contents)]
    rows = np.reshape(cells, (config.size, config.size))
    return "\n".join(" ".join(f"{symbol:>{width}}" for symbol in row) for row in rows)


def render_frame(config: GridConfig, contents: NDArray[np.uint8], position: int, scale: int = 32) -> NDArray[np.uint8]:
    """A picture (size · scale, size · scale, 3): (cells,) contents, the agent's cell, `scale` pixels per
    cell.

    Coloured cells bear their number, walls are dark, the agent is a dark disc with a white rim, through whose
    corners the colour below can be seen.
    """
    frame = np.empty((config.size, scale, config.size, scale, 3), np.uint8)
    for cell, content in enumerate(contents):
        picture = np.full((scale, scale, 3), _BACKGROUND, float)
        is_color, is_wall = content < config.colors, config.colors <= content < config.empty
        fill = PALETTE[content % len(PALETTE)] if is_color else _WALL if is_wall else _EMPTY
        _paint(picture, _square(scale), fill)
        if cell == position:
            _paint(picture, _disc(scale, 0.64), _BACKGROUND)
            _paint(picture, _disc(scale, 0.54), _AGENT)
        elif is_color:
            _paint(picture, _number(scale, int(content)), _AGENT if np.mean(fill) > 140 else _BACKGROUND)
        row, column = divmod(cell, config.size)
        frame[row, :, column] = picture.round()
    return frame.reshape(config.size * scale, config.size * scale, 3)


def _paint(picture: NDArray[np.float64], alpha: NDArray[np.float64], color: tuple[int, int, int]) -> None:
    """Lay `color` over `picture` (scale, scale, 3), in place, with opacity `alpha` (scale, scale)."""
    picture += alpha[..., None] * (np.array(color) - picture)


def _axes(scale: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pixel centres of one cell in [−1, 1], broadcastable to (scale, scale)."""
    line = (np.arange(scale) + 0.5) * 2 / scale - 1
    return line[:, None], line[None, :]


def _smooth(distance: NDArray[np.float64], scale: int) -> NDArray[np.float64]:
    """Opacity of a shape from the signed distance to its edge (negative inside), one pixel soft."""
    return np.clip(0.5 - distance * scale / 2, 0, 1)


def _square(scale: int, half: float = 0.92, corner: float = 0.22) -> NDArray[np.float64]:
    y, x = _axes(scale)
    dy, dx = np.abs(y) - (half - corner), np.abs(x) - (half - corner)
    return _smooth(np.hypot(np.maximum(dy, 0), np.maximum(dx, 0)) - corner, scale)


def _disc(scale: int, radius: float) -> NDArray[np.float64]:
    y, x = _axes(scale)
    return _smooth(np.hypot(y, x) - radius, scale)


def _number(scale: int, number: int) -> NDArray[np.float64]:
    """The decimal digits of `number`, centred in the cell."""
    glyphs = [np.array(list(_DIGITS[int(digit)]), float).reshape(5, 3) for digit in str(number)]
    text = np.concatenate([np.pad(glyph, ((0, 0), (0, 1))) for glyph in glyphs], axis=1)[:, :-1]
    text = np.kron(text, np.ones((max(scale // 12, 1),) * 2))
    alpha = np.zeros((scale, scale))
    height, width = min(text.shape[0], scale), min(text.shape[1], scale)
    top, left = (scale - height) // 2, (scale - width) // 2
    alpha[top : top + height, left : left + width] = text[:height, :width]
    return alpha
