"""Drawings as a page shows them: matplotlib's, with the page's own font, and colours that many eyes tell apart.

Text stays text. Colours are Okabe and Ito's, which stay apart under the common colour-vision deficiencies, and every
kind of line or dot also differs in shape.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, PALE = "#1f2430", "#667085", "#e7e9ee"
COLORS = ("#0072B2", "#D98A00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#A89B00", "#6A4C93", "#3F3F3F")
"""Of the subgoals in order, and of the lines of a plot; they repeat."""
NEITHER = "#a7adb9"
"""What reached no subgoal."""
MARKERS, GLYPHS = "os^DvP*h<", "●■▲◆▼✚★⬢◀"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (2, 2)), (0, (1, 3)))
STROKES = "━╍┅⋯"
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


def draw(paint: Callable[[Axes], None], width: float = 3.5, height: float = 2.3) -> Markup:
    """What `paint` puts on axes of so many inches, as an SVG element."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return Markup(_inline(file.getvalue()))


def _inline(svg: str) -> str:
    """An SVG file as an element of a page: no prologue or namespaces, ids of its own, as wide as its place."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', '<svg role="img"', svg, count=1)
    own = f"f{zlib.crc32(svg.encode()):08x}-"
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}", svg.replace("xlink:href", "href"))
