"""The report's plots, each a function of plain numbers that returns an SVG to be put into a page.

Text stays text, in the page's own font; colours are Okabe and Ito's, which stay apart under the common
colour-vision deficiencies.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

INK, MUTED, PALE = "#1f2430", "#667085", "#e7e9ee"
BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#D98A00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
"""Of the subgoals in order, and of the lines of a plot; they repeat."""
NEITHER = "#b3b8c2"
"""What reached no subgoal."""
MARKERS = "os^DvP"

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "internalrl",
    "font.family": "DejaVu Sans",  # to measure with; the page shows its own
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.4,
}


@dataclass(frozen=True)
class Line:
    """One curve; `dots` for values measured now and then, else a line, smoothed over a pale one of the raw values."""

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
    y_range: tuple[float | None, float | None] = (None, None),
    event: tuple[float, str] | None = None,
    legend: bool = True,
) -> str:
    """Curves over training; `event` marks a step with a dotted line and a word."""

    def paint(ax: Axes) -> None:
        for line, color, marker in zip(lines, COLORS, MARKERS, strict=False):
            if line.dots:
                ax.plot(line.x, line.y, color=color, marker=marker, ms=4.5, lw=1.2, label=line.label)
                continue
            smooth = running_mean(line.y)
            if smooth is not line.y:
                ax.plot(line.x, line.y, color=color, lw=0.8, alpha=0.3)
            ax.plot(line.x, smooth, color=color, label=line.label)
        if event:
            ax.axvline(event[0], color=MUTED, lw=1, ls=":")
            ax.text(event[0], 1, f" {event[1]}", transform=ax.get_xaxis_transform(), va="top", color=MUTED, size=8.5)
        ax.set_ylim(*y_range)
        for level in levels:
            _level(ax, level)
        ax.set_xlabel(x_label)
        if percent:
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if max((max(line.x, default=0) for line in lines), default=0) >= 10_000:
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value else "0"))
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _title(ax, y_label, legend)

    return _draw(paint)


def rate_distortion(
    kl: Sequence[float], nll: Sequence[float], final: tuple[float, float], levels: Sequence[Level]
) -> str:
    """The path of discovery through (KL per episode, NLL per action), and where the finished model stands."""

    def paint(ax: Axes) -> None:
        x, y = running_mean(kl), running_mean(nll)
        if len(x):
            ax.plot(x, y, color=SKY, lw=1.4, label="during training")
            ax.plot(x[0], y[0], "o", color=SKY, ms=5, mfc="white", label="start")
        ax.plot(*final, "D", color=BLUE, ms=7, label="finished")
        ax.set_xlim(0, max([*x, final[0]]) * 1.05 + 0.1)
        for level in levels:
            _level(ax, level)
        ax.set_xlabel("rate: KL in nats per episode")
        _title(ax, "distortion: NLL in nats per action")

    return _draw(paint, height=3.0)


def raster(subgoal: NDArray[np.integer], switch: NDArray[np.bool_], length: NDArray[np.integer]) -> str:
    """One row per demonstration: bars of the true subgoals, ticks at the metacontroller's switches."""

    def paint(ax: Axes) -> None:
        count = len(length)
        for row, (goals, switches, steps) in enumerate(zip(subgoal, switch, length, strict=True)):
            begins = [0, *(np.flatnonzero(np.diff(goals[:steps])) + 1), int(steps)]
            for begin, end in zip(begins[:-1], begins[1:], strict=True):
                color = COLORS[goals[begin] % len(COLORS)]
                ax.barh(row, end - begin, left=begin, height=0.78, color=color, alpha=0.55, lw=0)
            times = np.flatnonzero(switches[:steps])
            ax.vlines(times, row - 0.52, row + 0.52, color=INK, lw=1.7)
        for goal in np.unique(subgoal):
            ax.barh(0, 0, color=COLORS[goal % len(COLORS)], alpha=0.55, label=f"{2 * goal}-{2 * goal + 1}")
        ax.plot([], [], "|", color=INK, ms=10, mew=1.7, label="switch")
        ax.set_ylim(count - 0.3, -0.7)
        ax.set_xlim(-0.6, None)
        ax.set_yticks([])
        ax.grid(visible=False)
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("step of the episode")
        _title(ax, "true subgoal (colours)")

    return _draw(paint, width=5.2, height=1.0 + 0.17 * len(length))


