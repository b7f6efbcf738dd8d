"""Settings of the two demos: those of the stages, in part with values of the demo's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from internalrl.settings.options import PRESETS
from internalrl.settings.ranges import Checked, Range
from internalrl.settings.schema import from_dict
from internalrl.settings.stages import (
    CompletionConfig,
    DiscoverConfig,
    PretrainConfig,
    PretrainTextConfig,
    ReinforceConfig,
)


@dataclass(frozen=True)
class DemoConfig:
    """All three stages on the grid world; `discover.base` and `reinforce.discovered` are the demo's own."""

    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Stage 1."""
    discover: DiscoverConfig = field(default_factory=DiscoverConfig)
    """Stages 2 and 2b."""
    reinforce: ReinforceConfig = field(default_factory=lambda: ReinforceConfig(episodes=150_000))
    """Stage 3; its episodes include those of consolidation. Fewer than by default, to end within 25 minutes."""


def _code_discovery() -> DiscoverConfig:
    return from_dict(DiscoverConfig, PRESETS["text"]["discover"])


def _code_reinforcement() -> CompletionConfig:
    values = {"episodes": 150_000, "batch_size": 1024, "max_completion_length": 160, **PRESETS["text"]["reinforce"]}
    return from_dict(CompletionConfig, values)


def _code_baseline() -> CompletionConfig:
    return CompletionConfig(
        agent="raw-action", batch_size=1024, max_completion_length=160, lr=1e-3, epochs=1, temperature=1.0,
        decision_cost=0.06,
    )  # fmt: skip


@dataclass(frozen=True)
class CodeDemoConfig(Checked):
    """All three stages on programs. `discover.base`, `.data` and `.domain`, in both kinds of RL `agent`,
    `num_generations` and `reward_weights`, and `raw_action.episodes` are the demo's own."""

    idioms: Annotated[int, Range(2, 6)] = 4
    """Idioms of the task, 2 to 6; no program of the corpus shows a transition between them."""
    programs: Annotated[int, Range(500)] = 6000
    """Programs that codes are found in; a tenth of them, 256 at most, is held out."""
    pretrain: PretrainTextConfig = field(default_factory=PretrainTextConfig)
    """Stage 1."""
    discover: DiscoverConfig = field(default_factory=_code_discovery)
    """Stages 2 and 2b, with the preset `text`."""
    reinforce: CompletionConfig = field(default_factory=_code_reinforcement)
    """Stage 3, with the preset `text`; an episode is a program."""
    raw_action: CompletionConfig = field(default_factory=_code_baseline)
    """Token-level RL on the bare base, with as many programs as stage 3 took."""
