"""All three stages on a smaller grid: discovery aligns, internal RL learns a task of unseen transitions, and what is
broken on purpose does not pass for it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from internalrl.base.pretrain import build, pretrain
from internalrl.controller.steered import SteeredModel
from internalrl.discovery.consolidate import consolidate
from internalrl.discovery.grid import GridMaterial
from internalrl.discovery.train import discover
from internalrl.reinforce import train
from internalrl.run.folder import RunFolder
from internalrl.settings.demos import DemoConfig
from internalrl.settings.schema import from_dict, load_yaml

SEED = 0
CONFIG: DemoConfig = from_dict(DemoConfig, load_yaml(Path(__file__).parents[2] / "docs" / "small-grid.yaml"))
LEAST_F1, LEAST_SUCCESS = 0.6, 0.15

pytestmark = pytest.mark.learning


@dataclass
class Learned:
    """What stages 1 and 2 left: the steered model, and how well its switches align."""

    steered: SteeredModel
    switch_f1: float


def learn(folder: Path) -> Learned:
    """Stages 1 and 2."""
    run = RunFolder.create(folder, {}, seed=SEED)
    torch.manual_seed(SEED)
    base = build(CONFIG.pretrain.base, CONFIG.pretrain.grid)
    pretrain(base, CONFIG.pretrain, run)
    steered = SteeredModel.from_base(base, CONFIG.discover.metacontroller)
    material = GridMaterial(CONFIG.pretrain.grid, SEED)
    discover(steered, material, CONFIG.discover, run)
    consolidate(steered, material, CONFIG.discover.consolidate, run)
    return Learned(steered, material.measure(steered)["switch_f1"])


def play(steered: SteeredModel, folder: Path, **changes: Any) -> float:
    """Success of internal RL after its budget."""
    config = from_dict(type(CONFIG.reinforce), changes, base=CONFIG.reinforce)
    torch.manual_seed(SEED)
    agent = train.make_agent(steered, config)
    run = RunFolder.create(folder, {}, seed=SEED)
    success: float = train.reinforce(agent, train.grid_environments(steered, config, SEED), config, run)["success"]
    return success


def zero_controller(steered: SteeredModel) -> None:
    torch.nn.init.zeros_(steered.metacontroller.up)


def open_gate(steered: SteeredModel) -> None:
    torch.nn.init.zeros_(steered.metacontroller.switch_head.weight)
    torch.nn.init.constant_(steered.metacontroller.switch_head.bias, 9.0)


def test_stages_learn_and_sabotage_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task is made of transitions that no demonstration shows; all play the same number of episodes. One test,
    so that the first two stages are trained once."""
    torch.set_num_threads(1)  # as in `make test`: sums in another order, and so short a training ends elsewhere
    learned = learn(tmp_path / "learn")
    assert learned.switch_f1 > LEAST_F1
    assert play(copy.deepcopy(learned.steered), tmp_path / "internal") > LEAST_SUCCESS
    raw = play(copy.deepcopy(learned.steered), tmp_path / "raw", agent="raw-action", controller=False)
    assert raw < LEAST_SUCCESS / 3
    for sabotage in (zero_controller, open_gate):
        steered = copy.deepcopy(learned.steered)
        sabotage(steered)
        assert play(steered, tmp_path / sabotage.__name__) < LEAST_SUCCESS
    honest = train.advantages
    monkeypatch.setattr(
        train, "advantages", lambda reward, *groups: honest(reward[torch.randperm(len(reward))], *groups)
    )
    assert play(copy.deepcopy(learned.steered), tmp_path / "shuffled") < LEAST_SUCCESS
