"""The report's plots: functions of plain numbers that return a figure with its title, key and caption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from internalrl.analysis.report.drawing import COLORS, DASHES, GLYPHS, INK, MARKERS, MUTED, NEITHER, STROKES, draw
from internalrl.analysis.report.page import Entry, Figure

Range = tuple[float | None, float | None]
"""Bounds of an axis; None fits the data."""
Name = Callable[[int], str]
"""What the subgoal of a number is called."""


@dataclass(frozen=True)
class Line:
    """One curve: a smoothed line over a pale one of the raw values, or `dots` for values measured now and then."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal reference line."""

    label: str
    y: float


def curves(
    lines: Sequence[Line | None],
    title: str,
    caption: str,
    levels: Sequence[Level] = (),
    *,
    x_label: str = "step",
    percent: bool = False,
    y_range: Range = (0, None),
    events: Sequence[tuple[float, str]] = (),
    wide: bool = False,
) -> Figure | None:
    """Those `lines` that were logged, None without any; `events` mark steps with a dotted line and a word."""
    logged, key = [line for line in lines if line], list[Entry]()
    if not logged:
        return None

    def paint(ax: Axes) -> None:
        for k, line in enumerate(logged):
            color, glyph = COLORS[k % len(COLORS)], STROKES[k % len(STROKES)]
            if line.dots:
                glyph = GLYPHS[k % len(GLYPHS)]
                ax.plot(line.x, line.y, color=color, marker=MARKERS[k % len(MARKERS)], ms=4.5, lw=1.1)
            else:
                smooth = running_mean(line.y)
                if smooth is not line.y:
                    ax.plot(line.x, line.y, color=color, lw=0.7, alpha=0.3)
                ax.plot(line.x, smooth, color=color, ls=DASHES[k % len(DASHES)])
            key.append((glyph, color, line.label))
        for x, word in events:
            ax.axvline(x, color=MUTED, lw=1, ls=":")
            ax.text(x, 1.02, word, transform=ax.get_xaxis_transform(), ha="center", color=MUTED, size=8)
        _levels(ax, levels, y_range)
        ax.set_xlabel(x_label)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if max(max(line.x) for line in logged) >= 10_000:
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x else "0"))
        if percent:
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    drawn = draw(paint, width=5.2 if wide else 3.5, height=2.7 if wide else 2.3)
    return Figure(title, key if len(logged) > 1 else (), drawn, caption, wide)


def rate_distortion(
    kl: Sequence[float],
    nll: Sequence[float],
    final: tuple[float, float],
    levels: Sequence[Level],
    caption: str,
    *,
    episode: str,
    action: str,
) -> Figure:
    """The path of discovery through (KL per `episode`, NLL per `action`), and where the finished model stands."""
    path, start = COLORS[4], len(kl) > 0

    def paint(ax: Axes) -> None:
        x, y = running_mean(kl), running_mean(nll)
        if start:
            ax.plot(x, y, color=path, lw=1.3)
            ax.plot(x[0], y[0], "o", color=path, ms=5, mfc="white")
        ax.plot(*final, "D", color=COLORS[0], ms=7)
        ax.set_xlim(0, max([*x, final[0]]) * 1.05 + 0.1)
        ax.margins(y=0.1)
        _levels(ax, levels)
        ax.set_xlabel(f"rate: KL in nats per {episode}")

    key = [("○", path, "start"), ("━", path, "during training")] if start else []
    key.append(("◆", COLORS[0], "finished"))
    return Figure(f"distortion: NLL in nats per {action}", key, draw(paint, height=2.9), caption)


def raster(
    subgoal: NDArray[np.integer],
    switch: NDArray[np.bool_],
    length: NDArray[np.integer],
    title: str,
    x_label: str,
    name: Name,
    caption: str,
) -> Figure:
    """One row per demonstration: bars of the true subgoals, ticks at the metacontroller's switches."""

    def paint(ax: Axes) -> None:
        for row, (goals, switches, steps) in enumerate(zip(subgoal, switch, length, strict=True)):
            changes = np.flatnonzero(np.diff(goals[:steps])) + 1
            for begin, end in pairwise([0, *changes, int(steps)]):
                color = COLORS[goals[begin] % len(COLORS)]
                ax.barh(row, end - begin, left=begin, height=0.78, color=color, alpha=0.5, lw=0)
            ax.vlines(np.flatnonzero(switches[:steps]), row - 0.5, row + 0.5, color=INK, lw=1.6)
        ax.set_ylim(len(length) - 0.3, -0.7)
        ax.set_xlim(-0.6, None)
        ax.set_yticks([])
        ax.grid(visible=False)
        ax.spines["left"].set_visible(False)
        ax.set_xlabel(x_label)

    kinds = [k for k in map(int, np.unique(subgoal)) if k >= 0]  # negative beyond the end
    key = [*(("■", COLORS[k % len(COLORS)] + "80", name(k)) for k in kinds), ("┃", INK, "switch")]
    return Figure(title, key, draw(paint, width=5.2, height=0.6 + 0.13 * len(length)), caption, wide=True)


