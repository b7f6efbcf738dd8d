"""The report's sections that all domains share, each a function of a run's material.

A section that is empty or None has nothing to show for the run, and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internalrl.analysis.measure import Codes
from internalrl.analysis.report.figures import Level, Name, code_plane, curves, raster, rate_distortion
from internalrl.analysis.report.material import KnownMaterial, Material
from internalrl.analysis.report.page import Figure, Section
from internalrl.analysis.report.runs import find

AGENTS = {
    "reinforce": "internal RL",
    "no-consolidation": "internal RL without consolidation",
    "raw-action": "{raw}, bare base",
    "raw-action-consolidated": "{raw}, consolidated",
}
"""What the stages that play episodes are called in the plots; others keep their own name."""

FROZEN = (
    "The base model is now frozen. A small metacontroller learns, without labels, codes that steer it, and when to "
    "switch from one code to the next."
)

DOTS = 600
"""Most codes drawn in one plane."""

Result = tuple[str, str, str, Callable[[Any], str]]
"""Name in the summary, what to call it, what it means (the time is told by stage), how to write it."""


def discovery(m: KnownMaterial, more: Sequence[Figure | None] = ()) -> Section | None:
    """Stage 2: what the switches and codes are, and how they came about; `more` figures of the domain."""
    if m.steered is None:
        return None
    w, known, found = m.words, m.references, m.coding
    kl, nll = m.line("discover", "kl"), m.line("discover", "nll", "training batches")
    alone, informed = Level("base alone", known.base), Level(f"{w.subgoal} known", known.known)
    path = (kl.y, nll.y) if kl and nll else ([], [])
    cropped = ", some of which begin mid-way" if m.setting("crop") else ""
    shown = [
        raster(
            found.subgoal,
            found.switch,
            found.length,
            f"true {w.subgoal}{w.named}",
            f"{w.step} of the {w.episode}",
            m.name,
            f"Fresh {w.demonstrations}, one per row. Bars are {w.truth}, ticks the {w.step}s where the metacontroller "
            "adopts a new code: ideally they stand where the colour changes, and nowhere else.",
        ),
        rate_distortion(
            *path,
            (found.kl, found.nll),
            [alone, informed],
            f"What the codes tell (rate) against how badly {w.action}s are predicted (distortion): the finished model "
            f"on whole {w.demonstrations}, and its way there on training batches{cropped}.",
            episode=w.episode,
            action=w.action,
        ),
        *progress(m, [alone]),
        *more,
    ]
    return Section("discover", "Stage 2: discovery", FROZEN, shown)


def progress(m: Material, levels: Sequence[Level] = ()) -> list[Figure | None]:
    """Stage 2 step by step; `levels` of the NLL to compare with."""
    w, options = m.words, phases(m)
    changes = f", and how often {w.truth} do" if w.truth else ""
    agreement = (
        f"; switch F1 is its agreement, within one {w.step}, with the true changes of {w.subgoal}" if w.subgoal else ""
    )
    return [
        curves(
            [
                m.line("discover", "nll", "training batches"),
                m.line("discover", "hard_nll", "hard switches, fresh data", dots=True),
            ],
            f"{w.action} NLL in nats per {w.action}",
            "What codes carry lets the frozen base predict better than it can alone.",
            levels,
            **options,
        ),
        curves(
            [m.line("discover", "kl")],
            f"KL in nats per {w.episode}",
            f"What the codes tell of {_a(w.episode)}'s future, for which the loss charges.",
            **options,
        ),
        curves(
            [
                m.line("discover", "switches", "training"),
                m.line("discover", "hard_switches", "hard", dots=True),
                m.line("discover", "true_switches", f"changes of {w.subgoal}", dots=True),
            ],
            f"switches per {w.episode}",
            f"How often the code changes{changes}; the first of {_a(w.episode)} is not counted.",
            **options,
        ),
        curves(
            [
                m.line("discover", "bimodality", f"decided {w.step}s"),
                m.line("discover", "switch_f1", "switch F1", dots=True),
            ],
            f"decided {w.step}s" + (" and switch F1" if w.subgoal else ""),
            f"Decided {w.step}s are those where the switch is below .1 or above .9{agreement}.",
            y_range=(-0.03, 1.03),
            **options,
        ),
    ]


def dots(found: Codes, caption: str, axes: NDArray[np.float32], title: str, name: Name) -> Figure:
    """The first codes of `found` in the plane of `axes`."""
    return code_plane(found.code[:DOTS] @ axes, found.reached[:DOTS], title, name, caption)


def phases(m: Material) -> dict[str, Any]:
    """What the curves of discovery are marked with."""
    form, squeeze = m.setting("form_steps"), m.setting("squeeze_steps")
    return {"events": [(form, "squeeze"), (form + squeeze, "switch")] if form and squeeze else []}


def consolidation(m: Material, text: str) -> Section:
    """Stage 2b, which `text` tells about: how the student catches up."""
    return Section(
        "consolidate",
        "Stage 2b: consolidation",
        text,
        [
            curves(
                [
                    m.line("rehearse", "loss", "rehearsal"),
                    m.line("consolidate", "kl", f"KL of the {m.words.action}s"),
                    m.line("consolidate", "switch_loss", "cross-entropy of the switches"),
                    m.line("consolidate", "loss", "weighted sum"),
                ],
                f"nats per {m.words.step}",
                "How far the model is from what it should do, and from when it should switch.",
                wide=True,
            )
        ],
    )


def effect(m: Material, name: str) -> str:
    """A sentence on what consolidation did to a figure of the summary; empty where it is not known."""
    rates = [find(m.summary, f"{name}{when}") for when in ("_before_consolidation", "")]
    return " It took the rate of unseen transitions from {:.2f} to {:.2f}.".format(*rates) if None not in rates else ""


def reinforcement(m: KnownMaterial) -> Section:
    """Stage 3 and its baselines: success against episodes, and how the policy gets there."""
    w = m.words
    stages = {line["stage"] for line in m.metrics if {"episodes", "success"} <= line.keys()}
    ordered = sorted(stages, key=lambda stage: ([*AGENTS, stage].index(stage), stage))
    names = {stage: AGENTS.get(stage, stage).format(raw=w.raw) for stage in ordered}
    if m.setting("agent") == "raw-action":
        names["reinforce"] = w.raw

    def shares(name: str, label: str, caption: str) -> Figure | None:
        lines = [m.line(stage, name, names[stage], x="episodes") for stage in ordered]
        return curves(lines, label, caption, x_label=f"{w.episode}s", percent=True, y_range=(-0.02, 1.02), wide=True)

    return Section(
        "reinforce",
        "Stage 3: internal RL",
        f"{m.task} Internal RL chooses a code at each switch and leaves the rest to the frozen model.",
        [
            shares(
                "success",
                "success",
                f"Share of an iteration's {w.episode}s that solved the whole task; nothing less is rewarded.",
            ),
            over_episodes(
                m,
                "length",
                "steps per episode",
                "Steps of an episode, which ends at success, at a wrong colour, or at the horizon.",
            ),
            over_episodes(
                m, "completions/mean_length", "tokens per program", "How long programs are, their end included."
            ),
            shares(
                "rewards/runs/mean",
                "programs that run",
                "Share of an iteration's programs that parse and run, whatever they compute.",
            ),
            over_episodes(
                m,
                "decisions",
                f"decisions per {w.episode}",
                f"How many codes the policy chooses in {_a(w.episode)}.",
            ),
            over_episodes(
                m,
                "reward_std",
                "standard deviation of the reward",
                f"At zero all {w.episode}s of a batch end alike, and there is nothing to learn from.",
            ),
        ],
    )


def over_episodes(m: Material, name: str, label: str, caption: str) -> Figure | None:
    """How a logged value of internal RL went."""
    line = m.line("reinforce", name, x="episodes")
    return curves([line], label, caption, x_label=f"{m.words.episode}s")


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
