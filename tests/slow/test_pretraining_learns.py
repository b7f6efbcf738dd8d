"""Pretraining on a small grid comes close to the exact Bayes filter; with shuffled actions it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from internalrl.base import pretrain as stage
from internalrl.base.batches import Batch
from internalrl.domains.grid.world import GridConfig
from internalrl.run.folder import RunFolder
from internalrl.settings.stages import BaseConfig, PretrainConfig

SMALL = PretrainConfig(
    grid=GridConfig(size=5, colors=6, walls=1, horizon=60),
    base=BaseConfig(layers=2, width=64, heads=2, mlp=96),
    steps=150,
    batch_size=64,
)


def train(folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    model = stage.build(SMALL.base, SMALL.grid)
    stage.pretrain(model, SMALL, RunFolder.create(folder, {}, seed=0))
    return stage.evaluate(model, SMALL.grid, episodes=512)


def test_base_comes_close_to_bayes(tmp_path: Path) -> None:
    found = train(tmp_path / "run")
    assert -0.01 < found["bayes_gap_nats"] < 0.35


def test_shuffled_actions_teach_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps on actions that belong to other steps stay near a uniform guess."""
    honest = stage.losses

    def shuffled(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        actions = batch.actions.flatten()[torch.randperm(batch.actions.numel())].view_as(batch.actions)
        return honest(model, Batch(batch.observations, actions, batch.mask, batch.subgoal, batch.boundary))

    monkeypatch.setattr(stage, "losses", shuffled)
    torch.manual_seed(0)
    model = stage.build(SMALL.base, SMALL.grid)
    stage.pretrain(model, SMALL, RunFolder.create(tmp_path / "run", {}, seed=0))
    monkeypatch.setattr(stage, "losses", honest)
    assert stage.evaluate(model, SMALL.grid, episodes=512)["bayes_gap_nats"] > 0.8
