"""The report of runs on programs: its headline and its own sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

from internalrl.analysis.measure import plane
from internalrl.analysis.report import sections
from internalrl.analysis.report.drawing import COLORS, NEITHER
from internalrl.analysis.report.figures import Level, curves, matrix
from internalrl.analysis.report.formats import decimals, duration, percent
from internalrl.analysis.report.page import Passage, Passages, Section, Table
from internalrl.analysis.report.programs import Program, ProgramMaterial, following, obedience, segments
from internalrl.analysis.report.sections import Result
from internalrl.domains.code.grammar import PROMPT
from internalrl.domains.code.idioms import INDENT

SHOWN = 4
"""Programs of each kind that are printed."""


def pretraining(m: ProgramMaterial) -> Section:
    """Stage 1: the curve against the corpus's own entropy."""
    known = m.references
    return Section(
        "pretrain",
        "Stage 1: the base model",
        "A small Llama learns to continue programs, each a chain of idioms in varying forms, with chance deciding "
        f"which comes next. On fresh programs it needs {known.base:.3f} nats per token; with the corpus's own "
        f"probabilities it would be {known.bayes:.3f}.",
        [
            curves(
                [m.line("pretrain", "nll")],
                "token NLL in nats per token",
                "Nothing that knows only what was written so far can get below the upper dashed line, and nothing at "
                "all below the lower one.",
                [Level("corpus's own", known.bayes), Level("idioms known", known.known)],
                wide=True,
            )
        ],
    )


def consolidation(m: ProgramMaterial) -> Section:
    """Stage 2b: rehearsal on spliced texts."""
    return sections.consolidation(
        m,
        "A code should mean the same in every context. Programs are cut at the learned switches and spliced anew, so "
        "that idioms follow one another as they never do in the corpus; what runs is kept, and the metacontroller "
        "learns to write it." + sections.effect(m, "forced_unseen"),
    )


def codes(m: ProgramMaterial) -> Section | None:
    """Which idiom a code writes: codes of known idioms, random ones, and the policy's."""
    if m.steered is None:
        return None
    random = segments(m.random)
    dots = partial(sections.dots, axes=plane(random), title="idiom written", name=m.name)
    shown = [
        matrix(
            obedience(m.steered, m.corpus),
            "idiom that the code stood for in another program",
            "idiom written",
            m.name,
            "What each code writes: codes are taken from held-out programs and given in a new order, half of whose "
            "transitions the corpus never shows. Ideally all is on the diagonal.",
        ),
        dots(
            random,
            "Random codes, coloured by the idiom that was written under them; the plane is the one in which idioms "
            "separate best. Crosses are segments that are not one whole idiom.",
        ),
        matrix(
            following(m.models.code, m.random),
            "idiom just written",
            "next idiom",
            m.name,
            "What follows an idiom when the next code is random. Did codes not depend on context, every row would be "
            "the same; ending the program counts as other.",
            framed=m.models.code.unseen,
            frame="not in the corpus",
        ),
        dots(segments(m.trained), "The same plane with the codes that the trained policy chooses.")
        if m.trained
        else None,
    ]
    text = "Without task or reward, codes show what each of them makes the model write."
    return Section("codes", "What the codes do", text, shown)


def programs(m: ProgramMaterial) -> Section:
    """What is written before and after, by segment."""
    kinds = [
        ("The bare model", "Before: the base alone, its tokens sampled at temperature 1.", m.bare),
        ("Random codes", "Before: codes from N(0, I), and tokens at the temperature of internal RL.", m.random),
        ("The trained policy", "After: the policy chooses the codes; the base is the same.", m.trained),
    ]
    kinds = [kind for kind in kinds if kind[2]]
    idioms = [("■", COLORS[k % len(COLORS)], m.name(k)) for k in range(len(m.models.code.idioms) + 1)]
    return Section(
        "programs",
        "Programs before and after",
        "A segment is what was written under one code, and has the colour of its idiom; it is grey if it is not one "
        "idiom. The bare model has no codes, and is cut where idioms end.",
        key=[*idioms, ("■", NEITHER, "other")],
        parts=[
            _shares(m, {title: written for title, _, written in kinds}),
            *(Passages(title, text, [_passage(m, p) for p in written[:SHOWN]]) for title, text, written in kinds),
        ],
    )


def _shares(m: ProgramMaterial, kinds: Mapping[str, Sequence[Program]]) -> Table:
    """A row for each kind of programs: how many run and pass, and how new their transitions are."""
    rows = []
    for title, written in kinds.items():
        steps = [step for program in written for step in pairwise(program.idioms)]
        shares = {
            "programs that run": sum(program.status in ("runs", "passes") for program in written) / len(written),
            "that pass all tests": sum(program.status == "passes" for program in written) / len(written),
            "transitions that the corpus lacks": sum(bool(m.models.code.unseen[step]) for step in steps)
            / max(len(steps), 1),
        }
        if m.models.task is None:
            del shares["that pass all tests"]
        rows.append([title, *map(percent, shares.values())])
    return Table(rows, ("", *shares))


def _passage(m: ProgramMaterial, program: Program) -> Passage:
    """A program whose segments have the colours of their idioms.

    Indentation that a segment left for the next one is shown as the latter's, so that blocks are whole lines.
    """
    pieces, left = [], INDENT
    for piece in program.pieces:
        text = left + piece.text
        left = text[text.rfind("\n") + 1 :] if text.endswith((f"\n{INDENT}", f"\n{INDENT * 2}")) else ""
        known = piece.idiom >= 0
        color, name = (COLORS[piece.idiom % len(COLORS)], m.name(piece.idiom)) if known else (NEITHER, "other")
        pieces.append((text.removesuffix(left), color, name))
    chain = " → ".join(map(m.name, program.idioms)) or "no idiom"
    return PROMPT.removesuffix(INDENT), pieces, f"{program.status}: {chain}"


HEADLINE: tuple[Result, ...] = (
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

SECTIONS = (pretraining, sections.discovery, consolidation, codes, sections.reinforcement, programs)
