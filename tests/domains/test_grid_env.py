"""The grid world's Gymnasium faces: checks, seeding, autoreset, pictures."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from internalrl.domains import register_environments
from internalrl.domains.grid.gym import GridEnv, GridVectorEnv
from internalrl.domains.grid.render import PALETTE, render_frame, render_text
from internalrl.domains.grid.world import PRETRAINING_TASKS, GridConfig, sample_layouts

register_environments()
NAME = "internalrl/Grid-v0"
SMALL = {"size": 4, "colors": 3, "walls": 1, "horizon": 15, "task": "0-1"}


@pytest.mark.parametrize("render_mode", ["ansi", "rgb_array"])
def test_environment_checker_has_no_complaint(render_mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(NAME, render_mode=render_mode).unwrapped)


def test_make_passes_sizes_and_task():
    env = gymnasium.make(NAME, **SMALL)
    observation, info = env.reset(seed=1)
    assert observation.shape == (4 * 4 * 5,) == env.observation_space.shape
    assert info == {"progress": 0, "success": False}
    assert env.unwrapped.batch.task.tolist() == [[0, 1]]


def test_without_a_task_episodes_draw_pretraining_tasks():
    env = GridVectorEnv(400)
    env.reset(seed=0)
    assert {tuple(task) for task in env.batch.task.tolist()} == set(PRETRAINING_TASKS)


@pytest.mark.parametrize("make", [GridEnv, lambda **kwargs: GridVectorEnv(3, **kwargs)])
def test_same_seed_same_episodes(make):
    def observations(env, seed):
        seen = [env.reset(seed=seed)[0]]
        env.action_space.seed(7)
        for _ in range(60):
            observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
            seen.append(observation)
            if env.metadata.get("autoreset_mode") is None and (terminated or truncated):
                seen.append(env.reset()[0])
        return np.array(seen)

    one, two, other = observations(make(), 3), observations(make(), 3), observations(make(), 4)
    np.testing.assert_array_equal(one, two)
    assert one.shape != other.shape or (one != other).any()


def test_vector_environment_plays_like_single_ones():
    vector = gymnasium.make_vec(NAME, num_envs=5, **SMALL).unwrapped
    assert isinstance(vector, GridVectorEnv)
    assert vector.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    singles = [GridEnv(**SMALL) for _ in range(5)]
    observations, infos = vector.reset(seed=0)
    generator, ended, counts = np.random.default_rng(0), np.ones(5, bool), np.zeros(3, int)
    for _ in range(300):
        for n in np.flatnonzero(ended):  # a row has just begun an episode: give the single one the same
            singles[n].reset()
            singles[n]._batch = vector.batch.select(np.array([n]))
            np.testing.assert_array_equal(observations[n], singles[n].batch.observe()[0])
            assert (infos["progress"][n], infos["success"][n]) == (0, False)
        actions = generator.integers(0, 4, 5)
        before = ended = np.array([not single.batch.alive[0] for single in singles])
        observations, rewards, terminated, truncated, infos = vector.step(actions)
        assert vector.observation_space.contains(observations)
        for n in np.flatnonzero(~before):
            expected = singles[n].step(actions[n])
            np.testing.assert_array_equal(observations[n], expected[0])
            assert (rewards[n], terminated[n], truncated[n]) == expected[1:4]
            assert {key: infos[key][n] for key in ("progress", "success")} == expected[4]
            counts += rewards[n] > 0, terminated[n] and not rewards[n], truncated[n]
        assert not any(values[before].any() for values in (rewards, terminated, truncated))
    assert (counts > 0).all()  # successes, failures and time-outs were all compared


def test_vector_infos_have_gymnasiums_form():
    native = gymnasium.make_vec(NAME, num_envs=2)
    emulated = gymnasium.make_vec(NAME, num_envs=2, vectorization_mode="sync")
    for ours, theirs in zip(
        (native.reset(seed=0)[1], native.step(np.array([0, 1]))[-1]),
        (emulated.reset(seed=0)[1], emulated.step(np.array([0, 1]))[-1]),
        strict=True,
    ):
        assert ours.keys() == theirs.keys()
        assert all(ours[key].dtype == theirs[key].dtype and len(ours[key]) == 2 for key in ours)
    wrapped = gymnasium.wrappers.vector.RecordEpisodeStatistics(GridVectorEnv(4, **SMALL))
    wrapped.reset(seed=0)
    returned = [wrapped.step(np.full(4, 1)) for _ in range(20)]
    assert any("episode" in step[-1] for step in returned)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"task": "0-9"}, "colours 0 to 7"),
        ({"size": 2}, "do not fit"),
        ({"render_mode": "human"}, "ansi, rgb_array"),
        ({"colors": 3}, "even number of colours"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    for make in (GridEnv, GridVectorEnv):
        with pytest.raises(ValueError, match=message):
            make(**kwargs)


def test_bad_actions_are_refused():
    env, vector = GridEnv(), GridVectorEnv(2)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(0)
    env.reset()
    vector.reset()
    with pytest.raises(ValueError, match="from 0 to 3"):
        env.step(4)
    with pytest.raises(ValueError, match="2 actions from 0 to 3"):
        vector.step(np.array([0, -1]))


def test_text_picture():
    config = GridConfig(size=3, colors=2, walls=1)
    contents = np.array([0, 3, 3, 2, 1, 3, 3, 3, 3], np.uint8)
    assert render_text(config, contents, 8) == "0 . .\n# 1 .\n. . @"


def test_pixel_picture_shows_every_object():
    config = GridConfig()
    layouts = sample_layouts(config, 1, np.random.default_rng(0))
    contents, start = layouts.contents[0], int(layouts.start[0])
    frame = render_frame(config, contents, start, scale=32)
    assert frame.shape == (224, 224, 3)
    tiles = frame.reshape(7, 32, 7, 32, 3).swapaxes(1, 2).reshape(49, 32, 32, 3)
    for color in range(config.colors):
        tile = tiles[np.argmax(contents == color)]
        assert tuple(tile[16, 4]) == PALETTE[color]
        assert len(np.unique(tile.reshape(-1, 3), axis=0)) > 2  # its number stands out
    assert tiles[start, 16, 16].max() < 64  # the agent is dark
    assert len({tuple(tiles[cell, 16, 4]) for cell in np.flatnonzero(contents == config.empty)}) == 1
    for mode, kind in (("ansi", str), ("rgb_array", np.ndarray)):
        vector = GridVectorEnv(2, render_mode=mode)
        vector.reset(seed=0)
        assert [type(picture) for picture in vector.render()] == [kind, kind]
