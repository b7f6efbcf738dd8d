"""Internal RL's loop and objective on a problem with a known answer: only one region of codes is ever rewarded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from internalrl.controller.policy import Policy, PolicyActor
from internalrl.players.stepwise import Rollout
from internalrl.reinforce.agents import Decisions
from internalrl.reinforce.train import Outcome, reinforce
from internalrl.run.folder import RunFolder
from internalrl.settings.stages import ReinforceConfig

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


DIGITS, LONGEST = 7, 9
SECRET = (3, 0, 5, 1)


class Lock:
    """A code opens the way to one of seven digits, or ends the episode; only one number of four digits is rewarded.

    Of the regions of codes, those that are nearest to one of eight points, all are about as likely at first.
    """

    def __init__(self) -> None:
        self.module = Policy(WIDTH, N_Z, hidden=32, initial_std=1.2)
        generator = torch.Generator().manual_seed(0)
        self.points = 1.2 * torch.randn(DIGITS + 1, N_Z, generator=generator)
        self.view = torch.randn(DIGITS + 1, WIDTH, generator=generator)

    def play(self, environment: Any, generator: torch.Generator) -> tuple[Rollout, Decisions]:
        actor, numbers = PolicyActor(self.module, EPISODES, generator), [()] * EPISODES
        rows, last = torch.arange(EPISODES), torch.full((EPISODES,), DIGITS)
        for _ in range(LONGEST):
            code = actor(rows, self.view[last])
            last = torch.cdist(code, self.points).argmin(1)
            rows, last = rows[last < DIGITS], last[last < DIGITS]
            for row, digit in zip(rows.tolist(), last.tolist(), strict=True):
                numbers[row] += (digit,)
        self.numbers = ["".join(map(str, number)) for number in numbers]
        reward = torch.tensor([float(number == SECRET) for number in numbers])
        decisions = Decisions(*actor.segments())
        nothing = torch.zeros(EPISODES, 1)
        return Rollout(reward, decisions.mask.sum(1), *[nothing] * 6), decisions

    def log_prob(self, decisions: Decisions) -> Tensor:
        return self.module.log_prob(decisions.seen, decisions.chosen)


@pytest.mark.parametrize("known", ["nothing", "numbers", "one outcome"])
def test_what_was_tried_is_not_tried_again(known: str, tmp_path: Path) -> None:
    """One in 8⁵: not found in 40,000 draws, but soon by one who remembers which numbers failed.

    Before there is a success, means move, and the standard deviation does not.
    """
    torch.manual_seed(0)
    lock = Lock()
    deviation, mean = (weight.detach().clone() for weight in (lock.module.log_std, lock.module.mean.bias))

    def judge(environment: Any, result: Rollout) -> Outcome:
        tried = {"nothing": None, "numbers": lock.numbers, "one outcome": [""] * EPISODES}[known]
        return Outcome(result.reward, None, {"success": result.reward.mean().item()}, tried)

    config = ReinforceConfig(episodes=80 * EPISODES, batch_size=EPISODES, replay=16, epochs=8, clip_coef=1.0)
    run = RunFolder.create(tmp_path / "run", {}, seed=0)
    success = reinforce(lock, lambda _: np.zeros(0), config, run, judge=judge)["success"]
    assert success > 0.9 if known == "numbers" else success < 0.1
    if known == "one outcome":
        assert torch.equal(lock.module.log_std, deviation)
        assert not torch.equal(lock.module.mean.bias, mean)
