"""The report of runs on any texts: its headline and its own sections."""

from __future__ import annotations

from internalrl.analysis.report import sections
from internalrl.analysis.report.drawing import COLORS
from internalrl.analysis.report.figures import curves
from internalrl.analysis.report.formats import decimals, duration
from internalrl.analysis.report.page import Passage, Passages, Section
from internalrl.analysis.report.sections import Result
from internalrl.analysis.report.texts import Source, TextMaterial, Written

KINDS: dict[Source, tuple[str, str]] = {
    "off": ("The bare model", "Before: the base alone, its tokens sampled at temperature 1."),
    "prior": ("Random codes", "Before: codes from N(0, I), and tokens at the temperature of internal RL."),
    "policy": ("The trained policy", "After: the policy chooses the codes; the base is the same."),
}
"""Who chooses the codes, what it is called, and what is said of it."""


def discovery(m: TextMaterial) -> Section:
    """Stage 2 step by step."""
    return Section("discover", "Stage 2: discovery", sections.FROZEN, sections.progress(m))


def consolidation(m: TextMaterial) -> Section:
    """Stage 2b: rehearsal on spliced texts."""
    return sections.consolidation(
        m,
        "A code should mean the same in every context. Texts are cut at the learned switches and spliced anew, and the "
        "metacontroller learns to write what comes of it.",
    )


def reinforcement(m: TextMaterial) -> Section:
    """Stage 3: rewards against completions, and how the policy gets there."""
    names = sorted({name for line in m.metrics for name in line if name.startswith("rewards/")})
    means = [name for name in names if name.endswith("/mean")]
    rewards = [m.line("reinforce", name, name.split("/")[1], x="episodes") for name in means]
    return Section(
        "reinforce",
        "Stage 3: internal RL",
        "The task is what the run's reward functions ask for. Internal RL chooses a code at each switch and leaves the "
        "rest to the frozen model.",
        [
            curves(
                [m.line("reinforce", "reward", "weighted sum", x="episodes"), *rewards],
                "reward per text",
                "What completions are worth, in the mean over an iteration's batch.",
                x_label="texts",
                y_range=(None, None),
                wide=True,
            ),
            sections.over_episodes(m, "completions/mean_length", "tokens per text", "How long completions are."),
            sections.over_episodes(
                m, "decisions", "decisions per text", "How many codes the policy chooses in a completion."
            ),
            sections.over_episodes(
                m,
                "reward_std",
                "standard deviation of the reward",
                "Among completions of the same prompt; at zero there is nothing to learn from.",
            ),
        ],
    )


def texts(m: TextMaterial) -> Section:
    """What is written before and after, by segment."""
    return Section(
        "texts",
        "Before and after",
        "The first prompts, completed. A segment, what was written under one code, has a colour of its own.",
        parts=[Passages(*KINDS[source], [*map(_passage, written)]) for source, written in m.written.items() if written],
    )


def _passage(written: Written) -> Passage:
    """A prompt and its completion, whose segments differ in colour from their neighbours."""
    pieces = [
        (text, COLORS[number % len(COLORS)], f"segment {number + 1}") for number, text in enumerate(written.pieces)
    ]
    return written.prompt, pieces, ""


HEADLINE: tuple[Result, ...] = (
    ("success", "reward", "mean of the last iterations", decimals(3)),
    ("hard_nll", "nats per token", "of held-out texts under the codes that discovery proposes", decimals(3)),
    ("hard_switches", "switches per text", "after the first", decimals(1)),
    ("episodes", "texts", "written and judged by internal RL", "{:,.0f}".format),
    ("seconds", "computing time", "", duration),
)

SECTIONS = (discovery, consolidation, reinforcement, texts)
