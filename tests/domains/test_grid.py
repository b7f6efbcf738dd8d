"""The grid world against slow, obvious, scalar versions of its rules, shortest paths and Bayes filter."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import numpy as np
import pytest

from internalrl.domains.grid.bayes import bayes_filter, expert_nll
from internalrl.domains.grid.layouts import shortest_path_moves
from internalrl.domains.grid.world import (
    ACTIONS,
    POST_TRAINING_TASK,
    PRETRAINING_TASKS,
    Demonstrations,
    GridBatch,
    GridConfig,
    Layouts,
    demonstrate,
    observe,
    parse_task,
    pretraining_tasks,
    sample_layouts,
    task_table,
)

PAPER = GridConfig()
SMALL = GridConfig(size=5, colors=6, walls=3, horizon=40)
CROWDED = GridConfig(size=8, colors=20, walls=10)
STATE = ("position", "progress", "steps", "alive")
STEPS = ((-1, 0), (0, 1), (1, 0), (0, -1))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ------------------------------------------------------------------------------------------ scalar versions


def scalar_target(config: GridConfig, contents: np.ndarray, cell: int, action: int) -> int:
    """The cell where a move ends; the same one if the edge or a wall is in the way."""
    row, column = cell // config.size + STEPS[action][0], cell % config.size + STEPS[action][1]
    if not (0 <= row < config.size and 0 <= column < config.size):
        return cell
    target = row * config.size + column
    is_wall = config.colors <= contents[target] < config.colors + config.walls
    return cell if is_wall else target


def scalar_distance(config: GridConfig, contents: np.ndarray, cell: int, color: int) -> float:
    """Moves from `cell` until `color` is entered, entering no other colour; breadth first."""
    queue, seen = deque([(cell, 0)]), {cell}
    while queue:
        here, distance = queue.popleft()
        if contents[here] == color:
            return distance
        if contents[here] < config.colors and here != cell:
            continue
        for action in range(ACTIONS):
            target = scalar_target(config, contents, here, action)
            if target not in seen:
                seen.add(target)
                queue.append((target, distance + 1))
    return np.inf


def scalar_optimal(config: GridConfig, contents: np.ndarray, cell: int, color: int) -> list[int]:
    """The first moves of all shortest paths from `cell` to `color`."""
    best = scalar_distance(config, contents, cell, color)
    moves = []
    for action in range(ACTIONS):
        target = scalar_target(config, contents, cell, action)
        wrong = contents[target] < config.colors and contents[target] != color
        moved = target != cell and not wrong
        if moved and 1 + scalar_distance(config, contents, target, color) == best < np.inf:
            moves.append(action)
    return moves


# ---------------------------------------------------------------------------------------------- sizes, tasks


def test_paper_sizes():
    assert (PAPER.cells, PAPER.channels, PAPER.observation_size) == (49, 13, 637)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"size": 9}, "2 to 8"),
        ({"size": 1, "colors": 0}, "2 to 8"),
        ({"colors": 0}, "at least one colour"),
        ({"walls": -1}, "at least one colour"),
        ({"horizon": 0}, "one step"),
        ({"size": 3, "colors": 6, "walls": 3}, "do not fit"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        GridConfig(**sizes)


def test_pretraining_tasks_are_the_papers():
    assert pretraining_tasks(PAPER) == PRETRAINING_TASKS
    same_rule = {
        tuple(c for k in (a, b, c) for c in (2 * k, 2 * k + 1))
        for a in range(4) for b in range(4) for c in range(4)
        if (b - a) % 4 in (2, 3) and (c - b) % 4 in (2, 3)
    }  # fmt: skip
    assert set(PRETRAINING_TASKS) == same_rule


def test_post_training_task_has_only_withheld_transitions():
    def transitions(task):
        subgoals = [color // 2 for color in task[::2]]
        return set(pairwise(subgoals))

    shown = set().union(*map(transitions, PRETRAINING_TASKS))
    assert transitions(POST_TRAINING_TASK) == {(k, (k + 1) % 4) for k in range(4)}
    assert not transitions(POST_TRAINING_TASK) & shown


def test_pretraining_tasks_for_six_colors():
    tasks = pretraining_tasks(SMALL)
    assert set(tasks) == {(0, 1, 4, 5, 2, 3), (2, 3, 0, 1, 4, 5), (4, 5, 2, 3, 0, 1)}


@pytest.mark.parametrize("colors", [2, 4, 7])
def test_colors_that_leave_no_task_are_refused(colors):
    with pytest.raises(ValueError, match="even number of colours"):
        pretraining_tasks(GridConfig(colors=colors))


def test_parse_task():
    assert parse_task("0-1-4-5", PAPER) == (0, 1, 4, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a list"),
        ("0-red", "not a list"),
        ("-1", "not a list"),
        ("0-8", "colours 0 to 7"),
        ("0-1-1", "twice in a row"),
    ],
)
def test_bad_tasks_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_task(text, PAPER)


# -------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("config", [PAPER, SMALL, CROWDED])
def test_layouts_hold_every_object_once_and_are_solvable(config):
    layouts = sample_layouts(config, 30, rng())
    assert layouts.contents.shape == (30, config.cells)
    for contents, start in zip(layouts.contents, layouts.start, strict=True):
        assert sorted(contents[contents < config.empty]) == list(range(config.empty))
        assert contents[start] == config.empty
        for color in range(config.colors):
            assert scalar_distance(config, contents, int(start), color) < np.inf
            for other in set(range(min(config.colors, 4))) - {color}:
                cell = int(np.argmax(contents == other))
                assert scalar_distance(config, contents, cell, color) < np.inf


def test_rejection_keeps_the_solvable_layouts_and_only_those():
    config = GridConfig(size=3, colors=2, walls=1)
    layouts = sample_layouts(config, 60_000, rng())
    drawn = {(*contents.tolist(), int(start)) for contents, start in zip(*vars(layouts).values(), strict=True)}
    solvable = set()
    for first, second, wall, start in np.ndindex(9, 9, 9, 9):
        if len({first, second, wall, start}) == 4:
            contents = np.full(9, config.empty)
            contents[[first, second, wall]] = 0, 1, 2
            pairs = [(start, 0), (start, 1), (first, 1), (second, 0)]
            if all(scalar_distance(config, contents, a, b) < np.inf for a, b in pairs):
                solvable.add((*contents.tolist(), start))
    assert drawn == solvable


def test_hopeless_layouts_are_refused():
    with pytest.raises(ValueError, match="use fewer objects or a larger size"):
        sample_layouts(GridConfig(size=5, colors=20, walls=4), 1, rng())


def test_layouts_repeat_with_the_seed():
    first, second = sample_layouts(PAPER, 5, rng(3)), sample_layouts(PAPER, 5, rng(3))
    np.testing.assert_array_equal(first.contents, second.contents)
    np.testing.assert_array_equal(first.start, second.start)


def test_observation_is_one_hot():
    layouts = sample_layouts(PAPER, 4, rng())
    positions = rng().integers(0, PAPER.cells, (4, 3))
    observed = observe(PAPER, layouts.contents, positions).reshape(4, 3, PAPER.cells, PAPER.channels)
    expected = np.zeros_like(observed)
    for n, t, cell in np.ndindex(4, 3, PAPER.cells):
        if layouts.contents[n, cell] < PAPER.empty:
            expected[n, t, cell, layouts.contents[n, cell]] = 1
        expected[n, t, cell, -1] = positions[n, t] == cell
    np.testing.assert_array_equal(observed, expected)
    one_step = observe(PAPER, layouts.contents, positions[:, 0])
    np.testing.assert_array_equal(one_step, expected[:, 0].reshape(4, -1))


# ---------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("config", [PAPER, GridConfig(size=3, colors=2, walls=1, horizon=12)])
def test_rules_match_the_scalar_ones(config):
    generator = rng(1)
    tasks = [(0, 1, 0), (1,), (1, 0)]
    layouts = sample_layouts(config, 60, generator)
    which = generator.integers(0, 3, 60)
    batch = GridBatch(config, layouts, task_table(tasks)[which])
    states = [[int(cell), 0, 0, True] for cell in layouts.start]  # position, progress, steps, alive
    outcomes = set()
    for step in range(config.horizon + 2):
        actions = generator.integers(0, ACTIONS, 60)
        reward, terminated, truncated = batch.step(actions)
        for n, state in enumerate(states):
            task, contents = tasks[which[n]], layouts.contents[n]
            expected = (0, False, False)
            if state[3]:
                before = state[0]
                state[0] = scalar_target(config, contents, before, int(actions[n]))
                content, win, lose = int(contents[state[0]]), False, False
                if state[0] != before and content < config.colors:
                    if content == task[state[1]]:
                        state[1] += 1
                        win = state[1] == len(task)
                    else:
                        lose = True
                late = step + 1 == config.horizon and not win and not lose
                state[2:] = step + 1, not (win or lose or late)
                expected = (float(win), win or lose, late)
                outcomes.add(expected)
            assert (reward[n], terminated[n], truncated[n]) == expected
            assert [getattr(batch, name)[n] for name in STATE] == state
    assert len(outcomes) == 4 or config is PAPER  # the small grid saw success, failure, time-out, and going on


def corridor(task: tuple[int, ...], horizon: int = 100) -> GridBatch:
    """Two rows, colour 0 and colour 1 on the left and on the right of the upper one; starts between them."""
    config = GridConfig(size=3, colors=2, walls=0, horizon=horizon)
    contents = np.full((1, 9), config.empty, np.uint8)
    contents[0, [0, 2]] = 0, 1
    return GridBatch(config, Layouts(contents, np.array([1], np.int16)), task)


def test_bumping_while_on_a_color_visits_nothing():
    batch = corridor((0, 1, 0))
    for action in (3, 0, 3):  # enter colour 0, then twice against the edge
        batch.step(np.array([action]))
    assert (batch.progress[0], batch.alive[0], batch.steps[0]) == (1, True, 3)


def test_entering_the_color_just_visited_ends_the_episode():
    batch = corridor((0, 1))
    for action in (3, 1):
        batch.step(np.array([action]))
    reward, terminated, truncated = batch.step(np.array([3]))
    assert (reward[0], terminated[0], truncated[0]) == (0, True, False)


def test_success_on_the_last_step_is_no_truncation():
    reward, terminated, truncated = corridor((0,), horizon=1).step(np.array([3]))
    assert (reward[0], terminated[0], truncated[0]) == (1, True, False)


def test_selecting_and_replacing_rows():
    layouts, actions = sample_layouts(SMALL, 6, rng()), rng().integers(0, ACTIONS, (10, 6))
    whole = GridBatch(SMALL, layouts, (0, 1))
    part = whole.select(np.array([4, 1]))
    mixed = GridBatch(SMALL, sample_layouts(SMALL, 6, rng(1)), (1, 0))
    mixed.step(actions[0])
    mixed.replace(np.array([4, 1]), part)
    for step in actions:
        whole.step(step)
        part.step(step[[4, 1]])
        mixed.step(step)
        for name in ("position", "progress", "steps", "alive", "sought"):
            expected = getattr(whole, name)[[4, 1]]
            np.testing.assert_array_equal(getattr(part, name), expected)
            np.testing.assert_array_equal(getattr(mixed, name)[[4, 1]], expected)


# --------------------------------------------------------------------------------------------------- expert


@pytest.mark.parametrize("config", [PAPER, SMALL, CROWDED])
def test_shortest_path_moves_match_a_scalar_search(config):
    contents = sample_layouts(config, 3, rng(2)).contents
    boards = shortest_path_moves(config, contents)
    for n, color in np.ndindex(3, min(config.colors, 4)):
        for cell in range(config.cells):
            if contents[n, cell] < config.colors + config.walls and contents[n, cell] >= config.colors:
                continue  # the agent is never in a wall
            if contents[n, cell] == color:
                continue  # nor does it seek the colour it stands on
            moves = [m for m in range(ACTIONS) if int(boards[n, color, m]) >> cell & 1]
            assert moves == scalar_optimal(config, contents[n], cell, color)


def played(demonstrations: Demonstrations):
    """(n, t, task) of every step that is not padding."""
    for n, t in np.argwhere(demonstrations.mask):
        yield int(n), int(t), demonstrations.tasks[demonstrations.task[n]]


def test_demonstrations_replay_to_success():
    made = demonstrate(PAPER, 2000, PRETRAINING_TASKS, rng())
    batch = GridBatch(PAPER, made.layouts, task_table(made.tasks)[made.task])
    reward = np.zeros(2000)
    for t in range(made.actions.shape[1]):
        live = made.lengths > t
        np.testing.assert_array_equal(batch.alive, live)
        np.testing.assert_array_equal(batch.position[live], made.positions[live, t])
        np.testing.assert_array_equal(batch.sought[live], made.sought[live, t])
        reward += batch.step(made.actions[:, t])[0]
    assert reward.min() == 1  # so no wrong colour was ever entered
    assert made.lengths.max() == made.actions.shape[1]
    assert made.lengths.mean() == pytest.approx(31.6, abs=0.6)


def test_expert_moves_are_optimal():
    made = demonstrate(SMALL, 15, pretraining_tasks(SMALL), rng())
    for n, t, task in played(made):
        contents, color = made.layouts.contents[n], task[made.progress[n, t]]
        assert made.actions[n, t] in scalar_optimal(SMALL, contents, int(made.positions[n, t]), color)


def test_expert_is_uniform_over_optimal_moves_and_tasks():
    made = demonstrate(PAPER, 4000, PRETRAINING_TASKS, rng(5))
    boards = shortest_path_moves(PAPER, made.layouts.contents)
    n, t = np.nonzero(made.mask)
    sought, position = made.sought[n, t], made.positions[n, t].astype(np.uint64)
    optimal = (boards[n, sought] >> position[:, None] & np.uint64(1)).astype(bool)
    assert optimal[np.arange(len(n)), made.actions[n, t]].all()
    code = optimal @ [1, 2, 4, 8]
    for bits in np.unique(code[optimal.sum(1) > 1]):
        counts = np.bincount(made.actions[n, t][code == bits], minlength=4)[optimal[code == bits][0]]
        if counts.sum() > 50:
            assert_uniform(counts)
    assert_uniform(np.bincount(made.task, minlength=16))


def assert_uniform(counts: np.ndarray) -> None:
    """Pearson's statistic below its mean plus four standard deviations."""
    expected, freedom = counts.mean(), len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_noise_is_the_rate_of_uniform_moves():
    made = demonstrate(PAPER, 2000, PRETRAINING_TASKS, rng(), noise=0.4)
    boards = shortest_path_moves(PAPER, made.layouts.contents)
    n, t = np.nonzero(made.mask)
    optimal = boards[n, made.sought[n, t]] >> made.positions[n, t].astype(np.uint64)[:, None] & np.uint64(1)
    hit = optimal[np.arange(len(n)), made.actions[n, t]] == 1
    open_path = optimal.any(1)
    expected = 0.6 + 0.4 * optimal[open_path].sum(1) / 4
    assert hit[open_path].mean() == pytest.approx(expected.mean(), abs=0.01)


