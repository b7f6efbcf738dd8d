"""A base model, its metacontroller and an environment as one Gymnasium environment over codes (paper, C.5).

The clock is the contracted one of the switches: an action is a code, a step is a whole segment. So any RL
library that learns continuous actions can do internal RL. Our own `train.reinforce` plays batches, which is
faster; both decode through `SteeredModel.step`, and with the same codes they take the same actions.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary
from numpy.typing import NDArray
from torch import Tensor

from internalrl.controller.steered import Decoding, SteeredModel
from internalrl.players.stepwise import choose
from internalrl.strategies.limits import Limits

Array = NDArray[np.float32]


class InternalEnvironment(gymnasium.Env[Array, Array]):
    """`environment` as it looks from the codes.

    Action: a code, Box(−code_bound, code_bound, (n_z,)). Others are refused: let the library clip them.
    Observation: the normalised residual at the switch, Box(−√n_e, √n_e, (n_e,)).
    Step: the code is held, and the base model acts, until the switch fires again or the episode ends. Rewards
    are summed. `terminated`, `truncated` and `info` are the environment's last ones; `info` has in addition
    `segment_length`, the number of its steps. When the episode ends, the observation is the residual at the
    environment's last observation.
    Reset: the base model reads the first observation, where the first segment always begins.

    Args:
        steered: a steered `TrajectoryModel` that takes the environment's observations and actions.
        environment: any with flat Box or MultiBinary observations, and Discrete actions numbered from 0.
        code_bound: largest absolute value in a code; discovery makes codes resemble draws from N(0, I).
        temperature: of the base model's actions; 0 is greedy.
        forget: cut the base model's context at every switch, as `train.reinforce` does by default.
        limits: codes that they deny are projected; so no denied code is ever in force.

    Raises:
        ValueError: environment and base model do not fit each other, or a code is not in the action space.
        InternalRLError: the limits switch steering off for denied codes, which an action cannot.
        RuntimeError: `step` without an episode that is still going on.
    """

    def __init__(
        self,
        steered: SteeredModel,
        environment: gymnasium.Env[Any, Any],
        code_bound: float = 4.0,
        temperature: float = 0.0,
        forget: bool = True,
        limits: Limits | None = None,
    ) -> None:
        _require_fit(steered, environment)
        self.steered, self.environment = steered, environment
        self.temperature, self.forget, self.limits = temperature, forget, limits
        if limits is not None:
            limits.require_codes()
        self.metadata, self.render_mode = environment.metadata, environment.render_mode
        meta = steered.metacontroller
        self.action_space = Box(-code_bound, code_bound, (meta.config.n_z,), np.float32)
        scale = math.sqrt(meta.width)  # layer normalisation lets no number be larger
        self.observation_space = Box(-scale, scale, (meta.width,), np.float32)
        self._generator = torch.Generator()
        self._decoding: Decoding | None = None  # None: no episode is going on
        self._observation = torch.empty(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin an episode; `seed` and `options` go to the environment, `seed` to the base's sampling too."""
        super().reset(seed=seed)
        observation, info = self.environment.reset(seed=seed, options=options)
        self._generator.manual_seed(int(self.np_random.integers(2**31)))
        self._observation = _row(observation)
        self._decoding = self.steered.start(1, self.forget)
        return self.steered.peek(self._observation, self._decoding)[1].numpy()[0], info

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Hold the code `action` (n_z,) for one segment."""
        if self._decoding is None:
            raise RuntimeError("no episode is going on; call reset() first.")
        code = np.asarray(action, np.float32)
        if not self.action_space.contains(code):
            raise ValueError(f"the code is {action!r}; expected a member of {self.action_space}, so clip it.")
        proposal = torch.from_numpy(code)[None]
        if self.limits is not None:
            proposal = self.limits.decide(proposal).codes
        total, length, switch, ended = 0.0, 0, False, False
        while not (switch or ended):
            step = self.steered.step(self._observation, self._decoding, lambda rows, x: proposal)
            chosen = choose(step.logits, self.temperature, self._generator)
            observation, reward, terminated, truncated, info = self.environment.step(chosen.numpy()[0])
            self._observation = _row(observation)
            total, length, ended = total + float(reward), length + 1, terminated or truncated
            fired, residual = self.steered.peek(self._observation, self._decoding)
            switch = bool(fired)
        if ended:
            self._decoding = None
        return residual.numpy()[0], total, terminated, truncated, {**info, "segment_length": length}

    def render(self) -> Any:
        """What the environment renders."""
        return self.environment.render()

    def close(self) -> None:
        """Close the environment."""
        self.environment.close()


def _row(observation: Any) -> Tensor:
    """A batch of one, (1, observation_size)."""
    return torch.from_numpy(np.array(observation))[None]


def _require_fit(steered: SteeredModel, environment: gymnasium.Env[Any, Any]) -> None:
    seen, done = environment.observation_space, environment.action_space
    size, actions = steered.base.encoder.observation_size, steered.base.config.actions
    if not isinstance(seen, Box | MultiBinary) or seen.shape != (size,):
        raise ValueError(
            f"observations are {seen}, but the base model reads flat ones of {size} numbers; use the "
            "environment that it was trained on, or gymnasium.wrappers.FlattenObservation."
        )
    if not isinstance(done, Discrete) or (done.start, done.n) != (0, actions):
        raise ValueError(
            f"actions are {done}, but the base model chooses among {actions}, numbered from 0; use the "
            "environment that it was trained on."
        )
