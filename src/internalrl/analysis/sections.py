"""The report's sections on the three stages, each a function of a run's material that returns HTML.

An empty text means that the run has nothing to show there, and the section is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

from internalrl.analysis import figures
from internalrl.analysis.episodes import player, stories
from internalrl.analysis.evaluate import Episodes, play
from internalrl.analysis.figures import Level, Line
from internalrl.analysis.markup import curves, figure, figures_of
from internalrl.analysis.measure import References, coding, plane, policy_codes, random_codes, references
from internalrl.analysis.probe import probe
from internalrl.analysis.runs import Models, find, run_task
from internalrl.runlog import RunFolder
from internalrl.stages import EvaluateConfig

AGENTS = {
    "reinforce": "internal RL",
    "no-consolidation": "internal RL without consolidation",
    "raw-action": "raw actions, bare base",
    "raw-action-consolidated": "raw actions, consolidated",
}
"""What the stages that play episodes are called in the plots; others keep their own name."""

DOTS = 600
"""Most codes drawn in one plane."""


@dataclass(frozen=True)
class Material:
    """All that sections are made of; what several of them need is measured once."""

    run: RunFolder
    stored: Mapping[str, Any]
    summary: Mapping[str, Any]
    models: Models
    episodes: int

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return self.run.metrics()

    @cached_property
    def references(self) -> References:
        return references(self.models.base, self.models.grid, self.episodes, self.run.seed)

    @cached_property
    def played(self) -> Episodes | None:
        """Episodes of the trained policy; None without one."""
        steered, grid = self.models.steered, self.models.grid
        if steered is None or steered.policy is None:
            return None
        config, temperature = EvaluateConfig(episodes=256), self.setting("temperature") or 0.0
        return next(play(steered, grid, run_task(self.run, grid), config, temperature, self.run.seed))

    def setting(self, name: str) -> Any:
        """A setting of the run by its name; None where it has none."""
        return find(self.stored["config"], name)

    def line(self, stage: str, name: str, label: str = "", x: str = "step", dots: bool = False) -> Line | None:
        """The curve of one logged value; None when the stage never logged it."""
        lines = [m for m in self.metrics if m["stage"] == stage and m.get(name) is not None and x in m]
        return Line(label or name, [m[x] for m in lines], [m[name] for m in lines], dots) if lines else None


def pretraining(material: Material) -> str:
    m = material
    known = m.references
    levels = [Level("Bayes-optimal", known.bayes), Level("goal known", known.known)]
    shown = [
        curves(
            [m.line("pretrain", "nll")], "step", "action NLL in nats per action",
            "The base model learns to predict the expert's next action. No one who does not know the goal can get below "
            "the upper dashed line.", levels, y_range=(0, None),
        ),
        curves(
            [m.line("pretrain", "observation_nll")], "step", "next-observation NLL in nats per step",
            "It also predicts where the agent will stand next.", y_range=(0, None),
        ),
    ]  # fmt: skip
    if m.models.grid.colors >= 6:
        found = m.summary.get("probe") or dataclasses.asdict(probe(m.models.base, m.models.grid, seed=m.run.seed))
        tap = m.models.steered.tap.layer if m.models.steered else None
        accuracy = {int(layer): value for layer, value in found["accuracy"].items()}
        bars = figures.probe_bars(accuracy, found["bayes"], found["chance"], tap)
        shown.append(
            figure(bars, "How often a linear read-out of the residual stream names the subgoal that the expert is after, "
                    "which the model is never told.")
        )  # fmt: skip
    return figures_of(
        "A transformer watches an expert walk to coloured cells, two by two, in an order that it must guess. On fresh "
        f"demonstrations its NLL is {known.base:.3f} nats per action; the exact Bayes filter has {known.bayes:.3f}.", shown
    )  # fmt: skip


def discovery(material: Material) -> str:
    m, steered = material, material.models.steered
    if steered is None:
        return ""
    grid, seed = m.models.grid, m.run.seed
    known = m.references
    found = coding(steered, grid, m.episodes, seed)
    warmup = m.setting("warmup_steps")
    event = (warmup, "switch is learned") if warmup else None
    kl, nll = m.line("discover", "kl"), m.line("discover", "nll")
    levels = [
        Level("base alone", known.base), Level("Bayes-optimal", known.bayes), Level("goal known", known.known),
    ]  # fmt: skip
    goals = grid.colors // 2
    unseen = [
        Line(f"{_pair(k)} → {_pair((k + 1) % goals)}", line.x, [rates[k] for rates in line.y], dots=True)  # type: ignore[index]
        for line in [m.line("discover", "unseen")] if line
        for k in range(goals)
    ]  # fmt: skip
    shown = [
        figure(
            figures.raster(found.subgoal, found.switch, found.length),
            "Fresh demonstrations, one per row: bars are the expert's hidden subgoals, black ticks the steps where the "
            "metacontroller adopts a new code; at best a tick stands where the colour changes, and nowhere else.",
        ),
        figure(
            figures.rate_distortion(
                kl.y if kl else [], nll.y if nll else [], (found.kl, found.nll), [levels[0], levels[2]]
            ),
            "How much the codes tell (rate) against how badly actions are predicted (distortion). The diamond is the "
            "finished model on whole demonstrations; the path is that of training batches, many of which begin mid-way.",
        ),
        curves(
            [m.line("discover", "nll", "training"), m.line("discover", "hard_nll", "hard switches", dots=True)],
            "step", "action NLL in nats per action",
            "Codes that carry the subgoal let the frozen base predict actions better than it can alone.",
            [levels[0]], event=event, y_range=(0, None),
        ),
        curves(
            [kl], "step", "KL in nats per episode",
            "What the codes tell about the future of an episode, which the loss charges for.", event=event,
            y_range=(0, None),
        ),
        curves(
            [m.line("discover", "switches", "training"), m.line("discover", "hard_switches", "hard switches", dots=True),
             m.line("discover", "true_switches", "true changes of subgoal", dots=True)],
            "step", "switches per episode",
            "The first code of an episode is not counted.", event=event, y_range=(0, None),
        ),
        curves(
            [m.line("discover", "bimodality", "decided steps"), m.line("discover", "switch_f1", "switch F1", dots=True)],
            "step", "fraction",
            "Decided steps: where the switch is below .1 or above .9. Switch F1: agreement with the true changes of subgoal.",
            event=event, y_range=(-0.03, 1.03),
        ),
        curves(
            unseen, "step", "rate under random codes",
            "How often a random code, held after one subgoal, leads to the one that the demonstrations never show next.",
            [Level("ideal", 1 / goals)], y_range=(0, max(0.3, 1.2 / goals)),
        ),
    ]  # fmt: skip
    return figures_of(
        "The base model is frozen. A small metacontroller learns, without labels, codes that steer it, and when to switch "
        "from one code to the next.", shown
    )  # fmt: skip


def consolidation(material: Material) -> str:
    shown = [
        curves([material.line("consolidate", name)], "step", label, caption, y_range=(0, None))
        for name, label, caption in (
            ("kl", "KL in nats per action", "How far the steered model with its whole context is from the one that has "
             "forgotten what came before the segment."),
            ("switch_loss", "cross-entropy of switches in nats", "How badly it predicts when the forgetful model switches."),
            ("loss", "loss", "Their weighted sum, which is what is minimised."),
        )
    ]  # fmt: skip
    return any(shown) and figures_of(
        "A code should mean the same in every context. The model plays under random codes, with its memory cut at "
        "every switch, and then learns to act like that with its memory whole.", shown
    ) or ""  # fmt: skip


def codes(material: Material) -> str:
    m, steered = material, material.models.steered
    if steered is None:
        return ""
    free, rates = random_codes(steered, m.models.grid, m.episodes, m.run.seed)
    shown, axes = [], plane(free)
    shown.append(figure(
        figures.code_plane(free.code[:DOTS] @ axes, free.reached[:DOTS]),
        "Random codes, each held until the next switch, coloured by the subgoal that the agent then reached; the plane "
        "is the one in which they separate best.",
    ))  # fmt: skip
    if episodes := m.played:
        chosen = policy_codes(m.models.grid, episodes)
        shown.append(figure(
            figures.code_plane(chosen.code[:DOTS] @ axes, chosen.reached[:DOTS]),
            "The same plane with the codes that the trained policy chooses.",
        ))  # fmt: skip
    shown.append(figure(
        figures.transitions(rates),
        "What follows a completed subgoal (row) when the next code is random. Framed: transitions that no demonstration "
        f"contains. Were codes free of context, each subgoal would get {1 / len(rates):.2f}.",
    ))  # fmt: skip
    return figures_of("Without task or reward, random codes show what each of them makes the agent do.", shown)


def reinforcement(material: Material) -> str:
    m = material
    stages = dict.fromkeys(line["stage"] for line in m.metrics if {"episodes", "success"} <= line.keys())
    ordered = sorted(stages, key=lambda stage: [*AGENTS, stage].index(stage))
    shown = [
        curves(
            [m.line(stage, "success", AGENTS.get(stage, stage), x="episodes") for stage in ordered], "episodes", "success",
            "Share of the episodes of each iteration that solved the whole task; nothing else is ever rewarded.",
            percent=True, y_range=(-0.02, 1.02),
        )
    ]  # fmt: skip
    for name, label, caption in (
        ("length", "steps per episode", "An episode ends at success, at a wrong colour, or at the horizon."),
        ("decisions", "decisions per episode", "How many codes the policy chooses in an episode."),
        ("reward_std", "standard deviation of the reward", "At zero all episodes of a batch end alike, and there is "
         "nothing to learn from."),
    ):  # fmt: skip
        line = m.line("reinforce", name, x="episodes")
        shown.append(curves([line], "episodes", label, caption, y_range=(0, None)))
    task = run_task(m.run, m.models.grid)
    return any(shown) and figures_of(
        f"The task is to visit the colours {escape(task)} in this order, with one reward at the very end. Internal RL "
        "chooses a code at each switch and leaves all the rest to the frozen model.", shown
    ) or ""  # fmt: skip


def pictures(material: Material) -> str:
    episodes = material.played
    if episodes is None:
        return ""
    grid = material.models.grid
    found = [player(grid, story, k + 1) for k, story in enumerate(stories(grid, episodes))]
    return (
        "<p>The trained policy at work. A line has the colour of the subgoal that its segment, the steps under one code, "
        "reached; a grey one reached none. Small pictures show the segments one by one, and the colours entered.</p>"
        + "".join(found)
    )
