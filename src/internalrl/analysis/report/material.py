"""What the report is made of: a run's folder read, and what several of its sections need, measured once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from internalrl.analysis.evaluate import Episodes, play
from internalrl.analysis.measure import Coding, References, coding, references, shown_demonstrations
from internalrl.analysis.report.figures import Line, pair
from internalrl.analysis.report.runs import Models, find, run_task
from internalrl.base.batches import to_batch
from internalrl.controller.steered import SteeredModel
from internalrl.run.folder import RunFolder
from internalrl.settings.stages import EvaluateConfig


@dataclass(frozen=True)
class Words:
    """What a domain calls things; those that are counted get an s. The last four are of those that know subgoals."""

    episode: str
    action: str
    step: str
    raw: str
    subgoal: str = ""
    demonstrations: str = ""
    truth: str = ""
    named: str = ""
    """How a subgoal is named, where that has to be said."""


@dataclass(frozen=True)
class Material(ABC):
    """All that sections are made of, whatever the domain; what several of them need is measured once."""

    run: RunFolder
    stored: Mapping[str, Any]
    summary: Mapping[str, Any]
    episodes: int

    words: ClassVar[Words]
    lead: ClassVar[str]

    @property
    @abstractmethod
    def steered(self) -> SteeredModel | None:
        """The run's steered model; None before there is an adapter."""

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """All logged lines."""
        return self.run.metrics()

    def setting(self, name: str) -> Any:
        """A setting of the run by its name; None where it has none."""
        return find(self.stored["config"], name)

    def line(self, stage: str, name: str, label: str = "", x: str = "step", dots: bool = False) -> Line | None:
        """The curve of one logged value; None when the stage never logged it."""
        lines = [m for m in self.metrics if m["stage"] == stage and m.get(name) is not None and x in m]
        return Line(label or name, [m[x] for m in lines], [m[name] for m in lines], dots) if lines else None


@dataclass(frozen=True)
class KnownMaterial(Material):
    """Of a domain whose subgoals are known, to the report alone."""

    @property
    @abstractmethod
    def references(self) -> References:
        """The base held against what can be known."""

    @property
    @abstractmethod
    def coding(self) -> Coding:
        """What switches and codes make of demonstrations."""

    @property
    @abstractmethod
    def task(self) -> str:
        """What stage 3 is about."""

    @abstractmethod
    def name(self, subgoal: int) -> str:
        """What a subgoal is called."""


@dataclass(frozen=True)
class GridMaterial(KnownMaterial):
    """Of a run on the grid world."""

    models: Models

    words = Words(
        episode="episode",
        action="action",
        step="step",
        subgoal="subgoal",
        demonstrations="demonstrations",
        truth="the expert's hidden subgoals",
        raw="raw actions",
        named=" (its two colours)",
    )
    lead = (
        "A sequence model learned to imitate an expert whose goals it was never told. What it worked out about them "
        "became actions of a higher order, and reinforcement learning was done on those."
    )

    @property
    def steered(self) -> SteeredModel | None:
        return self.models.steered

    @cached_property
    def references(self) -> References:
        return references(self.models.base, self.models.grid, self.episodes, self.run.seed)

    @cached_property
    def coding(self) -> Coding:
        assert self.steered is not None
        demonstrations = shown_demonstrations(self.models.grid, self.episodes, self.run.seed)
        return coding(self.steered, to_batch(self.models.grid, demonstrations))

    @property
    def task(self) -> str:
        return (
            f"The task is to visit the colours {run_task(self.run, self.models.grid)} in this order, with one "
            "reward at the very end."
        )

    def name(self, subgoal: int) -> str:
        return pair(subgoal)

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
