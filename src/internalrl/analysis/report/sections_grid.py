"""The report of the grid world: its headline and its own sections."""

from __future__ import annotations

from functools import partial

import numpy as np

from internalrl.analysis.measure import plane, policy_codes, random_codes
from internalrl.analysis.probe import limits, probe
from internalrl.analysis.report import sections
from internalrl.analysis.report.drawing import COLORS
from internalrl.analysis.report.episodes import players
from internalrl.analysis.report.figures import Level, Line, curves, matrix, pair, probe_bars
from internalrl.analysis.report.formats import decimals, duration, percent
from internalrl.analysis.report.material import GridMaterial
from internalrl.analysis.report.page import Section
from internalrl.analysis.report.sections import Result


def pretraining(m: GridMaterial) -> Section:
    """Stage 1: curves against the exact references, and what can be read from the residual stream."""
    known, base = m.references, m.models.base
    shown = [
        curves(
            [m.line("pretrain", "nll")],
            "action NLL in nats per action",
            "The base model learns to predict the expert's next action. Nobody who has to guess the goal can get "
            "below the upper dashed line, and nobody at all below the lower one.",
            [Level("Bayes-optimal", known.bayes), Level("goal known", known.known)],
        ),
        curves(
            [m.line("pretrain", "observation_nll")],
            "next-observation NLL in nats per step",
            "It also learns to predict where the agent will stand next.",
        ),
    ]
    if m.models.grid.colors >= 6:  # fewer leave no demonstrations
        tap = m.steered.tap.layer if m.steered else None
        accuracy = probe(base, m.models.grid, seed=m.run.seed)
        shown.append(
            probe_bars(
                accuracy,
                *limits(m.models.grid, seed=m.run.seed),
                tap,
                "How often a linear read-out of the residual stream names the subgoal that the expert is after, "
                "which the model is never told.",
            )
        )
    return Section(
        "pretrain",
        "Stage 1: the base model",
        "A transformer watches an expert walk to coloured cells, two by two, in an order that it has to guess. On "
        f"fresh demonstrations it needs {known.base:.3f} nats per action, the exact Bayes filter {known.bayes:.3f}.",
        shown,
    )


def discovery(m: GridMaterial) -> Section | None:
    """Stage 2, with what random codes do."""
    ideal = 1 / (m.models.grid.colors // 2)
    unseen = curves(
        _unseen(m),
        "rate under random codes",
        "How often a random code after one subgoal leads to the one that no demonstration shows next.",
        [Level("ideal", ideal)],
        y_range=(0, 1.4 * ideal),
        **sections.phases(m),
    )
    return sections.discovery(m, [unseen])


def _unseen(m: GridMaterial) -> list[Line]:
    """The pass rate of each unseen transition, as its own line."""
    lines = [line for line in m.metrics if line["stage"] == "discover" and "unseen" in line]
    subgoals = m.models.grid.colors // 2
    steps = [line["step"] for line in lines]
    return [
        Line(f"{pair(k)} → {pair((k + 1) % subgoals)}", steps, [line["unseen"][k] for line in lines], dots=True)
        for k in range(subgoals if lines else 0)
    ]


def consolidation(m: GridMaterial) -> Section:
    """Stage 2b: how the student catches up with the forgetful teacher."""
    return sections.consolidation(
        m,
        "A code should mean the same in every context. The model plays under random codes with its memory cut at "
        "every switch, and then learns to act like that with its memory whole."
        + sections.effect(m, "unseen_pass_rate"),
    )


def codes(m: GridMaterial) -> Section | None:
    """What random codes and the policy's codes make the agent do."""
    if m.steered is None:
        return None
    free, rates = random_codes(m.steered, m.models.grid, m.episodes, m.run.seed)
    dots = partial(sections.dots, axes=plane(free), title="subgoal reached", name=pair)
    chosen = policy_codes(m.models.grid, m.played) if m.played else None
    shown = [
        dots(
            free,
            "Random codes, coloured by the subgoal that the agent reached while it held them; the plane is the one "
            "in which the subgoals separate best.",
        ),
        dots(chosen, "The same plane with the codes that the trained policy chooses.") if chosen else None,
        matrix(
            rates,
            "subgoal just completed",
            "next subgoal",
            pair,
            "What follows a completed subgoal when the next code is random. Framed are the transitions that no "
            f"demonstration contains; did codes not depend on context, they too would occur at {1 / len(rates):.2f}.",
            framed=np.roll(np.eye(len(rates), dtype=bool), 1, axis=1),
            frame="never demonstrated",
        ),
    ]
    text = "Without task or reward, random codes show what each of them makes the agent do."
    return Section("codes", "What the codes do", text, shown)


def pictures(m: GridMaterial) -> Section | None:
    """Some of the policy's episodes, drawn and animated."""
    if m.played is None:
        return None
    return Section(
        "episodes",
        "Episodes",
        "The trained policy at work. A path has the colour of the subgoal that its segment, the steps under one code, "
        "reached, and is grey if it reached none. The small pictures show the segments one by one, with the cells "
        "entered.",
        key=[("━", COLORS[k % len(COLORS)], pair(k)) for k in range(m.models.grid.colors // 2)],
        parts=players(m.models.grid, m.played),
    )


HEADLINE: tuple[Result, ...] = (
    ("success", "success of internal RL", "episodes that solve the whole task, which was never demonstrated", percent),
    ("raw_action_success", "success of raw-action RL", "the same reward and as many episodes, but no codes", percent),
    ("switch_f1", "switch F1", "agreement of switches with true changes of subgoal, within a step", decimals(3)),
    ("unseen_pass_rate", "unseen transitions", "rate at which random codes pass what was never shown", decimals(2)),
    ("probe_accuracy", "subgoal probe", "accuracy of a linear read-out where the metacontroller acts", decimals(2)),
    ("bayes_gap_nats", "nats above Bayes", "what the base model loses per action to the exact filter", decimals(3)),
    ("episodes", "episodes", "played since discovery, with or without reward", "{:,.0f}".format),
    ("seconds", "computing time", "", duration),
)

SECTIONS = (pretraining, discovery, consolidation, codes, sections.reinforcement, pictures)