def code_plane(
    points: NDArray[np.floating],
    reached: NDArray[np.integer],
    title: str,
    name: Name,
    caption: str,
    limit: float = 3.6,
) -> Figure:
    """Codes (M, 2) as dots, coloured by the subgoal `reached` (M,), −1 for none."""
    key: list[Entry] = []

    def paint(ax: Axes) -> None:
        for kind in map(int, np.unique(reached)):
            shown = points[reached == kind].T
            if kind < 0:
                ax.plot(*shown, "x", color=NEITHER, ms=3.5, mew=1, zorder=1.5)
                key.append(("✕", NEITHER, "none"))
                continue
            color, shape = COLORS[kind % len(COLORS)], kind % len(MARKERS)
            ax.plot(*shown, MARKERS[shape], color=color, ms=4.2, mec="white", mew=0.4)
            key.append((GLYPHS[shape], color, name(kind)))
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[0], yticks=[0])
        ax.tick_params(length=0, labelbottom=False, labelleft=False)
        ax.spines[:].set_visible(False)

    return Figure(title, key, draw(paint, width=3.3, height=3.2), caption)


def matrix(
    rates: NDArray[np.floating],
    title: str,
    x_label: str,
    name: Name,
    caption: str,
    *,
    framed: NDArray[np.bool_] | None = None,
    frame: str = "",
) -> Figure:
    """(S, S) rates of subgoal b, given subgoal a, and what they lack of 1; those that are `framed`, which stands for
    `frame`, have a frame."""
    many = len(rates) > 4

    def paint(ax: Axes) -> None:
        count = len(rates)
        table = np.concatenate([rates, 1 - rates.sum(1, keepdims=True)], 1)
        edges = np.arange(count + 2) - 0.5
        ax.pcolormesh(edges, edges[:-1], table, cmap="Blues", vmin=0, vmax=max(0.6, table.max()), ec="white", lw=2)
        ax.axvline(count - 0.5, color="white", lw=6)
        ax.set(aspect="equal", ylim=(count - 0.5, -0.5))
        for a, row in enumerate(table):
            for b, rate in enumerate(row):
                shade = "white" if rate > 0.4 else INK
                ax.text(b, a, f"{rate:.2f}", ha="center", va="center", color=shade, size=7 if many else 9)
        for a, b in np.argwhere(framed) if framed is not None else ():
            ax.add_patch(Rectangle((b - 0.46, a - 0.46), 0.92, 0.92, fill=False, ec=COLORS[5], lw=2, zorder=5))
        ax.set_xticks(range(count + 1), [*map(name, range(count)), "other"], rotation=40 if many else 0)
        ax.set_yticks(range(count), list(map(name, range(count))))
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.set_xlabel(x_label)

    size = (5.2, 4.4) if many else (3.5, 3.1)
    return Figure(title, [("□", COLORS[5], frame)] if frame else (), draw(paint, *size), caption, wide=many)


def probe_bars(accuracy: Mapping[int, float], chance: float, bayes: float, tap: int | None, caption: str) -> Figure:
    """Probe accuracy by layer; the bar at the tap is the dark one."""

    def paint(ax: Axes) -> None:
        for place, (layer, value) in enumerate(accuracy.items()):
            ax.bar(place, value, width=0.7, color=COLORS[0] if layer == tap else "#a9cfe6")
            ink = "white" if layer == tap else INK
            ax.text(place, value - 0.02, f"{value:.2f}", ha="center", va="top", color=ink)
        ax.set_xticks(range(len(accuracy)), [f"{layer}" for layer in accuracy])
        ax.grid(visible=False, axis="x")
        ax.set_xlim(-0.5, len(accuracy) + 0.4)
        _levels(ax, [Level("Bayes", bayes), Level("chance", chance)], (0, 1))
        ax.set_xlabel("blocks below (0: the embedding)")

    key = [("■", COLORS[0], "where the metacontroller acts")] if tap in accuracy else []
    return Figure("accuracy of a linear probe", key, draw(paint), caption)


def running_mean(y: Sequence[float]) -> Sequence[float]:
    """Centred mean over a fortieth of the curve; `y` itself when it is short."""
    reach = len(y) // 80
    if not reach:
        return y
    padded = np.pad(np.asarray(y, float), reach, mode="edge")
    return np.convolve(padded, np.full(2 * reach + 1, 1 / (2 * reach + 1)), "valid").tolist()


def pair(subgoal: int) -> str:
    """A subgoal's name: its two colours."""
    return f"{2 * subgoal}-{2 * subgoal + 1}"


def _levels(ax: Axes, levels: Sequence[Level], y_range: Range = (None, None)) -> None:
    """Reference lines with their names above them; under the lowest of several, which may lie close."""
    for level in levels:
        ax.axhline(level.y, color=INK, lw=0.9, ls=(0, (4, 3)))
    bottom, top = ax.set_ylim(*y_range)
    lowest = min((level.y for level in levels), default=0.0)
    for level in levels:
        under = len(levels) > 1 and level.y == lowest and level.y > bottom + 0.1 * (top - bottom)
        name = ax.annotate(
            level.label,
            (1, level.y),
            (0, -2 if under else 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="top" if under else "bottom",
            color=INK,
            size=8,
        )
        name.set_in_layout(False)
