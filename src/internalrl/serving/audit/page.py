"""The audit as web pages: an answer coloured by segment, and the list of answers. No script, nothing from elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote
from zlib import crc32

from markupsafe import Markup

from internalrl.pages import templates
from internalrl.serving.audit.store import AuditStore, Query, Segment

POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
"""Content-Security-Policy to send with the pages: were a text not escaped, a browser would still run nothing of it."""

COLORS = 8
"""Colours of strategies, c0 to c7 in audit.css; the most frequent ones on a page have one."""

# What changes the direction of writing would let a text rearrange the page around it.
_VISIBLE = {
    code: f"⟨U+{code:04X}⟩"
    for code in (*range(9), *range(11, 32), 0x7F, 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def _visible(value: Any) -> Any:
    """Applied to all that a template is given: control characters of a text are shown by their numbers."""
    return value.translate(_VISIBLE) if isinstance(value, str) and not isinstance(value, Markup) else value


_TEMPLATES = templates(__package__, finalize=_visible)
_TEMPLATES.filters |= {
    "number": _number,
    "quoted": lambda text: quote(text, safe=""),
    "utc": lambda seconds: datetime.fromtimestamp(seconds, UTC),
}


def audit_page(store: AuditStore, request_id: str) -> str | None:
    """The page of one answer; None when nothing is known of it. Its links are relative to `audit/ID`."""
    segments = store.find(Query(request=request_id, limit=100_000))
    if not segments:
        return None
    colors = _colors(segments)

    def hue(segment: Segment) -> str:
        """The class of a segment's colour; neighbours without a strategy differ."""
        return colors.get(segment.strategy, f"plain{segment.index % 2}") if segment.code else "off"

    return _page("answer", f"Answer {request_id}", segments=segments, colors=colors, hue=hue)


def audit_list(store: AuditStore, query: Query | None = None) -> str:
    """The page of the newest answers with a segment that `query` finds. Its links are relative to `audit`."""
    query = query or Query()
    answers = store.requests(query)
    colors = _colors(segment for answer in answers for segment in answer)
    return _page("list", "Audit", query=query, answers=answers, colors=colors)


def _colors(segments: Iterable[Segment]) -> dict[str | None, str]:
    """Strategy -> class of its colour: that of its name on all pages, unless a more frequent strategy has it."""
    counts = Counter(segment.strategy for segment in segments if segment.strategy is not None)
    colors: dict[str | None, str] = {}
    for name, _ in counts.most_common():
        wished = crc32(name.encode())
        free = (f"c{(wished + i) % COLORS}" for i in range(COLORS))
        colors[name] = next((color for color in free if color not in colors.values()), "other")
    return colors


def _page(name: str, title: str, **values: Any) -> str:
    return _TEMPLATES.get_template(f"{name}.html.j2").render(title=title, policy=POLICY, **values)
