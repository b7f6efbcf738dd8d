"""Stage 3: internal RL (paper, C.5, Alg 3): outcome rewards train a small policy over codes.

Departures from the paper: the policy is a GRU that advances at switches only; the learning rate is larger, since
nothing but this small policy is trained.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from internalrl.domains.grid import GridBatch, GridConfig, parse_task, sample_layouts
from internalrl.internal_rl.agents import Agent
from internalrl.internal_rl.objective import advantages, clipped_surrogate
from internalrl.loop import Loop, optimise
from internalrl.metacontroller.rollout import BatchEnvironment
from internalrl.runlog import RunFolder
from internalrl.stages import ReinforceConfig

Environments = Callable[[int], BatchEnvironment]
"""The batch of episodes of an iteration."""


def grid_environments(grid: GridConfig, task: str, batch_size: int, seed: int) -> Environments:
    """Fresh layouts for every iteration, all with the same `task`."""
    goal = parse_task(task, grid)
    return lambda iteration: GridBatch(
        grid, sample_layouts(grid, batch_size, np.random.default_rng([seed, iteration, 4])), goal
    )


def reinforce(
    agent: Agent, environments: Environments, config: ReinforceConfig, run: RunFolder, stage: str = "reinforce"
) -> Loop:
    """Play, score, improve: one iteration is one batch of episodes and a few passes of clipped policy gradient."""
    optimizer = torch.optim.Adam(agent.module.parameters(), lr=config.lr)
    loop = Loop(run, stage, -(-config.episodes // config.batch_size), {"policy": agent.module}, {"adam": optimizer})
    for iteration in loop:
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + iteration)
        result, decisions = agent.play(environments(iteration), generator)
        advantage = advantages(result.reward)
        with torch.no_grad():
            old_log_prob = agent.log_prob(decisions)
        for _ in range(config.epochs if advantage.any() else 0):  # equal rewards: nothing to learn from
            log_prob = agent.log_prob(decisions)
            optimise(clipped_surrogate(log_prob, old_log_prob, advantage, decisions.mask, config.clip_coef), optimizer)
        loop.log(
            episodes=(iteration + 1) * config.batch_size,
            success=result.reward.mean().item(),
            reward_std=result.reward.std().item(),
            frac_reward_zero_std=float(not advantage.any()),
            length=result.length.float().mean().item(),
            decisions=decisions.mask.sum(1).float().mean().item(),
        )
    return loop