def test_noise_may_end_an_episode_on_a_wrong_color_or_at_the_horizon():
    config = GridConfig(horizon=30)
    made = demonstrate(config, 500, PRETRAINING_TASKS, rng(), noise=0.3)
    batch = GridBatch(config, made.layouts, task_table(made.tasks)[made.task])
    ends = np.zeros(3, int)
    for t in range(made.actions.shape[1]):
        np.testing.assert_array_equal(batch.alive, made.lengths > t)
        reward, terminated, truncated = batch.step(made.actions[:, t])
        ends += reward.sum() > 0, (terminated & (reward == 0)).any(), truncated.any()
    assert not batch.alive.any()
    assert (ends > 0).all()


def test_subgoals_and_boundaries():
    made = demonstrate(PAPER, 50, [(0, 1, 4, 5, 2, 3), (6, 7, 6)], rng())
    seen = {0: set(), 1: set()}
    for n, t, task in played(made):
        done = sum(
            made.layouts.contents[n, made.positions[n, s]] < PAPER.colors
            and made.positions[n, s] != made.positions[n, s - 1]
            for s in range(1, t + 1)
        )
        assert made.progress[n, t] == done
        assert made.subgoal[n, t] == task[done] // 2
        assert made.boundaries[n, t] == (t > 0 and made.subgoal[n, t] != made.subgoal[n, t - 1])
        if made.boundaries[n, t]:
            seen[made.task[n]].add(done)
    assert seen == {0: {2, 4}, 1: set()}
    assert not made.boundaries[~made.mask].any()


