"""Bits of HTML that the report is put together from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from internalrl.analysis.report import figures
from internalrl.analysis.report.figures import Level, Line

Headline = tuple[str, str, str, Callable[[Any], str]]
"""Name in the summary, what to call it, what it means (the time is told by stage), how to write it."""


def headline(items: Iterable[Headline], values: Mapping[str, Any], seconds: Any) -> str:
    """The figures of a summary, as far as they are there; `values` by name, and the seconds of each stage."""
    stages = seconds.items() if isinstance(seconds, Mapping) else ()
    spent = ", ".join(f"{stage} {duration(value)}" for stage, value in stages if stage != "total")
    shown = []
    for name, label, text, form in items:
        value = values.get(name)
        written = "not measured" if value is None else form(value)
        missing = ' class="missing"' if value is None else ""
        text = text or spent or "for all stages"
        shown.append(f'<div{missing}><dd class="value">{written}</dd><dt>{label}</dt><dd>{escape(text)}</dd></div>')
    return f'<dl class="headline">{"".join(shown)}</dl>'


def percent(value: float) -> str:
    return f"{100 * value:.{1 if 0 < value < 0.1 else 0}f} %"


def decimals(count: int) -> Callable[[float], str]:
    """Numbers with `count` of them."""
    return f"{{:.{count}f}}".format


def curves(
    lines: Sequence[Line | None],
    x_label: str,
    y_label: str,
    caption: str,
    levels: Sequence[Level] = (),
    **options: Any,
) -> str:
    """A figure of those `lines` that were logged, see `figures.curves`; empty when none was."""
    logged = [line for line in lines if line]
    if not logged:
        return ""
    return figure(figures.curves(logged, x_label, y_label, levels, **options), caption, options.get("wide", False))


def figure(drawn: str, caption: str, wide: bool = False) -> str:
    """A plot with the sentence that says what it shows."""
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def gallery(text: str, shown: Iterable[str]) -> str:
    """Introduction and figures of a section; empty when there is no figure."""
    inside = "".join(shown)
    return f'<p>{text}</p><div class="figures">{inside}</div>' if inside else ""


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and values."""
    cells = (f"<tr><th>{escape(name)}</th><td>{escape(_shown(value))}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as one list, with names like discover.steps."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def duration(seconds: float | Mapping[str, float]) -> str:
    """74.2 → 1 min 14 s; of several durations their `total`, or else the sum."""
    if isinstance(seconds, Mapping):
        seconds = seconds.get("total", sum(seconds.values()))
    total = round(seconds)
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    if hours:
        return f"{hours}\u00a0h {minutes}\u00a0min"
    return f"{minutes}\u00a0min {rest}\u00a0s" if minutes else f"{rest}\u00a0s"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)
