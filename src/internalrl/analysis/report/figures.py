"""The report's plots: functions of plain numbers that return HTML, an SVG under its title and key.

Text stays text, in the page's own font. Colours are Okabe and Ito's, which stay apart under the common
colour-vision deficiencies, and every kind of line or dot also differs in shape.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

INK, MUTED, PALE = "#1f2430", "#667085", "#e7e9ee"
COLORS = ("#0072B2", "#D98A00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#A89B00", "#6A4C93", "#3F3F3F")
"""Of the subgoals in order, and of the lines of a plot; they repeat."""
NEITHER = "#a7adb9"
"""What reached no subgoal."""
_MARKERS, _GLYPHS = "os^DvP*h<", "●■▲◆▼✚★⬢◀"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (2, 2)), (0, (1, 3)))
_STROKES = "━╍┅⋯"
"""Lines that lie on each other all show."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "internalrl",
    "font.family": "DejaVu Sans",  # to measure with; the page shows its own
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": PALE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}

Range = tuple[float | None, float | None]
"""Bounds of an axis; None fits the data."""
Key = tuple[str, str, str]
"""An entry of a key: glyph, its colour, what it stands for."""
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
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    levels: Sequence[Level] = (),
    *,
    percent: bool = False,
    y_range: Range = (None, None),
    events: Sequence[tuple[float, str]] = (),
    wide: bool = False,
) -> str:
    """Curves over training; `events` mark steps with a dotted line and a word."""
    key: list[Key] = []

    def paint(ax: Axes) -> None:
        for k, line in enumerate(lines):
            color, glyph = COLORS[k % len(COLORS)], _STROKES[k % len(_STROKES)]
            if line.dots:
                glyph = _GLYPHS[k % len(_GLYPHS)]
                ax.plot(line.x, line.y, color=color, marker=_MARKERS[k % len(_MARKERS)], ms=4.5, lw=1.1)
            else:
                smooth = running_mean(line.y)
                if smooth is not line.y:
                    ax.plot(line.x, line.y, color=color, lw=0.7, alpha=0.3)
                ax.plot(line.x, smooth, color=color, ls=_DASHES[k % len(_DASHES)])
            key.append((glyph, color, line.label))
        for x, word in events:
            ax.axvline(x, color=MUTED, lw=1, ls=":")
            ax.text(x, 1.02, word, transform=ax.get_xaxis_transform(), ha="center", color=MUTED, size=8)
        _levels(ax, levels, y_range)
        ax.set_xlabel(x_label)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if max(max(line.x) for line in lines) >= 10_000:
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x else "0"))
        if percent:
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    drawn = _draw(paint, width=5.2 if wide else 3.5, height=2.7 if wide else 2.3)
    return _titled(y_label, key if len(lines) > 1 else [], drawn)


def rate_distortion(
    kl: Sequence[float],
    nll: Sequence[float],
    final: tuple[float, float],
    levels: Sequence[Level],
    episode: str = "episode",
    action: str = "action",
) -> str:
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
    title = f"distortion: NLL in nats per {action}"
    return _titled(title, [*key, ("◆", COLORS[0], "finished")], _draw(paint, height=2.9))


def raster(
    subgoal: NDArray[np.integer],
    switch: NDArray[np.bool_],
    length: NDArray[np.integer],
    *,
    title: str,
    x_label: str,
    name: Name,
) -> str:
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
    key = [("■", COLORS[k % len(COLORS)] + "80", name(k)) for k in kinds]
    drawn = _draw(paint, width=5.2, height=0.6 + 0.13 * len(length))
    return _titled(title, [*key, ("┃", INK, "switch")], drawn)


def code_plane(
    points: NDArray[np.floating], reached: NDArray[np.integer], *, title: str, name: Name, limit: float = 3.6
) -> str:
    """Codes (M, 2) as dots, coloured by the subgoal `reached` (M,), −1 for none."""
    key: list[Key] = []

    def paint(ax: Axes) -> None:
        for kind in map(int, np.unique(reached)):
            shown = points[reached == kind].T
            if kind < 0:
                ax.plot(*shown, "x", color=NEITHER, ms=3.5, mew=1, zorder=1.5)
                key.append(("✕", NEITHER, "none"))
                continue
            color, shape = COLORS[kind % len(COLORS)], kind % len(_MARKERS)
            ax.plot(*shown, _MARKERS[shape], color=color, ms=4.2, mec="white", mew=0.4)
            key.append((_GLYPHS[shape], color, name(kind)))
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[0], yticks=[0])
        ax.tick_params(length=0, labelbottom=False, labelleft=False)
        ax.spines[:].set_visible(False)

    return _titled(title, key, _draw(paint, width=3.3, height=3.2))


def matrix(
    rates: NDArray[np.floating],
    framed: NDArray[np.bool_] | None = None,
    *,
    title: str,
    x_label: str,
    name: Name,
    frame: str = "",
) -> str:
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
    return _titled(title, [("□", COLORS[5], frame)] if frame else [], _draw(paint, *size))


def probe_bars(accuracy: Mapping[int, float], chance: float, bayes: float, tap: int | None) -> str:
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
    return _titled("accuracy of a linear probe", key, _draw(paint))


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


def key_of(entries: Sequence[Key]) -> str:
    """What glyphs and colours stand for, as HTML; empty without entries."""
    items = (f'<li><b style="color:{color}">{glyph}</b> {escape(text)}</li>' for glyph, color, text in entries)
    return f'<ul class="key">{"".join(items)}</ul>' if entries else ""


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


def _titled(title: str, key: Sequence[Key], svg: str) -> str:
    """What the vertical axis shows stands above it, where it can be read without turning the head."""
    return f'<p class="axis">{escape(title)}</p>{key_of(key)}{svg}'


def _draw(paint: Callable[[Axes], None], width: float = 3.5, height: float = 2.3) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return _inline(file.getvalue())


def _inline(svg: str) -> str:
    """An SVG file as an element of a page: no prologue or namespaces, ids of its own, as wide as its place."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', '<svg role="img"', svg, count=1)
    own = f"f{zlib.crc32(svg.encode()):08x}-"
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}", svg.replace("xlink:href", "href"))
