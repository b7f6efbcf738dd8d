"""The audit as web pages: an answer coloured by segment, and the list of answers. No script, nothing from elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from string import Template
from urllib.parse import quote
from zlib import crc32

from internalrl.serving.audit.store import AuditStore, Query, Segment

POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
"""Content-Security-Policy to send with the pages: were a text not escaped, a browser would still run nothing of it."""

COLORS = 8
"""Colours of strategies, c0 to c7 in audit.html; the most frequent ones on a page have one."""
_EXCERPT = 160


def audit_page(store: AuditStore, request_id: str) -> str | None:
    """The page of one answer; None when nothing is known of it. Its links are relative to `audit/ID`."""
    segments = store.find(Query(request=request_id, limit=100_000))
    if not segments:
        return None
    first, last = segments[0], segments[-1]
    classes = _classes(segments)
    nats = [segment.log_probability for segment in segments if segment.log_probability is not None]
    facts = [
        ("Adapter", escape(first.adapter)),
        ("Time", _time(last.time)),
        ("Segments", str(len(segments))),
        ("Tokens", str(last.stop)),
        (
            "Log-probability",
            f"{_number(sum(nats) / max(last.stop, 1), '.2f')} <small>nats per token</small>" if nats else "–",
        ),
        ("Violations", str(sum(segment.violation is not None for segment in segments))),
    ]
    body = [
        '<nav><a href="../audit">All answers</a></nav>',
        f"<h1>Answer <code>{_shown(request_id)}</code></h1>",
        '<dl class="facts">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts) + "</dl>",
        _key(segments, classes),
        '<p class="answer">' + "".join(_span(segment, classes) for segment in segments) + "</p>",
        '<div class="wide"><table><thead><tr><th>#<th>Tokens<th>Strategy<th>Code<th>Switch<th>Nats per token<th>Text'
        "</tr></thead><tbody>" + "".join(_row(segment, classes) for segment in segments) + "</tbody></table></div>",
    ]
    return _page(f"Answer {request_id}", body)


def audit_list(store: AuditStore, query: Query | None = None) -> str:
    """The page of the newest answers with a segment that `query` finds. Its links are relative to `audit`."""
    query = query or Query()
    answers = store.requests(query)
    classes = _classes([segment for answer in answers for segment in answer])
    fields = "".join(
        f'<label>{label} <input name="{name}" value="{_shown(getattr(query, name) or "")}"></label>'
        for name, label in (("adapter", "Adapter"), ("strategy", "Strategy"), ("violation", "Violation"))
    )
    body = [
        "<h1>Audit</h1>",
        f'<form method="get">{fields}<button>Show</button></form>',
        '<ul class="answers">' + "".join(_item(answer, classes) for answer in answers) + "</ul>"
        if answers
        else "<p>No answer fits.</p>",
    ]
    return _page("Audit", body)


def _item(answer: Sequence[Segment], classes: dict[str | None, str]) -> str:
    """An answer on the list."""
    first, text = answer[0], "".join(segment.text or "" for segment in answer)
    violations = sum(segment.violation is not None for segment in answer)
    strategies = dict.fromkeys(segment.strategy for segment in answer if segment.strategy)
    chips = "".join(f'<span class="chip {classes[name]}">{_shown(name)}</span>' for name in strategies)
    warning = f'<b class="warn">{violations} violation{"s" * (violations > 1)}</b>' if violations else ""
    return (
        f'<li><p class="what"><a href="audit/{quote(first.request, safe="")}"><code>{_shown(first.request)}</code></a>'
        f"<span>{escape(first.adapter)}</span><span>{len(answer)} segments</span>{_time(first.time)}{warning}</p>"
        f'<p class="excerpt">{_shown(text[:_EXCERPT]) + "…" * (len(text) > _EXCERPT) or "<i>no text kept</i>"}</p>'
        f'<p class="key">{chips}</p></li>'
    )


def _classes(segments: Sequence[Segment]) -> dict[str | None, str]:
    """Strategy -> class of its colour: that of its name on all pages, unless a more frequent strategy has it."""
    counts = Counter(segment.strategy for segment in segments if segment.strategy is not None)
    classes: dict[str | None, str] = {}
    for name, _ in counts.most_common():
        wished = crc32(name.encode())
        colors = (f"c{(wished + i) % COLORS}" for i in range(COLORS))
        classes[name] = next((color for color in colors if color not in classes.values()), "other")
    return classes


def _class(segment: Segment, classes: dict[str | None, str]) -> str:
    if not segment.code:
        return "off"
    return classes.get(segment.strategy) or f"plain{segment.index % 2}"


def _key(segments: Sequence[Segment], classes: dict[str | None, str]) -> str:
    shown = [f'<span class="chip {color}">{_shown(name or "")}</span>' for name, color in classes.items()]
    if any(segment.strategy is None and segment.code for segment in segments):
        shown.append('<span class="chip plain">no named strategy</span>')
    if any(not segment.code for segment in segments):
        shown.append('<span class="chip off">not steered</span>')
    if any(segment.violation is not None for segment in segments):
        shown.append('<span class="chip violated">violation</span>')
    return f'<p class="key">{"".join(shown)}</p>'


def _span(segment: Segment, classes: dict[str | None, str]) -> str:
    """A segment in the text, with a card that shows when it is pointed at or tapped, and a link to its row."""
    violated = " violated" if segment.violation is not None else ""
    text = "<i>no text kept</i> " if segment.text is None else _shown(segment.text)
    card = [
        f"<b>{_shown(segment.strategy or ('no named strategy' if segment.code else 'not steered'))}</b>",
        f"segment {segment.index}, tokens {segment.start}–{segment.stop - 1}",
        f"switch {_number(segment.switch_probability, '.3f')}",
        _bars(segment.code),
    ]
    if segment.violation is not None:
        card.insert(1, f'<b class="warn">{_shown(segment.violation)}</b>')
    return (
        f'<a class="segment {_class(segment, classes)}{violated}" href="#s{segment.index}">{text}'
        f'<span class="card">{"<br>".join(part for part in card if part)}</span></a>'
    )


def _row(segment: Segment, classes: dict[str | None, str]) -> str:
    tokens = max(segment.stop - segment.start, 1)
    nats = None if segment.log_probability is None else segment.log_probability / tokens
    code = " ".join(_number(number, "+.2f") for number in segment.code)
    chance = segment.switch_probability
    meter = f'<i class="meter"><i style="width:{min(max(chance or 0, 0), 1):.0%}"></i></i>'
    notes = (
        [f'<span class="chip {_class(segment, classes)}">{_shown(segment.strategy)}</span>'] if segment.strategy else []
    )
    if not segment.code:
        notes.append('<span class="chip off">not steered</span>')
    if segment.violation is not None:
        notes.append(f'<b class="warn">{_shown(segment.violation)}</b>')
    text = "<i>not kept</i>" if segment.text is None else _shown(segment.text)
    return (
        f'<tr id="s{segment.index}"><td>{segment.index}<td>{segment.start}–{segment.stop - 1}'
        f"<td>{'<br>'.join(notes) or '–'}"
        f'<td>{_bars(segment.code)}<span class="numbers">{code}</span><td>{_number(chance, ".3f")}{meter}'
        f'<td>{_number(nats, ".2f")}<td class="text">{text}</tr>'
    )


def _bars(code: Sequence[float | None]) -> str:
    """A code as small bars, up for positive numbers; ±3 fills the height."""
    if not code:
        return ""
    bars = []
    for i, number in enumerate(code):
        height = min(abs(number or 0) / 3, 1) * 14
        top = 15 - height if (number or 0) > 0 else 15
        bars.append(f'<rect x="{i * 10 + 1}" y="{top:.1f}" width="8" height="{max(height, 0.8):.1f}"/>')
    width = len(code) * 10
    return (
        f'<svg class="bars" width="{width}" height="30" viewBox="0 0 {width} 30" aria-hidden="true">'
        f'<path d="M0 15H{width}"/>{"".join(bars)}</svg>'
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def _time(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return f'<time datetime="{moment.isoformat()}">{moment:%Y-%m-%d %H:%M:%S} UTC</time>'


# What changes the direction of writing would let a text rearrange the page around it.
_VISIBLE = {
    code: f"⟨U+{code:04X}⟩"
    for code in (*range(9), *range(11, 32), 0x7F, 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def _shown(text: str) -> str:
    """A foreign text as HTML that shows it: markup as it is written, control characters by their numbers."""
    return escape(text.translate(_VISIBLE))


def _page(title: str, body: Sequence[str]) -> str:
    page = files(__package__).joinpath("audit.html").read_text(encoding="utf-8")
    return Template(page).substitute(title=_shown(title), policy=POLICY, body="\n".join(body))
