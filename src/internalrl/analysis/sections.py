"""The report's sections on the three stages, each a function of a run's material that returns HTML.

An empty text means that the run has nothing to show there, and the section is left out.
"""

from __future__ import annotations

from html import escape
from typing import Any

from internalrl.analysis import figures
from internalrl.analysis.episodes import player, stories
from internalrl.analysis.figures import COLORS, Level, Line, key_of, pair
from internalrl.analysis.markup import curves, figure, gallery
from internalrl.analysis.material import Material
from internalrl.analysis.measure import coding, plane, policy_codes, random_codes
from internalrl.analysis.probe import limits, probe
from internalrl.analysis.runs import find, run_task

AGENTS = {
    "reinforce": "internal RL",
    "no-consolidation": "internal RL without consolidation",
    "raw-action": "raw actions, bare base",
    "raw-action-consolidated": "raw actions, consolidated",
}
"""What the stages that play episodes are called in the plots; others keep their own name."""

DOTS = 600
"""Most codes drawn in one plane."""


def pretraining(m: Material) -> str:
    """Stage 1: curves against the exact references, and what can be read from the residual stream."""
    known, base = m.references, m.models.base
    shown = [
        curves(
            [m.line("pretrain", "nll")],
            "step",
            "action NLL in nats per action",
            "The base model learns to predict the expert's next action. Nobody who has to guess the goal can get "
            "below the upper dashed line, and nobody at all below the lower one.",
            [Level("Bayes-optimal", known.bayes), Level("goal known", known.known)],
            y_range=(0, None),
        ),
        curves(
            [m.line("pretrain", "observation_nll")],
            "step",
            "next-observation NLL in nats per step",
            "It also learns to predict where the agent will stand next.",
            y_range=(0, None),
        ),
    ]
    if m.models.grid.colors >= 6:  # fewer leave no demonstrations
        tap = m.models.steered.tap.layer if m.models.steered else None
        accuracy = probe(base, m.models.grid, seed=m.run.seed)
        shown.append(
            figure(
                figures.probe_bars(accuracy, *limits(m.models.grid, seed=m.run.seed), tap),
                "How often a linear read-out of the residual stream names the subgoal that the expert is after, "
                "which the model is never told.",
            )
        )
    return gallery(
        "A transformer watches an expert walk to coloured cells, two by two, in an order that it has to guess. On "
        f"fresh demonstrations it needs {known.base:.3f} nats per action, the exact Bayes filter {known.bayes:.3f}.",
        shown,
    )


def discovery(m: Material) -> str:
    """Stage 2: what the switches and codes are, and how they came about."""
    if m.models.steered is None:
        return ""
    grid, known = m.models.grid, m.references
    found = coding(m.models.steered, grid, m.episodes, m.run.seed)
    kl, nll = m.line("discover", "kl"), m.line("discover", "nll", "training batches")
    alone, informed = Level("base alone", known.base), Level("goal known", known.known)
    path = (kl.y, nll.y) if kl and nll else ([], [])
    form, squeeze = m.setting("form_steps"), m.setting("squeeze_steps")
    phases = [(form, "squeeze"), (form + squeeze, "switch")] if form and squeeze else []
    options: dict[str, Any] = {"events": phases}
    shown = [
        figure(
            figures.raster(found.subgoal, found.switch, found.length),
            "Fresh demonstrations, one per row. Bars are the expert's hidden subgoals, ticks the steps where the "
            "metacontroller adopts a new code: ideally they stand where the colour changes, and nowhere else.",
            wide=True,
        ),
        figure(
            figures.rate_distortion(*path, (found.kl, found.nll), [alone, informed]),
            "What the codes tell (rate) against how badly actions are predicted (distortion): the finished model on "
            "whole demonstrations, and its way there on training batches, some of which begin mid-way.",
        ),
        curves(
            [nll, m.line("discover", "hard_nll", "hard switches, fresh data", dots=True)],
            "step",
            "action NLL in nats per action",
            "Codes that carry the subgoal let the frozen base predict better than it can alone.",
            [alone],
            y_range=(0, None),
            **options,
        ),
        curves(
            [kl],
            "step",
            "KL in nats per episode",
            "What the codes tell of an episode's future, for which the loss charges.",
            y_range=(0, None),
            **options,
        ),
        curves(
            [
                m.line("discover", "switches", "training"),
                m.line("discover", "hard_switches", "hard", dots=True),
                m.line("discover", "true_switches", "changes of subgoal", dots=True),
            ],
            "step",
            "switches per episode",
            "How often the metacontroller changes its code, and the expert its subgoal; the first of an episode is not "
            "counted.",
            y_range=(0, None),
            **options,
        ),
        curves(
            [
                m.line("discover", "bimodality", "decided steps"),
                m.line("discover", "switch_f1", "switch F1", dots=True),
            ],
            "step",
            "decided steps and switch F1",
            "Decided steps are those where the switch is below .1 or above .9; switch F1 is its agreement, within "
            "one step, with the true changes of subgoal.",
            y_range=(-0.03, 1.03),
            **options,
        ),
        curves(
            _unseen(m),
            "step",
            "rate under random codes",
            "How often a random code after one subgoal leads to the one that no demonstration shows next.",
            [Level("ideal", 2 / grid.colors)],
            y_range=(0, 2.8 / grid.colors),
            **options,
        ),
    ]
    return gallery(
        "The base model is now frozen. A small metacontroller learns, without labels, codes that steer it, and "
        "when to switch from one code to the next.",
        shown,
    )


