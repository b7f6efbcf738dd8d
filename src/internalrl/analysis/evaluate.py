"""Success of a run's model on any task, with everything counted that says how it fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from internalrl.analysis import evaluate_text
from internalrl.analysis.report.runs import find, open_models, require_codes, run_task
from internalrl.analysis.statistics import wilson
from internalrl.base.loading import load_base
from internalrl.base.trajectory import TrajectoryModel
from internalrl.controller.policy import PolicyActor
from internalrl.controller.steered import Propose, SteeredModel, bare
from internalrl.domains.grid.world import GridBatch, GridConfig, Layouts, parse_task, sample_layouts
from internalrl.errors import InternalRLError
from internalrl.players.stepwise import Rollout, prior, rollout
from internalrl.run.folder import RunFolder, read_run
from internalrl.run.streams import Stream
from internalrl.settings.stages import EvaluateConfig
from internalrl.strategies.limits import Limits

CHUNK = 1024
"""Episodes played at once."""


@dataclass(frozen=True)
class Episodes:
    """N played episodes.

    `positions` (N, T + 1) cells, repeating the last one after the end; `success`, `truncated` (N,) bool.
    """

    layouts: Layouts
    rollout: Rollout
    positions: NDArray[np.int16]
    success: NDArray[np.bool_]
    truncated: NDArray[np.bool_]


def main(config: EvaluateConfig, run: RunFolder) -> dict[str, Any]:
    """Evaluate the models of `run` on the grid, or, if the base is a language model, on texts."""
    base = load_base(run.path / "base")
    return evaluate_grid(config, run) if isinstance(base, TrajectoryModel) else evaluate_text.main(config, run, base)


def evaluate_grid(config: EvaluateConfig, run: RunFolder) -> dict[str, Any]:
    """Play `config.task` with the models of `run`, a policy within the limits that it was trained with.

    Returns success with its 95 % interval, mean length, segments per episode (None with the controller off),
    the fractions that ended on a wrong colour and at the horizon, and seconds.
    """
    if config.prompts is not None or config.rewards or config.max_completion_length is not None:
        raise InternalRLError(
            "--prompts, --rewards and --max-completion-length are for language models; the grid is evaluated with "
            "--task."
        )
    models = open_models(run)
    task = config.task or run_task(run, models.grid)
    parse_task(task, models.grid)
    options = read_run(run.path)["config"]
    if config.controller == "off":
        config = replace(config, forget=False)
        steered, temperature = bare(models.base), 0.0 if config.deterministic else 1.0
    else:
        temperature = find(options, "temperature") or 0.0
        if config.forget is None:
            config = replace(config, forget=find(options, "forget"))
        steered = require_codes(run, models.steered, config.controller)
    return measure(steered, models.grid, task, config, temperature, run.seed, models.limits)


def measure(
    steered: SteeredModel,
    grid: GridConfig,
    task: str,
    config: EvaluateConfig,
    temperature: float,
    seed: int,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """The result of `evaluate_grid` for models at hand.

    Args:
        temperature: of the base's actions.
        limits: of the policy.
    """
    began = time.monotonic()
    wins = timeouts = steps = segments = 0
    for part in play(steered, grid, task, config, temperature, seed, limits):
        wins += int(part.success.sum())
        timeouts += int(part.truncated.sum())
        steps += int(part.rollout.length.sum())
        segments += int(part.rollout.switch.sum())
    count = config.episodes
    return {
        "task": task,
        "controller": config.controller,
        "deterministic": config.deterministic,
        "episodes": count,
        "success": wins / count,
        "success_95": wilson(wins, count),
        "wrong_color": (count - wins - timeouts) / count,
        "truncated": timeouts / count,
        "mean_length": steps / count,
        "segments_per_episode": None if config.controller == "off" else segments / count,
        "seconds": time.monotonic() - began,
    }


def play(
    steered: SteeredModel,
    grid: GridConfig,
    task: str,
    config: EvaluateConfig,
    temperature: float,
    seed: int,
    limits: Limits | None = None,
) -> Iterator[Episodes]:
    """Play `config.episodes` episodes of `task`, at most `CHUNK` at a time; the same seed gives the same ones."""
    rng, generator = Stream.EVALUATE.numpy(seed), Stream.EVALUATE.torch(seed)
    goal = parse_task(task, grid)
    for begin in range(0, config.episodes, CHUNK):
        count = min(CHUNK, config.episodes - begin)
        layouts = sample_layouts(grid, count, rng)
        propose = _proposer(steered, config, count, generator, limits)
        result = rollout(steered, GridBatch(grid, layouts, goal), propose, temperature, bool(config.forget), generator)
        yield _replay(GridBatch(grid, layouts, goal), result)


def _proposer(
    steered: SteeredModel, config: EvaluateConfig, episodes: int, generator: torch.Generator, limits: Limits | None
) -> Propose:
    if config.controller == "policy":
        assert steered.policy is not None
        return PolicyActor(steered.policy, episodes, generator, config.deterministic, limits)
    return prior(steered.metacontroller.config.n_z, generator)


def _replay(environment: GridBatch, result: Rollout) -> Episodes:
    """The rules once more on the same actions: a rollout drops episodes that ended, and with them why."""
    positions = [environment.position]
    success, truncated = np.zeros(len(environment), bool), np.zeros(len(environment), bool)
    for action in result.actions.numpy().T:
        reward, _, timeout = environment.step(action)
        success |= reward > 0
        truncated |= timeout
        positions.append(environment.position)
    return Episodes(environment.layouts, result, np.stack(positions, 1), success, truncated)
