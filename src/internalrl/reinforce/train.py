"""Stage 3: internal RL (paper, C.5, Alg 3): outcome rewards train a small policy over codes.

Departures from the paper: the policy is a GRU that advances at switches only; the learning rate is larger, since
nothing but this small policy is trained.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from internalrl.base.trajectory import save_trajectory_model
from internalrl.controller.policy import Policy
from internalrl.controller.steered import SteeredModel
from internalrl.domains.grid.world import GridBatch, GridConfig, parse_task, sample_layouts
from internalrl.errors import InternalRLError
from internalrl.players.stepwise import BatchEnvironment, Rollout, RowChance
from internalrl.reinforce.agents import Agent, Decisions, InternalAgent, RawActionAgent
from internalrl.reinforce.novelty import Novelty
from internalrl.reinforce.objective import advantages, clipped_surrogate
from internalrl.reinforce.replay import Replay
from internalrl.run.folder import RunFolder
from internalrl.run.loop import Loop, optimise
from internalrl.run.processes import Processes
from internalrl.run.streams import Stream
from internalrl.settings.stages import PolicyGradientConfig, ReinforceConfig
from internalrl.strategies.limits import Limits, load_limits

Environments = Callable[[int], BatchEnvironment]
"""The batch of episodes of an iteration."""

Chance = Callable[[int], torch.Generator | RowChance]
"""The random numbers of an iteration."""

RECENT = 5  # iterations whose mean success is compared with the target, and is the run's success in the end


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


@dataclass
class Outcome:
    """What a batch of N episodes came to: `reward` (N,), of all processes; `groups` (N,), which are compared with one
    another, None if all are; `metrics` for the log, `success`, which the target is about, among them; `tried`, what
    each episode came to, if that is known: see `novelty`."""

    reward: Tensor
    groups: Tensor | None
    metrics: dict[str, float]
    tried: list[str] | None = None


Judge = Callable[[BatchEnvironment, Rollout], Outcome]


def own_reward(environment: BatchEnvironment, result: Rollout) -> Outcome:
    """The environment's own verdict."""
    reward = result.reward
    return Outcome(reward, None, {
        "success": reward.mean().item(),
        "reward_std": reward.std().item(),
        "frac_reward_zero_std": float(not advantages(reward).any()),
        "length": result.length.float().mean().item(),
    })  # fmt: skip


def reinforce(
    agent: Agent,
    environments: Environments,
    config: PolicyGradientConfig,
    run: RunFolder,
    stage: str = "reinforce",
    judge: Judge = own_reward,
    chance: Chance | None = None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Play, score, improve: one iteration is one batch of episodes and a few passes of clipped policy gradient.

    Args:
        judge: says what a batch came to. Where it, or an environment, raises, the weights are saved as they were.
        chance: the random numbers of an iteration; by default one generator for all.
        processes: each of them plays its share of the batch.
    """
    processes = processes or Processes()
    share = processes.share(config.batch_size)
    optimizer = torch.optim.Adam(agent.module.parameters(), lr=config.lr)
    iterations = max(1, config.episodes // config.batch_size)  # whole batches: a last one must not pass the budget
    novelty, replay = Novelty(config.decision_cost), None
    modules = {"policy": agent.module, "novelty": novelty}
    if config.replay and isinstance(agent.module, Policy):
        modules["replay"] = replay = Replay(config.replay, agent.module)
    loop = Loop(run, stage, iterations, modules, {"adam": optimizer})
    recent: deque[float] = deque(maxlen=RECENT)
    for iteration in loop:
        recent = recent or recent_scores(run, stage, iteration)
        generator = Stream.REINFORCE.torch(run.seed, iteration) if chance is None else chance(iteration)
        try:
            environment = environments(iteration)
            result, decisions = agent.play(environment, generator)
            outcome = judge(environment, result)
        except InternalRLError:
            loop.save()
            raise
        taken, entropy = processes.gather(decisions.mask.sum(1).tolist()), None
        reward, groups, own = outcome.reward, outcome.groups, list(share)
        if replay is not None:
            decisions, reward, groups, own = replay.join(decisions, reward, groups, own, processes)
        advantage, exploring = advantages(reward, groups), False
        if outcome.tried is not None and not advantage.any():
            advantage, exploring = novelty.advantages(outcome.tried, taken), True
        if isinstance(agent.module, Policy):
            agent.module.log_std.requires_grad_(not exploring)  # else it shrinks, and with it what codes can find
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, 2 * (1 - iteration / iterations))
        if advantage.any():  # equal rewards: nothing to learn from
            entropy = improve(agent, decisions, advantage[own], config, optimizer, processes)
        loop.log(
            episodes=(iteration + 1) * config.batch_size,
            **outcome.metrics,
            decisions=(torch.tensor(float(sum(taken))) / config.batch_size).item(),
            entropy=entropy,
        )
        recent.append(outcome.metrics["success"])
        if config.target is not None and len(recent) == RECENT and fmean(recent) >= config.target:
            loop.finish()
    scores = recent or recent_scores(run, stage, loop.step)
    return {
        "success": fmean(scores) if scores else None,  # of a finished run whose log is gone
        "episodes": loop.step * config.batch_size,
        "seconds": loop.seconds,
    }


def improve(
    agent: Agent,
    decisions: Decisions,
    advantage: Tensor,
    config: PolicyGradientConfig,
    optimizer: torch.optim.Optimizer,
    processes: Processes,
) -> float:
    """Several passes over one batch, whose ratio is 1 in the first; returns the decisions' entropy, as sampled.

    Args:
        advantage: (N,), of this process's episodes, as `decisions`.
    """
    old: dict[int, Tensor] = {}
    count = sum(processes.gather([int(decisions.mask.sum())]))

    def losses() -> Iterator[Tensor]:
        for rows, part in decisions.parts():
            log_prob = agent.log_prob(part)
            old_log_prob = old.setdefault(rows.start, log_prob.detach())
            yield clipped_surrogate(log_prob, old_log_prob, advantage[rows], part.mask, config.clip_coef, count)

    for _ in range(config.epochs):
        optimise(losses(), optimizer, share=processes.sum_gradients)
    surprise = sum(-(old[rows.start] * part.mask).sum().item() for rows, part in decisions.parts())
    return sum(processes.gather([surprise])) / count


def recent_scores(run: RunFolder, stage: str, before: int) -> deque[float]:
    """The scores that the run's last iterations `before` this one have logged."""
    lines = (line for line in run.metrics(stage) if line["step"] < before)
    return deque((line["success"] for line in lines), maxlen=RECENT)