def code_plane(points: NDArray[np.floating], reached: NDArray[np.integer], limit: float = 3.6) -> str:
    """Codes (M, 2) as dots, coloured by the subgoal `reached` (M,), −1 for none."""

    def paint(ax: Axes) -> None:
        for kind in np.unique(reached):
            rows = reached == kind
            color, marker = (NEITHER, "x") if kind < 0 else (COLORS[kind % 6], MARKERS[kind % 6])
            label = "none" if kind < 0 else f"{2 * kind}-{2 * kind + 1}"
            edge = {} if kind < 0 else {"edgecolors": "white", "linewidths": 0.4}
            ax.scatter(*points[rows].T, s=16, c=color, marker=marker, label=label, zorder=1 + (kind >= 0), **edge)
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticklabels=[], yticklabels=[])
        ax.tick_params(length=0)
        _title(ax, "subgoal reached")

    return _draw(paint, width=3.7, height=4.0)


def transitions(rates: NDArray[np.floating]) -> str:
    """(S, S) rates at which subgoal b follows subgoal a; transitions the corpus lacks are framed."""

    def paint(ax: Axes) -> None:
        count = len(rates)
        table = np.concatenate([rates, 1 - rates.sum(1, keepdims=True)], 1)
        ax.imshow(table, cmap="Blues", vmin=0, vmax=max(0.5, float(rates.max())))
        for a, row in enumerate(table):
            for b, rate in enumerate(row):
                ax.text(b, a, f"{rate:.2f}", ha="center", va="center", color="white" if rate > 0.33 else INK)
            ax.add_patch(
                matplotlib.patches.Rectangle(((a + 1) % count - 0.46, a - 0.46), 0.92, 0.92, fill=False, ec=RED, lw=2.2)
            )
        names = [f"{2 * k}-{2 * k + 1}" for k in range(count)]
        ax.set_xticks(range(count + 1), [*names, "other"])
        ax.set_yticks(range(count), names)
        ax.axvline(count - 0.5, color="white", lw=4)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.set_xlabel("next subgoal")
        _title(ax, "subgoal just completed", legend=False)

    return _draw(paint, width=4.2, height=3.5)


def probe_bars(accuracy: Mapping[int, float], bayes: float, chance: float, tap: int | None) -> str:
    """Probe accuracy by layer; the bar at the tap is the dark one."""

    def paint(ax: Axes) -> None:
        for place, (layer, value) in enumerate(accuracy.items()):
            ax.bar(place, value, width=0.66, color=BLUE if layer == tap else SKY)
            ax.text(place, value + 0.015, f"{value:.2f}", ha="center")
        names = [str(layer) + ("\nembedding" if layer == 0 else "\ntap" if layer == tap else "") for layer in accuracy]
        ax.set_xticks(range(len(names)), names)
        ax.grid(visible=False, axis="x")
        ax.set_ylim(0, 1)
        ax.set_xlim(-0.6, len(names) - 0.4)
        _level(ax, Level("best possible (Bayes)", bayes))
        _level(ax, Level("most frequent subgoal", chance))
        ax.set_xlabel("blocks below")
        _title(ax, "accuracy", legend=False)

    return _draw(paint)


def running_mean(y: Sequence[float]) -> ArrayLike:
    """Centred mean over a fortieth of the curve; `y` itself when it is short."""
    reach = len(y) // 80
    if not reach:
        return y
    padded = np.pad(np.asarray(y, float), reach, mode="reflect")
    return np.convolve(padded, np.full(2 * reach + 1, 1 / (2 * reach + 1)), "valid")


def _level(ax: Axes, level: Level) -> None:
    ax.axhline(level.y, color=INK, lw=1, ls=(0, (4, 3)))
    ax.annotate(
        level.label, (1, level.y), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="right", va="bottom", color=INK, size=8.5, bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.8},
    )  # fmt: skip


def _title(ax: Axes, text: str, legend: bool = True) -> None:
    """What the vertical axis shows, above it, where it can be read without turning the head; then the legend."""
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=6, borderaxespad=0, borderpad=0.2)
        ax.set_title(text, loc="left", size=9.5, color=MUTED, pad=24)
    else:
        ax.set_title(text, loc="left", size=9.5, color=MUTED, pad=8)


def _draw(paint: Callable[[Axes], None], width: float = 4.4, height: float = 2.9) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return _inline(file.getvalue())


def _inline(svg: str) -> str:
    """An SVG file as an element of a page: no prologue or namespaces, its ids its own, as wide as its place."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| xmlns(:xlink)?=\"[^\"]*\"", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg width="([\d.]+)pt" height="[\d.]+pt"', r'<svg style="max-width:\1pt"', svg, count=1)
    own = f"f{zlib.crc32(svg.encode()):08x}-"
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}", svg.replace("xlink:href", "href"))
