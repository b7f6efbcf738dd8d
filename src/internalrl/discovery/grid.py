"""The grid's demonstrations as material of stage 2: cropped, cut at switches, and played by the forgetful teacher."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from internalrl.base.batches import Batch, demonstration_batches, held_out
from internalrl.controller.metacontroller import Metacontroller
from internalrl.controller.steered import SteeredModel
from internalrl.discovery.consolidate import Lesson
from internalrl.discovery.evaluate import alignment, free_play, pass_rates
from internalrl.discovery.objective import Episodes
from internalrl.discovery.rehearse import Rehearsal
from internalrl.domains.grid.world import GridConfig, observe
from internalrl.run.streams import Stream
from internalrl.settings.stages import ConsolidateConfig, DiscoverConfig, RehearseConfig

TOGETHER = 1024  # episodes played at once: few enough for the cache of a core


class GridMaterial:
    """Demonstrations of the pretraining tasks of `grid`, fresh for every purpose and `seed`."""

    def __init__(self, grid: GridConfig, seed: int):
        self.grid, self.seed = grid, seed

    def sample(self, count: int) -> Batch:
        return held_out(self.grid, count, self.seed, Stream.SLOW)

    def corpus(
        self, steered: SteeredModel, config: DiscoverConfig, segmenter: Metacontroller | None = None
    ) -> list[Episodes]:
        """The frozen lower half's residuals are computed once."""

        @torch.no_grad()
        def openings(batch: Batch) -> np.ndarray:
            assert segmenter is not None
            episodes = Episodes.of(steered, batch)
            segments, _ = segmenter.parse(episodes.residual, episodes.slow, batch.mask)
            return F.pad(segments.switch[:, 1:-1] > 0.5, (2, 0)).numpy()  # the step after a switch

        batches = demonstration_batches(
            self.grid,
            config.batch_size,
            self.seed,
            crop=config.crop,
            stream=Stream.DISCOVER,
            openings=openings if segmenter is not None else None,
        )
        return [Episodes.of(steered, batch) for batch in islice(batches, config.batches)]

    def rehearsals(self, steered: SteeredModel, config: RehearseConfig, segmenter: Metacontroller) -> list[Rehearsal]:
        batches = demonstration_batches(self.grid, config.batch_size, self.seed, stream=Stream.REHEARSE)
        return [Rehearsal.cut(steered, batch, segmenter) for batch in islice(batches, config.batches)]

    def lessons(self, steered: SteeredModel, config: ConsolidateConfig) -> list[Lesson]:
        """What the forgetful teacher does with random codes: no task, no reward, no end before the horizon."""
        lessons = []
        for first in range(0, config.episodes, TOGETHER):
            count = min(TOGETHER, config.episodes - first)
            play = free_play(steered, self.grid, count, self.seed, forget=True, stream=Stream.LESSONS, index=first)
            r = play.rollout
            for part in torch.arange(count).split(config.batch_size):
                observations = torch.from_numpy(observe(self.grid, play.contents[part], play.positions[part]))
                residual = steered.residual(observations)
                lessons.append(Lesson(residual, r.code[part], r.switch[part], r.logits[part], r.mask[part]))
        return lessons

    def measure(self, steered: SteeredModel, thorough: bool = True) -> dict[str, Any]:
        """Alignment on fresh demonstrations and the pass rates of random codes, which stand by themselves if asked
        for in full."""
        if not thorough:
            unseen = held_out(self.grid, 256, self.seed)
            return alignment(steered, unseen) | pass_rates(steered, self.grid, 64, self.seed)
        whole = held_out(self.grid, 1024, self.seed)
        return {**alignment(steered, whole), "pass_rates": pass_rates(steered, self.grid, 512, self.seed)}
