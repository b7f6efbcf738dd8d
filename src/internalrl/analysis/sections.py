"""The report's sections on the three stages, each a function of a run's material that returns HTML.

An empty text means that the run has nothing to show there, and the section is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from typing import Any

from internalrl.analysis import figures
from internalrl.analysis.episodes import player, stories
from internalrl.analysis.evaluate import Episodes, play
from internalrl.analysis.figures import COLORS, Level, Line, key_of, pair
from internalrl.analysis.markup import curves, figure, gallery
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
        found = m.summary.get("probe") or asdict(probe(base, m.models.grid, seed=m.run.seed))
        accuracy = {int(layer): value for layer, value in found["accuracy"].items()}
        tap = m.models.steered.tap.layer if m.models.steered else None
        shown.append(
            figure(
                figures.probe_bars(accuracy, found["bayes"], found["chance"], tap),
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
    warmup = m.setting("warmup_steps")
    options: dict[str, Any] = {"event": (warmup, "switch is learned") if warmup else None}
    shown = [
        figure(
            figures.raster(found.subgoal, found.switch, found.length),
            "Fresh demonstrations, one per row. Bars are the expert's hidden subgoals, ticks the steps where the "
            "metacontroller adopts a new code: ideally they stand where the colour changes, and nowhere else.",
            wide=True,
        ),
        figure(
            figures.rate_distortion(*path, (found.kl, found.nll), [alone, informed]),
            "What the codes tell (rate) against how badly actions are predicted (distortion). The diamond is the "
            "finished model on whole demonstrations, the path that of training batches, some of which begin mid-way.",
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
            "switches per episode, the first code not counted",
            "How often the metacontroller changes its code, and how often the expert changes its subgoal.",
            y_range=(0, None),
            **options,
        ),
        curves(
            [
                m.line("discover", "bimodality", "decided steps"),
                m.line("discover", "switch_f1", "switch F1", dots=True),
            ],
            "step",
            "fraction",
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
    return gallery(
        "A code should mean the same in every context. The model plays under random codes with its memory cut at "
        "every switch, and then learns to act like that with its memory whole.",
        [
            curves(
                [
                    m.line("consolidate", "kl", "KL of its actions from those of the forgetful model"),
                    m.line("consolidate", "switch_loss", "cross-entropy of the forgetful model's switches"),
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
            f"demonstration contains; if codes did not depend on context, they too would occur at {1 / len(rates):.2f}.",
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
    success = curves(
        [m.line(stage, "success", AGENTS.get(stage, stage), x="episodes") for stage in ordered],
        "episodes",
        "success",
        "Share of an iteration's episodes that solved the whole task; nothing less is rewarded.",
        percent=True,
        y_range=(-0.02, 1.02),
        wide=True,
    )
    return gallery(
        f"The task is to visit the colours {escape(run_task(m.run, m.models.grid))} in this order, with one reward at "
        "the very end. Internal RL chooses a code at each switch and leaves the rest to the frozen model.",
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
        "colours entered.</p>" + key_of(key) + "".join(players)
    )
