"""The report of runs on programs: its headline and its own sections."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from internalrl.analysis.measure import Codes, plane
from internalrl.analysis.report import figures, sections
from internalrl.analysis.report.figures import COLORS, NEITHER, Level, key_of
from internalrl.analysis.report.markup import Headline, curves, decimals, duration, figure, gallery, percent
from internalrl.analysis.report.programs import Program, ProgramMaterial, following, obedience, segments
from internalrl.domains.code.grammar import PROMPT
from internalrl.domains.code.idioms import INDENT

SHOWN = 4
"""Programs of each kind that are printed."""


def pretraining(m: ProgramMaterial) -> str:
    """Stage 1: the curve against the corpus's own entropy."""
    known = m.references
    return gallery(
        "A small Llama learns to continue programs, each a chain of idioms in varying forms, with chance deciding "
        f"which comes next. On fresh programs it needs {known.base:.3f} nats per token; with the corpus's own "
        f"probabilities it would be {known.bayes:.3f}.",
        [
            curves(
                [m.line("pretrain", "nll")],
                "step",
                "token NLL in nats per token",
                "Nothing that knows only what was written so far can get below the upper dashed line, and nothing at "
                "all below the lower one.",
                [Level("corpus's own", known.bayes), Level("idioms known", known.known)],
                y_range=(0, None),
                wide=True,
            )
        ],
    )


def consolidation(m: ProgramMaterial) -> str:
    """Stage 2b: rehearsal on spliced texts."""
    return sections.consolidation(
        m,
        "A code should mean the same in every context. Programs are cut at the learned switches and spliced anew, so "
        "that idioms follow one another as they never do in the corpus; what runs is kept, and the metacontroller "
        "learns to write it." + sections.effect(m, "forced_unseen"),
    )


def codes(m: ProgramMaterial) -> str:
    """Which idiom a code writes: codes of known idioms, random ones, and the policy's."""
    if m.steered is None:
        return ""
    random = segments(m.random)
    axes = plane(random)
    shown = [
        figure(
            figures.matrix(
                obedience(m.steered, m.corpus),
                title="idiom that the code stood for in another program",
                x_label="idiom written",
                name=m.name,
            ),
            "What each code writes: codes are taken from held-out programs and given in a new order, half of whose "
            "transitions the corpus never shows. Ideally all is on the diagonal.",
            wide=True,
        ),
        _plane(m, random, axes, "Random codes, coloured by the idiom that was written under them; the plane is the one "
               "in which idioms separate best. Crosses are segments that are not one whole idiom."),
        figure(
            figures.matrix(
                following(m.models.code, m.random),
                m.models.code.unseen,
                title="idiom just written",
                x_label="next idiom",
                name=m.name,
                frame="not in the corpus",
            ),
            "What follows an idiom when the next code is random. Did codes not depend on context, every row would be "
            "the same; ending the program counts as other.",
            wide=True,
        ),
    ]  # fmt: skip
    if m.trained:
        chosen = "The same plane with the codes that the trained policy chooses."
        shown.append(_plane(m, segments(m.trained), axes, chosen))
    return gallery("Without task or reward, codes show what each of them makes the model write.", shown)


def _plane(m: ProgramMaterial, found: Codes, axes: NDArray[np.float32], caption: str) -> str:
    code, idiom = found.code[: sections.DOTS], found.reached[: sections.DOTS]
    return figure(figures.code_plane(code @ axes, idiom, title="idiom written", name=m.name), caption)


