"""Random streams: reproducible, apart from each other, and so nothing is measured on what was trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import islice, product
from typing import Any

import numpy as np
import pytest
import torch

from internalrl.analysis import evaluate, measure, probe
from internalrl.base import batches
from internalrl.base.trajectory import TrajectoryConfig, TrajectoryModel, llama_backbone
from internalrl.controller.steered import SteeredModel
from internalrl.discovery import evaluate as discovery
from internalrl.discovery import train
from internalrl.discovery.grid import GridMaterial
from internalrl.domains.grid import world as domain
from internalrl.domains.grid.world import GridConfig, Layouts
from internalrl.reinforce import train as internal_rl
from internalrl.run.streams import Stream
from internalrl.settings.stages import ConsolidateConfig, DiscoverConfig, EvaluateConfig, ReinforceConfig
from tests.support.tiny import SIZES, WIDTH, widen

GRID = GridConfig(horizon=40)  # of the paper's size: two random layouts are never the same
SEEDS = range(4)
EPISODES = 16  # few enough for every purpose to draw them at once: what is drawn in another way differs anyhow


def test_streams_are_reproducible_and_apart() -> None:
    keys = list(product(Stream, (0, 1, 2, 10**12), (0, 1, 7)))
    for draw in (
        lambda stream, seed, index: float(stream.numpy(seed, index).random()),
        lambda stream, seed, index: float(torch.rand((), dtype=torch.float64, generator=stream.torch(seed, index))),
    ):
        first = [draw(*key) for key in keys]
        assert first == [draw(*key) for key in keys]
        assert len(set(first)) == len(keys)


def test_a_stream_is_not_that_of_its_bare_seed() -> None:
    """Where a library or a user seeds a generator with the run's seed itself."""
    assert all(stream.numpy(0).random() != np.random.default_rng(0).random() for stream in Stream)
    assert all(stream.torch(0).initial_seed() != 0 for stream in Stream)


@pytest.fixture
def steered() -> SteeredModel:
    backbone = llama_backbone(layers=2, width=WIDTH, heads=2, mlp=12)
    config = TrajectoryConfig(encoder="one-hot", environment=asdict(GRID), backbone=backbone)
    base = TrajectoryModel(config)
    widen(base, 0.4, seed=0)
    return SteeredModel(base, SIZES)


PURPOSES: dict[str, Callable[[SteeredModel, int], Any]] = {
    "pretraining": lambda _, seed: list(islice(batches.demonstration_batches(GRID, 2, seed), 8 * batches.BUCKET)),
    "discovery": lambda model, seed: GridMaterial(GRID, seed).corpus(
        model, DiscoverConfig(batch_size=2, batches=8 * batches.BUCKET)
    ),
    "slow features": lambda model, seed: train.find_slow_features(model, GridMaterial(GRID, seed), DiscoverConfig()),
    "consolidation": lambda model, seed: GridMaterial(GRID, seed).lessons(model, ConsolidateConfig(episodes=EPISODES)),
    "reinforcement": lambda model, seed: [
        internal_rl.grid_environments(model, ReinforceConfig(batch_size=EPISODES), seed)(k) for k in range(8)
    ],
    "held out": lambda _, seed: batches.held_out(GRID, EPISODES, seed),
    "probe": lambda _, seed: probe._demonstrations(GRID, EPISODES, seed),
    "report": lambda _, seed: measure.shown_demonstrations(GRID, EPISODES, seed),
    "pass rates": lambda model, seed: discovery.pass_rates(model, GRID, EPISODES, seed),
    "success": lambda model, seed: list(
        evaluate.play(model, GRID, "0", EvaluateConfig(episodes=EPISODES, controller="prior"), 0.0, seed)
    ),
}


def test_no_purpose_and_no_seed_meets_the_layouts_of_another(
    steered: SteeredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SLOW_EPISODES", EPISODES)
    drawn: list[tuple[str, bytes]] = []
    sample = domain.sample_layouts

    def recording(config: GridConfig, count: int, rng: np.random.Generator) -> Layouts:
        layouts = sample(config, count, rng)
        drawn.extend((purpose, contents.tobytes()) for contents in layouts.contents)
        return layouts

    for module in (domain, discovery, internal_rl, evaluate):
        monkeypatch.setattr(module, "sample_layouts", recording)
    for seed, (purpose, draw) in product(SEEDS, PURPOSES.items()):
        before = len(drawn)
        draw(steered, seed)
        assert len(drawn) >= before + EPISODES, f"{purpose} draws layouts in a way that this test does not see"
    owner: dict[bytes, str] = {}
    for purpose, layout in drawn:
        assert layout not in owner, f"{purpose} meets a layout of {owner[layout]}"
        owner[layout] = purpose
