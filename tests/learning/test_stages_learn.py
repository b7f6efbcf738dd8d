"""All three stages on a smaller grid: discovery aligns, internal RL learns a task of unseen transitions, and what is
broken on purpose does not pass for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from internalrl.base.pretrain import build, pretrain
from internalrl.configio import from_dict, load_yaml
from internalrl.discovery.consolidate import consolidate
from internalrl.discovery.train import discover, evaluate
from internalrl.internal_rl import train
from internalrl.metacontroller.steered import SteeredModel
from internalrl.runlog import RunFolder
from internalrl.stages import DemoConfig

SEED = 0
CONFIG: DemoConfig = from_dict(DemoConfig, load_yaml(Path(__file__).parents[2] / "docs" / "small-grid.yaml"))
LEAST_F1, LEAST_SUCCESS = 0.6, 0.15

pytestmark = [pytest.mark.learning, pytest.mark.xdist_group("stages")]


@dataclass
class Learned:
    """What stages 1 and 2 left: the steered model, and how well its switches align."""

    steered: SteeredModel
    switch_f1: float


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "small", {}, seed=SEED)
    torch.manual_seed(SEED)
    base = build(CONFIG.pretrain.base, CONFIG.pretrain.grid)
    pretrain(base, CONFIG.pretrain, run)
    steered = SteeredModel.from_base(base, CONFIG.discover.metacontroller)
    discover(steered, CONFIG.discover, run)
    consolidate(steered, CONFIG.discover.consolidate, run)
    return Learned(steered, evaluate(steered, SEED)["switch_f1"])


def play(steered: SteeredModel, folder: Path, **changes: Any) -> float:
    """Success of internal RL after its budget."""
    config = from_dict(type(CONFIG.reinforce), changes, base=CONFIG.reinforce)
    torch.manual_seed(SEED)
    agent = train.make_agent(steered, config)
    run = RunFolder.create(folder, {}, seed=SEED)
    success: float = train.reinforce(agent, train.grid_environments(steered, config, SEED), config, run)["success"]
    return success


def test_discovery_aligns_without_labels(learned: Learned) -> None:
    assert learned.switch_f1 > LEAST_F1


def test_internal_rl_learns_what_token_level_rl_does_not(learned: Learned, tmp_path: Path) -> None:
    """The task is made of transitions that no demonstration shows; both play the same number of episodes."""
    assert play(copy.deepcopy(learned.steered), tmp_path / "internal") > LEAST_SUCCESS
    raw = play(copy.deepcopy(learned.steered), tmp_path / "raw", agent="raw-action", controller=False)
    assert raw < LEAST_SUCCESS / 3


def zero_controller(steered: SteeredModel) -> None:
    torch.nn.init.zeros_(steered.metacontroller.up)


def open_gate(steered: SteeredModel) -> None:
    torch.nn.init.zeros_(steered.metacontroller.switch_head.weight)
    torch.nn.init.constant_(steered.metacontroller.switch_head.bias, 9.0)


@pytest.mark.parametrize("sabotage", [zero_controller, open_gate])
def test_a_broken_metacontroller_fails(
    sabotage: Callable[[SteeredModel], None], learned: Learned, tmp_path: Path
) -> None:
    steered = copy.deepcopy(learned.steered)
    sabotage(steered)
    assert play(steered, tmp_path / "run") < LEAST_SUCCESS


def test_shuffled_rewards_fail(learned: Learned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = train.advantages
    monkeypatch.setattr(train, "advantages", lambda reward: honest(reward[torch.randperm(len(reward))]))
    assert play(copy.deepcopy(learned.steered), tmp_path / "run") < LEAST_SUCCESS
