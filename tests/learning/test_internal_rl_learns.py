"""Internal RL's loop and objective on a problem with a known answer: only one region of codes is ever rewarded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from internalrl.internal_rl.agents import Decisions
from internalrl.internal_rl.train import reinforce
from internalrl.metacontroller.policy import Policy, PolicyActor
from internalrl.metacontroller.rollout import Rollout
from internalrl.runlog import RunFolder
from internalrl.stages import ReinforceConfig

EPISODES, WIDTH, N_Z = 512, 8, 4
SEGMENTS = 3
LEAST_RARE = 3.0


class TwoRightCodes:
    """Each episode has three segments; it succeeds if the first code points one way and the last one the other, both
    `least` far."""

    def __init__(self, shuffle_reward: bool, least: float):
        self.module = Policy(WIDTH, N_Z, hidden=16, initial_std=1.2)
        self.shuffle_reward, self.least = shuffle_reward, least

    def play(self, environment: Any, generator: torch.Generator) -> tuple[Rollout, Decisions]:
        actor, rows = PolicyActor(self.module, EPISODES, generator), torch.arange(EPISODES)
        codes = [actor(rows, torch.eye(WIDTH)[segment].expand(EPISODES, -1)) for segment in range(SEGMENTS)]
        reward = ((codes[0][:, 0] > self.least) & (codes[-1][:, 0] < -self.least)).float()
        if self.shuffle_reward:
            reward = reward[torch.randperm(EPISODES, generator=generator)]
        nothing = torch.zeros(EPISODES, SEGMENTS)
        played = Rollout(reward, torch.full((EPISODES,), SEGMENTS), *[nothing] * 6)
        return played, Decisions(*actor.segments())

    def log_prob(self, decisions: Decisions) -> Tensor:
        return self.module.log_prob(decisions.seen, decisions.chosen)


def train(folder: Path, shuffle_reward: bool = False, least: float = 1.5, replay: int = 0) -> float:
    torch.manual_seed(0)
    run = RunFolder.create(folder, {}, seed=0)
    config = ReinforceConfig(episodes=60 * EPISODES, batch_size=EPISODES, replay=replay)
    success: float = reinforce(TwoRightCodes(shuffle_reward, least), lambda _: np.zeros(0), config, run)["success"]
    return success


def test_rare_success_is_amplified(tmp_path: Path) -> None:
    """A first success rate near 1 % grows past 90 %."""
    assert train(tmp_path / "run") > 0.9


def test_a_single_success_is_not_lost_with_replay(tmp_path: Path) -> None:
    """A success rate near 4e-5: one or two in the whole budget."""
    assert train(tmp_path / "once", least=LEAST_RARE) < 0.1
    assert train(tmp_path / "again", least=LEAST_RARE, replay=16) > 0.9


@pytest.mark.parametrize("seed", [0])
def test_shuffled_reward_teaches_nothing(tmp_path: Path, seed: int) -> None:
    assert train(tmp_path / "run", shuffle_reward=True) < 0.2
