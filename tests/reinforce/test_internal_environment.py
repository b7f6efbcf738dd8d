"""The model as an environment over codes: it plays as a rollout does, and an outside PPO can train on it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import Tensor

from internalrl.controller.steered import SteeredModel
from internalrl.domains import register_environments
from internalrl.domains.grid.world import GridBatch
from internalrl.players.stepwise import Rollout, rollout
from internalrl.reinforce.gym import InternalEnvironment
from tests.support.tiny import GRID, N_Z, WIDTH, codes, tiny_steered, walks

register_environments()
TASK = (0, 1, 2, 3)


class Diary(gymnasium.Wrapper):
    """Remembers what was seen, done and earned; `bonus` is earned at every step."""

    bonus = 0.0

    def reset(self, **options: Any) -> Any:
        result = self.env.reset(**options)
        self.seen, self.actions, self.rewards = [result[0]], [], []
        return result

    def step(self, action: Any) -> Any:
        observation, reward, *rest = self.env.step(action)
        self.seen.append(observation)
        self.actions.append(int(action))
        self.rewards.append(reward + self.bonus)
        return observation, self.rewards[-1], *rest


def grid(**options: Any) -> Diary:
    sizes = {"size": GRID.size, "colors": GRID.colors, "walls": GRID.walls, "horizon": GRID.horizon}
    task = "-".join(map(str, TASK))
    return Diary(gymnasium.make("internalrl/Grid-v0", **{**sizes, "task": task, **options}))


def switching(encoder: str = "planner") -> SteeredModel:
    """A model that switches at some steps, by what it reads."""
    steered = tiny_steered(encoder)
    with torch.no_grad():
        steered.metacontroller.switch_head.weight *= 4
        steered.metacontroller.switch_head.bias.zero_()
    return steered


def environment(steered: SteeredModel | None = None, **options: Any) -> InternalEnvironment:
    return InternalEnvironment(steered or switching(), grid(), **options)


@dataclass
class Segment:
    seen: np.ndarray
    reward: float
    length: int
    terminated: bool
    truncated: bool

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated


def play(env: InternalEnvironment, seed: int) -> tuple[list[Segment], Tensor]:
    """One episode under random codes: its segments, and the codes (S, n_z)."""
    chosen = codes(1, GRID.horizon, seed)[0].clamp(-4, 4)
    observation, _ = env.reset(seed=seed)
    segments: list[Segment] = []
    while not segments or not segments[-1].ended:
        following, reward, terminated, truncated, info = env.step(chosen[len(segments)].numpy())
        segments.append(Segment(observation, reward, info["segment_length"], terminated, truncated))
        observation = following
    return segments, chosen[: len(segments)]


def replay(steered: SteeredModel, env: InternalEnvironment, chosen: Tensor) -> tuple[Rollout, list[Tensor]]:
    """A rollout of the episode that `env` has just played, and what was read at the switches."""
    layout = env.environment.unwrapped.batch.layouts
    left, seen = list(chosen), []

    def propose(rows: Tensor, x: Tensor) -> Tensor:
        seen.append(x[0])
        return left.pop(0)[None]

    return rollout(steered, GridBatch(GRID, layout, TASK), propose, forget=True), seen


@pytest.mark.parametrize("encoder", ["planner", "one-hot"])
def test_same_codes_give_the_same_episode_as_a_rollout(encoder: str) -> None:
    steered = switching(encoder)
    env = environment(steered)
    counts = []
    for seed in range(96):
        segments, chosen = play(env, seed)
        result, seen = replay(steered, env, chosen)
        starts = np.cumsum([0, *(segment.length for segment in segments)])
        assert env.environment.actions == result.actions[0].tolist()
        assert result.switch[0].nonzero().squeeze(-1).tolist() == starts[:-1].tolist()
        assert starts[-1] == result.length[0]
        assert sum(segment.reward for segment in segments) == result.reward[0]
        assert np.array_equal([segment.seen for segment in segments], torch.stack(seen).numpy())
        counts.append(len(segments))
    assert min(counts) < max(counts) >= 3  # the episodes are no trivial ones


def test_a_segment_ends_at_a_switch_or_with_the_episode() -> None:
    steered = switching()
    env = environment(steered)
    episodes = [play(env, seed)[0] for seed in range(12)]
    for segments in episodes:
        assert all(segment.length >= 1 for segment in segments)
        assert not any(segment.ended for segment in segments[:-1])
        assert segments[-1].terminated != segments[-1].truncated
    endings = {segments[-1].truncated for segments in episodes}
    assert endings == {True, False}
    assert max(segment.length for segments in episodes for segment in segments) > 1
    with torch.no_grad():  # with a closed gate, an episode is one segment
        steered.metacontroller.switch_head.bias.fill_(-1e4)
    assert [len(play(env, seed)[0]) for seed in range(4)] == [1] * 4


def test_rewards_are_summed_over_the_segment() -> None:
    env = environment()
    env.environment.bonus = 0.25
    longer = 0
    for seed in range(24):
        segments, _ = play(env, seed)
        rewards = env.environment.rewards
        ends = np.cumsum([segment.length for segment in segments])
        parts = np.split(rewards, ends[:-1])
        assert [segment.reward for segment in segments] == [part.sum() for part in parts]
        assert ends[-1] == len(rewards)
        longer += len(rewards) > len(segments)
    assert longer > 3  # segments of several steps are among them


def test_the_last_observation_is_the_residual_at_the_end() -> None:
    steered = switching()
    env = environment(steered)
    env.reset(seed=1)
    ended = False
    while not ended:
        last, _, terminated, truncated, _ = env.step(np.zeros(N_Z, np.float32))
        ended = terminated or truncated
    # blocks below the tap are not steered, so this residual depends on the observations alone
    residual = steered.residual(torch.from_numpy(np.array([env.environment.seen])))[:, -1]
    np.testing.assert_allclose(last, steered.metacontroller.read(residual)[0].numpy(), atol=1e-5)


@pytest.mark.parametrize("forget", [False, True])
def test_peeking_changes_nothing(forget: bool) -> None:
    steered, observations, proposals = switching(), walks(3, 20), codes(3, 20)
    plain, peeked = steered.start(3, forget), steered.start(3, forget)
    for t in range(20):
        heard: dict[int, Tensor] = {}

        def propose(rows: Tensor, x: Tensor, t: int = t, heard: dict = heard) -> Tensor:
            heard.update(zip(rows.tolist(), x, strict=True))
            return proposals[rows, t]

        for _ in range(2):
            switch, x = steered.peek(observations[:, t], peeked)
        expected = steered.step(observations[:, t], plain, propose)
        step = steered.step(observations[:, t], peeked, propose)
        assert torch.equal(switch, expected.switch)
        assert all(torch.equal(x[row], read) for row, read in heard.items())
        assert all(torch.equal(getattr(step, name), value) for name, value in vars(expected).items())


def test_environment_checker_has_no_complaint() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*not having a spec")  # it is made from objects
        warnings.filterwarnings("ignore", message=".*normalized space")  # codes have the scale of N(0, I)
        check_env(environment())
        check_env(environment(temperature=1.0))


def test_spaces_render_mode_and_closing() -> None:
    env = InternalEnvironment(tiny_steered(), grid(render_mode="ansi"), code_bound=2.0)
    assert (env.action_space.shape, env.observation_space.shape) == ((N_Z,), (WIDTH,))
    assert (env.action_space.high == 2).all()
    assert np.isfinite(env.observation_space.high).all()
    env.reset(seed=0)
    assert env.render() == env.environment.render()
    env.close()


def test_sampled_actions_follow_the_seed() -> None:
    env = environment(temperature=2.0)
    diaries = [(play(env, seed), env.environment.actions)[1] for seed in (5, 5, 6)]
    assert diaries[0] == diaries[1] != diaries[2]
    env.reset(seed=5)
    env.reset()  # the next episode of the same seed
    first = env.environment.unwrapped.batch.layouts.contents
    env.reset(seed=5)
    env.reset()
    assert np.array_equal(first, env.environment.unwrapped.batch.layouts.contents)


def test_bad_codes_and_steps_outside_an_episode() -> None:
    env = environment()
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(N_Z, np.float32))
    env.reset(seed=0)
    for wrong in (np.zeros(N_Z + 1), np.full(N_Z, np.nan), np.full(N_Z, 4.5)):
        with pytest.raises(ValueError, match="clip"):
            env.step(wrong)
    play(env, 0)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(N_Z, np.float32))


def test_environments_that_the_base_model_cannot_read_or_act_in() -> None:
    other = gymnasium.make("internalrl/Grid-v0", size=5, colors=4, walls=1, task="0-1")
    with pytest.raises(ValueError, match="flat ones of 96 numbers"):
        InternalEnvironment(tiny_steered(), other)
    env = grid()
    env.action_space = gymnasium.spaces.Discrete(3)
    with pytest.raises(ValueError, match=r"Discrete\(3\), but the base model chooses among 4"):
        InternalEnvironment(tiny_steered(), env)


def test_stable_baselines_trains_on_it() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    steered = switching()
    before = {name: tensor.clone() for name, tensor in steered.state_dict().items()}
    options = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}
    model = sb3.PPO("MlpPolicy", environment(steered), **options)
    start = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    model.learn(96)
    assert model.num_timesteps == 96
    assert any(not torch.equal(start[name], tensor) for name, tensor in model.policy.state_dict().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in steered.state_dict().items())
    code, _ = model.predict(model.env.reset(), deterministic=True)
    assert code.shape == (1, N_Z)
