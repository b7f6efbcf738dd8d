"""Where cropped episodes begin: on plain cells, where the batches' maker allows it, a step after learned switches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from internalrl.base.batches import BUCKET, Batch, demonstration_batches, held_out
from internalrl.discovery import grid
from internalrl.discovery.objective import Episodes
from internalrl.settings.stages import DiscoverConfig
from tests.support.finished import SMALL, small_base, small_steered

SIZE = 16
Openings = Callable[[Batch], np.ndarray]


def cells(observations: Tensor) -> Tensor:
    """(…, cells, channels): the colours and walls in every cell, and at last the agent."""
    return observations.unflatten(-1, (SMALL.cells, SMALL.channels))


def plain(observations: Tensor) -> Tensor:
    """(…): whether the agent stands on no colour."""
    return ~(cells(observations)[..., : SMALL.colors] * cells(observations)[..., -1:]).flatten(-2).any(-1)


def on_some_cells(batch: Batch) -> np.ndarray:
    """Openings that can be seen, wherever an episode is cut; a whole one's first step is none."""
    allowed = cells(batch.observations)[..., -1].argmax(-1) % 4 == 0
    allowed[:, 0] = False
    return allowed.numpy()


def draw(crop: float, openings: Openings | None = None) -> dict[bytes, Batch]:
    """The episodes that are drawn together, each by itself and without padding, by their layouts."""
    episodes = {}
    for batch in islice(demonstration_batches(SMALL, SIZE, 0, crop=crop, openings=openings), BUCKET):
        for row in range(SIZE):
            kept = batch.mask[row]
            episode = Batch(*(values[row, kept][None] for values in vars(batch).values()))
            episodes[cells(episode.observations)[0, 0, :, :-1].numpy().tobytes()] = episode
    assert len(episodes) == SIZE * BUCKET
    return episodes


def starts(crop: float, openings: Openings | None = None) -> list[tuple[Batch, int]]:
    """Whole episodes, and the steps at which they were cut to begin."""
    whole, found = draw(0), []
    for layout, episode in draw(crop, openings).items():
        start = whole[layout].actions.shape[1] - episode.actions.shape[1]
        assert torch.equal(whole[layout].observations[:, start:], episode.observations)
        assert torch.equal(whole[layout].actions[:, start:], episode.actions)
        found.append((whole[layout], start))
    return found


def test_crops_begin_at_any_plain_cell() -> None:
    found = starts(1.0)
    assert all(plain(episode.observations)[0, start] for episode, start in found)
    share = [start / episode.actions.shape[1] for episode, start in found]
    assert np.quantile(share, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.15)


def test_crops_begin_only_at_openings() -> None:
    """On plain cells, any one of those allowed; an episode without one stays whole."""
    chosen, closed = [], 0
    for episode, start in starts(1.0, on_some_cells):
        allowed = (plain(episode.observations)[0].numpy() & on_some_cells(episode)[0]).nonzero()[0].tolist()
        assert start in allowed or (start == 0 and not allowed)
        closed += not allowed
        chosen += [allowed.index(start) / (len(allowed) - 1)] if len(allowed) > 1 else []
    assert closed
    assert set(chosen) > {0, 1}
    assert np.mean(chosen) == pytest.approx(0.5, abs=0.1)


def test_without_openings_or_crops_episodes_stay_whole() -> None:
    assert not any(start for _, start in starts(1.0, lambda batch: np.zeros(batch.actions.shape, bool)))
    assert not any(start for _, start in starts(0.0, on_some_cells))
    cut, possible = ([start > 0 for _, start in starts(crop, on_some_cells)] for crop in (0.7, 1.0))
    assert sum(cut) / sum(possible) == pytest.approx(0.7, abs=0.12)


def test_discovery_opens_crops_a_step_after_learned_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step with which an episode begins anyhow is no such switch; and at first there are no openings at all."""
    steered = small_steered(small_base())
    given: list[Any] = []

    def recording(*args: Any, openings: Openings | None, **options: Any) -> Any:
        given.append(openings)
        return demonstration_batches(*args, openings=openings, **options)

    monkeypatch.setattr(grid, "demonstration_batches", recording)
    config, material = DiscoverConfig(batch_size=4, batches=2), grid.GridMaterial(SMALL, seed=0)
    random = material.corpus(steered, config)
    learned = material.corpus(steered, config, steered.metacontroller)
    unasked, openings = given
    assert unasked is None
    assert [len(episodes.mask) for episodes in (*random, *learned)] == [4] * 4
    assert any(not torch.equal(a.mask.sum(1), b.mask.sum(1)) for a, b in zip(random, learned, strict=True))
    batch = held_out(SMALL, SIZE, seed=0)
    episodes = Episodes.of(steered, batch)
    switch = steered.metacontroller.parse(episodes.residual, episodes.slow, batch.mask)[0].switch > 0.5
    assert 0.1 < switch[:, 1:].float().mean() < 0.9
    expected = [[t > 1 and bool(row[t - 1]) for t in range(len(row))] for row in switch]
    assert openings(batch).tolist() == expected
