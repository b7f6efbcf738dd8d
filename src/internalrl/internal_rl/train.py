"""Stage 3: internal RL (paper, C.5, Alg 3): outcome rewards train a small policy over codes.

Departures from the paper: the policy is a GRU that advances at switches only; the learning rate is larger, since
nothing but this small policy is trained.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from internalrl.base.trajectory import save_trajectory_model
from internalrl.domains.grid import GridBatch, GridConfig, parse_task, sample_layouts
from internalrl.internal_rl.agents import Agent, InternalAgent, RawActionAgent
from internalrl.internal_rl.objective import advantages, clipped_surrogate
from internalrl.loop import Loop, optimise
from internalrl.metacontroller.limits import Limits, load_limits
from internalrl.metacontroller.policy import Policy
from internalrl.metacontroller.rollout import BatchEnvironment
from internalrl.metacontroller.steered import SteeredModel
from internalrl.runlog import RunFolder
from internalrl.stages import ReinforceConfig
from internalrl.streams import Stream

Environments = Callable[[int], BatchEnvironment]
"""The batch of episodes of an iteration."""

RECENT = 5  # iterations whose mean success is compared with the target


def main(config: ReinforceConfig, run: RunFolder) -> dict[str, Any]:
    """Reinforce the steered model of another run on a task; save base and adapter to `run`."""
    torch.manual_seed(run.seed)
    steered = load_steered(config)
    limits = read_limits(config)
    agent = make_agent(steered, config, limits)
    summary = reinforce(agent, grid_environments(steered, config, run.seed), config, run)
    save_trajectory_model(steered.base, run.path / "base")
    steered.save_pretrained(run.path / "adapter", {"reinforce": {"task": config.task, "seed": run.seed}})
    if limits is not None:
        limits.save(run.path / "adapter")
        summary["violations"] = dict(limits.counts)
    return summary


def load_steered(config: ReinforceConfig) -> SteeredModel:
    """The steered model of `config`; InternalRLError where there is none, ValueError if its grid has no such task."""
    steered = SteeredModel.from_pretrained(config.discovered / "base", config.discovered / "adapter")
    parse_task(config.task, steered.base.config.grid)
    read_limits(config)
    return steered


def read_limits(config: ReinforceConfig) -> Limits | None:
    """The limits of `config`, checked against the adapter that it names; InternalRLError where they do not fit."""
    if config.limits is None:
        return None
    limits = load_limits(config.limits, config.discovered / "adapter")
    limits.require_codes()
    return limits


def make_agent(steered: SteeredModel, config: ReinforceConfig, limits: Limits | None = None) -> Agent:
    """The agent that `config` names, on `steered`; an internal agent's policy becomes part of `steered`."""
    if not config.controller:
        torch.nn.init.zeros_(steered.metacontroller.up)
    if config.agent == "raw-action":
        return RawActionAgent(steered)
    meta = steered.metacontroller
    steered.policy = Policy(meta.width, meta.config.n_z, config.policy_hidden, config.initial_std)
    return InternalAgent(steered, steered.policy, config.temperature, forget=config.forget, limits=limits)


def grid_environments(steered: SteeredModel, config: ReinforceConfig, seed: int) -> Environments:
    """Fresh layouts for every iteration, all with the task of `config`."""
    grid: GridConfig = steered.base.config.grid
    goal = parse_task(config.task, grid)
    return lambda iteration: GridBatch(
        grid, sample_layouts(grid, config.batch_size, Stream.REINFORCE.numpy(seed, iteration)), goal
    )


def reinforce(
    agent: Agent,
    environments: Environments,
    config: ReinforceConfig,
    run: RunFolder,
    stage: str = "reinforce",
) -> dict[str, Any]:
    """Play, score, improve: one iteration is one batch of episodes and a few passes of clipped policy gradient."""
    optimizer = torch.optim.Adam(agent.module.parameters(), lr=config.lr)
    iterations = max(1, config.episodes // config.batch_size)  # whole batches: a last one must not pass the budget
    loop = Loop(run, stage, iterations, {"policy": agent.module}, {"adam": optimizer})
    for iteration in loop:
        result, decisions = agent.play(environments(iteration), Stream.REINFORCE.torch(run.seed, iteration))
        advantage = advantages(result.reward)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, 2 * (1 - iteration / iterations))
        for epoch in range(config.epochs if advantage.any() else 0):  # equal rewards: nothing to learn from
            log_prob = agent.log_prob(decisions)
            if epoch == 0:
                old_log_prob = log_prob.detach()
            loss = clipped_surrogate(log_prob, old_log_prob, advantage, decisions.mask, config.clip_coef)
            optimise(loss, optimizer)
        loop.log(
            episodes=(iteration + 1) * config.batch_size,
            success=result.reward.mean().item(),
            reward_std=result.reward.std().item(),
            frac_reward_zero_std=float(not advantage.any()),
            length=result.length.float().mean().item(),
            decisions=decisions.mask.sum(1).float().mean().item(),
        )
        if recent_success(run, stage) >= config.target:
            loop.finish()
    return {
        "success": recent_success(run, stage),
        "episodes": loop.step * config.batch_size,
        "seconds": loop.seconds,
    }


def recent_success(run: RunFolder, stage: str) -> float:
    """Mean success of the last iterations; 0 before there are enough of them."""
    lines = deque(run.metrics(stage), maxlen=RECENT)
    return sum(line["success"] for line in lines) / RECENT if len(lines) == RECENT else 0.0