def _unseen(m: Material) -> list[Line]:
    """The pass rate of each unseen transition, as its own line."""
    lines = [line for line in m.metrics if line["stage"] == "discover" and "unseen" in line]
    subgoals = m.models.grid.colors // 2
    steps = [line["step"] for line in lines]
    return [
        Line(
            f"{pair(k)} → {pair((k + 1) % subgoals)}",
            steps,
            [line["unseen"][k] for line in lines],
            dots=True,
        )
        for k in range(subgoals if lines else 0)
    ]


def consolidation(m: Material) -> str:
    """Stage 2b: how the student catches up with the forgetful teacher."""
    rates = [find(m.summary, f"unseen_pass_rate{when}") for when in ("_before_consolidation", "")]
    effect = (
        " It took the rate of unseen transitions from {:.2f} to {:.2f}.".format(*rates) if None not in rates else ""
    )
    return gallery(
        "A code should mean the same in every context. The model plays under random codes with its memory cut at "
        f"every switch, and then learns to act like that with its memory whole.{effect}",
        [
            curves(
                [
                    m.line("rehearse", "loss", "rehearsal"),
                    m.line("consolidate", "kl", "KL of the actions"),
                    m.line("consolidate", "switch_loss", "cross-entropy of the switches"),
                    m.line("consolidate", "loss", "weighted sum"),
                ],
                "step",
                "nats per step",
                "How far the model with its whole memory is from the forgetful one, in what it does and in when it "
                "switches.",
                y_range=(0, None),
                wide=True,
            )
        ],
    )


def codes(m: Material) -> str:
    """What random codes and the policy's codes make the agent do."""
    if m.models.steered is None:
        return ""
    free, rates = random_codes(m.models.steered, m.models.grid, m.episodes, m.run.seed)
    axes = plane(free)
    shown = [
        figure(
            figures.code_plane(free.code[:DOTS] @ axes, free.reached[:DOTS]),
            "Random codes, coloured by the subgoal that the agent reached while it held them; the plane is the one "
            "in which the subgoals separate best.",
        )
    ]
    if m.played:
        chosen = policy_codes(m.models.grid, m.played)
        shown.append(
            figure(
                figures.code_plane(chosen.code[:DOTS] @ axes, chosen.reached[:DOTS]),
                "The same plane with the codes that the trained policy chooses.",
            )
        )
    shown.append(
        figure(
            figures.transitions(rates),
            "What follows a completed subgoal when the next code is random. Framed are the transitions that no "
            f"demonstration contains; did codes not depend on context, they too would occur at {1 / len(rates):.2f}.",
        )
    )
    return gallery("Without task or reward, random codes show what each of them makes the agent do.", shown)


def reinforcement(m: Material) -> str:
    """Stage 3 and its baselines: success against episodes, and how the policy gets there."""
    stages = {line["stage"] for line in m.metrics if {"episodes", "success"} <= line.keys()}
    ordered = sorted(stages, key=lambda stage: ([*AGENTS, stage].index(stage), stage))
    captions = {
        "length": "Steps of an episode, which ends at success, at a wrong colour, or at the horizon.",
        "decisions": "How many codes the policy chooses in an episode.",
        "reward_std": "At zero all episodes of a batch end alike, and there is nothing to learn from.",
    }
    labels = ("steps per episode", "decisions per episode", "standard deviation of the reward")
    names = {**AGENTS, "reinforce": "raw actions"} if m.setting("agent") == "raw-action" else AGENTS
    success = curves(
        [m.line(stage, "success", names.get(stage, stage), x="episodes") for stage in ordered],
        "episodes",
        "success",
        "Share of an iteration's episodes that solved the whole task; nothing less is rewarded.",
        percent=True,
        y_range=(-0.02, 1.02),
        wide=True,
    )
    return gallery(
        f"The task is to visit the colours {escape(run_task(m.run, m.models.grid))} in this order, with one reward "
        "at the very end. Internal RL chooses a code at each switch and leaves the rest to the frozen model.",
        [
            success,
            *(
                curves([m.line("reinforce", name, x="episodes")], "episodes", label, caption, y_range=(0, None))
                for (name, caption), label in zip(captions.items(), labels, strict=True)
            ),
        ],
    )


def pictures(m: Material) -> str:
    """Some of the policy's episodes, drawn and animated."""
    if m.played is None:
        return ""
    players = [player(m.models.grid, story, k + 1) for k, story in enumerate(stories(m.models.grid, m.played))]
    key = [("━", COLORS[k % len(COLORS)], pair(k)) for k in range(m.models.grid.colors // 2)]
    return (
        "<p>The trained policy at work. A path has the colour of the subgoal that its segment, the steps under one "
        "code, reached, and is grey if it reached none. The small pictures show the segments one by one, with the "
        "cells entered.</p>" + key_of(key) + "".join(players)
    )
