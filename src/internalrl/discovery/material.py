"""What stage 2 learns from: the episodes of a domain, in each of the forms that it needs them in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from internalrl.base.batches import Batch
    from internalrl.controller.metacontroller import Metacontroller
    from internalrl.controller.steered import SteeredModel
    from internalrl.discovery.consolidate import Lesson
    from internalrl.discovery.objective import Episodes
    from internalrl.discovery.rehearse import Rehearsal
    from internalrl.settings.stages import ConsolidateConfig, DiscoverConfig, RehearseConfig


class Material(Protocol):
    """The grid's demonstrations, or a corpus of texts. What comes of a method depends on arguments and seed alone."""

    def sample(self, count: int) -> Batch:
        """Whole episodes that the encoder's features are found on."""

    def corpus(
        self, steered: SteeredModel, config: DiscoverConfig, segmenter: Metacontroller | None = None
    ) -> list[Episodes]:
        """Batches for discovery; with a `segmenter`, cropped episodes begin after its hard switches."""

    def rehearsals(self, steered: SteeredModel, config: RehearseConfig, segmenter: Metacontroller) -> list[Rehearsal]:
        """Batches for rehearsal: their context is broken at the hard switches of `segmenter`."""

    def lessons(self, steered: SteeredModel, config: ConsolidateConfig) -> list[Lesson]:
        """Batches for distillation: what the forgetful teacher did."""

    def measure(self, steered: SteeredModel, thorough: bool = True) -> dict[str, Any]:
        """What was found, held against the truth where it is known; quickly, or thoroughly."""
