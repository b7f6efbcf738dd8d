"""The grid world as Gymnasium environments: one episode at a time, and natively vectorised."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from internalrl.domains.grid.render import render_frame, render_text
from internalrl.domains.grid.world import (
    ACTIONS,
    GridBatch,
    GridConfig,
    parse_task,
    pretraining_tasks,
    sample_layouts,
    task_table,
)

RENDER_MODES = ["ansi", "rgb_array"]


class _Episodes:
    """Draws episodes and their pictures: what the single and the vector environment have in common."""

    def __init__(
        self, size: int, colors: int, walls: int, horizon: int, task: str | None, render_mode: str | None
    ) -> None:
        if render_mode is not None and render_mode not in RENDER_MODES:
            raise ValueError(f"render_mode is {render_mode!r}; use None or one of {', '.join(RENDER_MODES)}.")
        self.config = GridConfig(size, colors, walls, horizon)
        self.tasks = pretraining_tasks(self.config) if task is None else (parse_task(task, self.config),)
        self.observation_space = gymnasium.spaces.Box(0, 1, (self.config.observation_size,), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(ACTIONS)
        self._table = task_table(self.tasks)

    def draw(self, count: int, rng: np.random.Generator) -> GridBatch:
        """`count` new episodes, each with its own layout and one of the tasks."""
        layouts = sample_layouts(self.config, count, rng)
        return GridBatch(self.config, layouts, self._table[rng.integers(len(self.tasks), size=count)])

    def render(self, batch: GridBatch, row: int, mode: str) -> str | NDArray[np.uint8]:
        """The picture of one row, with 32 pixels per cell in the mode rgb_array."""
        contents, position = batch.layouts.contents[row], int(batch.position[row])
        if mode == "ansi":
            return render_text(self.config, contents, position)
        return render_frame(self.config, contents, position)


class GridEnv(gymnasium.Env[NDArray[np.uint8], np.int64]):
    """The grid world with Gymnasium's interface; `gymnasium.make("internalrl/Grid-v0", task="0-1-4-5")`.

    `size`, `colors`, `walls` and `horizon` are those of `GridConfig`. `task` is a text like 0-1-4-5; None
    draws one of `pretraining_tasks` for each episode. The task is not observed: an observation is the flat
    one-hot picture of the grid, (observation_size,) of zeros and ones. `info` has `progress` (colours of the
    task done) and `success`. ValueError for sizes that cannot be, a task that names unknown colours, or an
    unknown render mode.
    """

    metadata: dict[str, Any] = {"render_modes": RENDER_MODES, "render_fps": 8}  # noqa: RUF012 (as Gymnasium declares it)

    def __init__(
        self,
        size: int = 7,
        colors: int = 8,
        walls: int = 4,
        horizon: int = 100,
        task: str | None = None,
        render_mode: str | None = None,
    ) -> None:
        self._episodes = _Episodes(size, colors, walls, horizon, task, render_mode)
        self.observation_space = self._episodes.observation_space
        self.action_space = self._episodes.action_space
        self.render_mode = render_mode
        self._batch: GridBatch | None = None

    @property
    def batch(self) -> GridBatch:
        """The current episode as a batch of one, hidden state included (task, progress)."""
        if self._batch is None:
            raise RuntimeError("no episode has begun; call reset() first.")
        return self._batch

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Begin an episode on a new layout; the same seed gives the same one. `options` are ignored."""
        super().reset(seed=seed)
        self._batch = self._episodes.draw(1, self.np_random)
        return self._batch.observe()[0], self._info(success=False)

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """Play one of `MOVES`, 0 to 3."""
        if not self.action_space.contains(action):
            raise ValueError(f"action is {action!r}; expected an integer from 0 to {ACTIONS - 1}.")
        reward, terminated, truncated = self.batch.step(np.array([action]))
        info = self._info(success=bool(reward[0]))
        return self.batch.observe()[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> str | NDArray[np.uint8] | None:
        """A text or an (H, W, 3) picture, by the render mode; None without one."""
        if self.render_mode is None:
            return None
        return self._episodes.render(self.batch, 0, self.render_mode)

    def _info(self, success: bool) -> dict[str, Any]:
        return {"progress": int(self.batch.progress[0]), "success": success}


class GridVectorEnv(VectorEnv[NDArray[np.uint8], NDArray[np.int64], NDArray[Any]]):
    """`num_envs` grid worlds stepped as one batch; arguments and infos as for `GridEnv`.

    A row that has ended begins a new episode at its next step, whose action is ignored and whose reward is 0
    (Gymnasium's NEXT_STEP autoreset). All rows share one random generator, so a row's episodes are not those
    of a `GridEnv` with the same seed.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (as Gymnasium declares it)
        "render_modes": RENDER_MODES,
        "render_fps": 8,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        size: int = 7,
        colors: int = 8,
        walls: int = 4,
        horizon: int = 100,
        task: str | None = None,
        render_mode: str | None = None,
    ) -> None:
        self._episodes = _Episodes(size, colors, walls, horizon, task, render_mode)
        self.num_envs = num_envs
        self.single_observation_space = self._episodes.observation_space
        self.single_action_space = self._episodes.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = render_mode
        self._batch: GridBatch | None = None

    @property
    def batch(self) -> GridBatch:
        """The current episodes, hidden state included (task, progress)."""
        if self._batch is None:
            raise RuntimeError("no episode has begun; call reset() first.")
        return self._batch

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Begin an episode in every row; the same seed gives the same ones. `options` are ignored."""
        super().reset(seed=seed)
        self._batch = self._episodes.draw(self.num_envs, self.np_random)
        return self._batch.observe(), self._infos(success=np.zeros(self.num_envs, bool))

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Play one of `MOVES` in every row, (num_envs,) integers."""
        if not self.action_space.contains(np.asarray(actions)):
            raise ValueError(f"expected {self.num_envs} actions from 0 to {ACTIONS - 1}, got {actions!r}.")
        ended = np.flatnonzero(~self.batch.alive)
        reward, terminated, truncated = self.batch.step(actions)
        if len(ended):
            self.batch.replace(ended, self._episodes.draw(len(ended), self.np_random))
        infos = self._infos(success=reward > 0)
        return self.batch.observe(), reward.astype(np.float64), terminated, truncated, infos

    def render(self) -> tuple[str | NDArray[np.uint8], ...] | None:
        """One text or (H, W, 3) picture per row; None without a render mode."""
        if self.render_mode is None:
            return None
        return tuple(self._episodes.render(self.batch, row, self.render_mode) for row in range(self.num_envs))

    def _infos(self, success: NDArray[np.bool_]) -> dict[str, Any]:
        """Gymnasium's form: per key an array, and under the key with an underscore which rows report it."""
        every = np.ones(self.num_envs, bool)
        progress = self.batch.progress.astype(np.int64)
        return {"progress": progress, "_progress": every, "success": success, "_success": every.copy()}
