"""What the report is made of: a run's folder read, and what several of its sections need, measured once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from internalrl.analysis.evaluate import Episodes, play
from internalrl.analysis.figures import Line
from internalrl.analysis.measure import References, references
from internalrl.analysis.runs import Models, find, run_task
from internalrl.runlog import RunFolder
from internalrl.stages import EvaluateConfig


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
        """All logged lines."""
        return self.run.metrics()

    @cached_property
    def references(self) -> References:
        """The base held against what can be known."""
        return references(self.models.base, self.models.grid, self.episodes, self.run.seed)

    @cached_property
    def played(self) -> Episodes | None:
        """Episodes of the trained policy; None without one."""
        steered, grid = self.models.steered, self.models.grid
        if steered is None or steered.policy is None:
            return None
        config = EvaluateConfig(episodes=256, forget=self.setting("forget"))
        temperature = self.setting("temperature") or 0.0
        task, limits = run_task(self.run, grid), self.models.limits
        return next(play(steered, grid, task, config, temperature, self.run.seed, limits))

    def setting(self, name: str) -> Any:
        """A setting of the run by its name; None where it has none."""
        return find(self.stored["config"], name)

    def line(self, stage: str, name: str, label: str = "", x: str = "step", dots: bool = False) -> Line | None:
        """The curve of one logged value; None when the stage never logged it."""
        lines = [m for m in self.metrics if m["stage"] == stage and m.get(name) is not None and x in m]
        return Line(label or name, [m[x] for m in lines], [m[name] for m in lines], dots) if lines else None