def test_padding_repeats_the_last_step():
    made = demonstrate(PAPER, 20, PRETRAINING_TASKS, rng())
    last = np.minimum(np.arange(made.actions.shape[1]), made.lengths[:, None] - 1)
    for values in (made.positions, made.actions, made.progress):
        np.testing.assert_array_equal(values, np.take_along_axis(values, last, 1))


def test_bad_demonstration_requests_are_refused():
    with pytest.raises(ValueError, match="probability"):
        demonstrate(PAPER, 1, PRETRAINING_TASKS, rng(), noise=1.5)
    with pytest.raises(ValueError, match="colours 0 to 5"):
        demonstrate(SMALL, 1, PRETRAINING_TASKS, rng())


# ---------------------------------------------------------------------------------------------------- Bayes


def scalar_filter(config, made, n, tasks, noise):
    """p(action | observations) and p(task | observations) at each step of episode n, by plain products."""
    contents, length = made.layouts.contents[n], made.lengths[n]
    joint, progress = [1 / len(tasks)] * len(tasks), [0] * len(tasks)
    probs, posteriors = [], []
    for t in range(length):
        cell = int(made.positions[n, t])
        moves = []
        for k, task in enumerate(tasks):
            optimal = scalar_optimal(config, contents, cell, task[min(progress[k], len(task) - 1)])
            optimal = optimal or list(range(ACTIONS))
            moves.append([noise / 4 + (1 - noise) * (a in optimal) / len(optimal) for a in range(ACTIONS)])
        posterior = np.array(joint) / sum(joint)
        posteriors.append(posterior)
        probs.append(posterior @ np.array(moves))
        if t + 1 == length:
            break
        after = int(made.positions[n, t + 1])
        same_effect = [a for a in range(4) if scalar_target(config, contents, cell, a) == after]
        for k, task in enumerate(tasks):
            joint[k] *= sum(moves[k][a] for a in same_effect)
            if after != cell and contents[after] < config.colors and joint[k]:
                progress[k] += 1
                if contents[after] != task[progress[k] - 1] or progress[k] == len(task):
                    joint[k] = 0
    return np.array(probs), np.array(posteriors)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_bayes_filter_matches_brute_force(noise):
    tasks = [*pretraining_tasks(SMALL), (0, 1, 4), (2, 5, 2)]
    made = demonstrate(SMALL, 10, tasks, rng(4), noise=noise)
    result = bayes_filter(SMALL, made, tasks, noise=noise)
    for n, length in enumerate(made.lengths):
        probs, posterior = scalar_filter(SMALL, made, n, tasks, noise)
        np.testing.assert_allclose(result.probs[n, :length], probs, atol=1e-6)
        np.testing.assert_allclose(result.task_posterior[n, :length], posterior, atol=1e-6)
        nll = -np.log(probs[np.arange(length), made.actions[n, :length]])
        np.testing.assert_allclose(result.nll[n, :length], nll, atol=1e-5)
    assert not result.nll[~made.mask].any()
    np.testing.assert_allclose(result.subgoal_posterior.sum(-1)[made.mask], 1, atol=1e-5)


def test_reference_figures_of_the_papers_grid():
    """Over 100,000 episodes: 0.1705 nats with the goal known, 0.2581 without, 0.857 of the subgoals right."""
    made = demonstrate(PAPER, 3000, PRETRAINING_TASKS, rng(0))
    known, result = expert_nll(PAPER, made), bayes_filter(PAPER, made, PRETRAINING_TASKS)
    assert known[made.mask].mean() == pytest.approx(0.1705, abs=0.003)
    assert result.mean_nll == pytest.approx(0.2581, abs=0.003)
    assert result.subgoal_accuracy == pytest.approx(0.857, abs=0.006)
    # An episode reveals which of the 16 tasks it was, no more and no less.
    np.testing.assert_allclose((result.nll - known).sum(1), np.log(16), atol=1e-3)


def test_episodes_of_an_unknown_task_are_refused():
    made = demonstrate(PAPER, 20, [POST_TRAINING_TASK], rng())
    with pytest.raises(ValueError, match="impossible under all 16 tasks"):
        bayes_filter(PAPER, made, PRETRAINING_TASKS)