def programs(m: ProgramMaterial) -> str:
    """What is written before and after, by segment."""
    kinds = [
        ("The bare model", m.bare, "Before: the base alone, its tokens sampled at temperature 1."),
        ("Random codes", m.random, "Before: codes from N(0, I), and tokens at the temperature of internal RL."),
        ("The trained policy", m.trained, "After: the policy chooses the codes; the base is the same."),
    ]
    kinds = [kind for kind in kinds if kind[1]]
    key = [("■", COLORS[k % len(COLORS)], m.name(k)) for k in range(len(m.models.code.idioms) + 1)]
    return (
        "<p>A segment is what was written under one code, and has the colour of its idiom; it is grey if it is not one "
        "idiom. The bare model has no codes, and is cut where idioms end.</p>"
        + _shares(m, kinds)
        + key_of([*key, ("■", NEITHER, "other")])
        + "".join(
            f'<h3>{escape(title)}</h3><p>{escape(text)}</p><div class="programs">'
            + "".join(_program(m, program) for program in written[:SHOWN])
            + "</div>"
            for title, written, text in kinds
        )
    )


def _shares(m: ProgramMaterial, kinds: Sequence[tuple[str, Sequence[Program], str]]) -> str:
    """A row for each kind of programs: how many run and pass, and how new their transitions are."""
    names = ["programs that run", "that pass all tests", "transitions that the corpus lacks"]
    rows = []
    for title, written, _ in kinds:
        steps = [step for program in written for step in pairwise(program.idioms)]
        shares = [
            sum(program.status in ("runs", "passes") for program in written) / len(written),
            sum(program.status == "passes" for program in written) / len(written),
            sum(bool(m.models.code.unseen[step]) for step in steps) / max(len(steps), 1),
        ]
        rows.append([title, *(percent(share) for share in shares)])
    if m.models.task is None:
        names.pop(1)
        rows = [[*row[:2], row[3]] for row in rows]
    head = "".join(f"<th>{name}</th>" for name in ("", *names))
    body = "".join(f"<tr><th>{title}</th>{''.join(f'<td>{v}</td>' for v in values)}</tr>" for title, *values in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _program(m: ProgramMaterial, program: Program) -> str:
    """One program with coloured segments, and what it is."""
    chain = " → ".join(m.name(k) for k in program.idioms) or "no idiom"
    return (
        f"<figure><pre>{escape(PROMPT.removesuffix(INDENT))}{_segments(m, program)}</pre>"
        f"<figcaption>{escape(program.status)}: {escape(chain)}</figcaption></figure>"
    )


def _segments(m: ProgramMaterial, program: Program) -> str:
    """Indentation that a segment left for the next one is shown as the latter's, so that blocks are whole lines."""
    drawn, left = [], INDENT
    for piece in program.pieces:
        text = left + piece.text
        left = text[text.rfind("\n") + 1 :] if text.endswith((f"\n{INDENT}", f"\n{INDENT * 2}")) else ""
        color = COLORS[piece.idiom % len(COLORS)] if piece.idiom >= 0 else NEITHER
        name = m.name(piece.idiom) if piece.idiom >= 0 else "other"
        text = escape(text.removesuffix(left) if left else text)
        drawn.append(f'<span style="background:{color}38" title="{name}">{text}</span>')
    return "".join(drawn)


HEADLINE: tuple[Headline, ...] = (
    ("success", "success of internal RL", "programs that pass all hidden tests of a function never shown", percent),
    ("raw_action_success", "success of token-level RL", "the same reward and as many programs, but no codes", percent),
    ("runs", "programs that run", "at the end of internal RL", percent),
    ("switch_f1", "switch F1", "agreement of switches with the true ends of idioms, within a token", decimals(3)),
    (
        "forced_unseen",
        "unseen transitions",
        "rate at which a code writes its idiom after one it never follows",
        decimals(2),
    ),
    ("random_runs", "random codes", "programs that run under them", percent),
    ("gap_nats", "nats above the corpus", "what the base loses per program to exact probabilities", decimals(2)),
    ("episodes", "programs", "written and judged by internal RL", "{:,.0f}".format),
    ("seconds", "computing time", "", duration),
)

SECTIONS = (
    ("pretrain", "Stage 1: the base model", pretraining),
    ("discover", "Stage 2: discovery", sections.discovery),
    ("consolidate", "Stage 2b: consolidation", consolidation),
    ("codes", "What the codes do", codes),
    ("reinforce", "Stage 3: internal RL", sections.reinforcement),
    ("programs", "Programs before and after", programs),
)
