"""Replay: the newest successes stand behind every batch, whoever played them."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from internalrl.controller.policy import Policy
from internalrl.reinforce.agents import Decisions
from internalrl.reinforce.replay import SEGMENTS, Replay
from internalrl.run.processes import Processes

WIDTH, N_Z = 3, 2


def batch(lengths: list[int], first: float) -> Decisions:
    """Episodes of so many decisions; episode k has chosen `first` + k everywhere."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    numbers = first + torch.arange(len(lengths), dtype=torch.float)
    chosen = (numbers[:, None, None] * mask[..., None]).expand(-1, -1, N_Z)
    seen = (-numbers[:, None, None] * mask[..., None]).expand(-1, -1, WIDTH)
    return Decisions(seen, chosen, mask)


def play(replay: Replay, decisions: Decisions, reward: list[float], groups: list[int] | None = None) -> tuple:
    own = list(range(len(reward)))
    given = None if groups is None else torch.tensor(groups)
    return replay.join(decisions, torch.tensor(reward), given, own, Processes())


def test_successes_stand_behind_the_next_batch() -> None:
    replay = Replay(4, Policy(WIDTH, N_Z, 4, 1.0))
    first = batch([1, 3, 2], first=1)
    decisions, reward, groups, own = play(replay, first, [0.0, 0.5, 0.0], [7, 8, 9])
    assert torch.equal(decisions.chosen, first.chosen)  # nothing came before it
    assert reward.tolist() == [0.0, 0.5, 0.0]
    assert groups.tolist() == [7, 8, 9]
    assert own == [0, 1, 2]
    decisions, reward, groups, own = play(replay, batch([2, 1], first=11), [0.0, 0.0], [8, 8])
    assert reward.tolist() == [0.0, 0.0, 0.5]
    assert groups.tolist() == [8, 8, 8]
    assert own == [0, 1, 2]
    assert decisions.mask.sum(1).tolist() == [2, 1, 3]
    assert_close(decisions.chosen[2], torch.full((3, N_Z), 2.0))
    assert_close(decisions.seen[2], torch.full((3, WIDTH), -2.0))


def test_only_the_newest_are_kept_and_none_that_are_too_long() -> None:
    replay = Replay(2, Policy(WIDTH, N_Z, 4, 1.0))
    play(replay, batch([1, 1, 1], first=1), [1.0, 1.0, 1.0])
    play(replay, batch([2, SEGMENTS + 1], first=10), [1.0, 1.0])
    decisions, reward, *_ = play(replay, batch([1], first=20), [0.0])
    assert decisions.chosen[:, 0, 0].tolist() == [20.0, 3.0, 10.0]
    assert decisions.mask.sum(1).tolist() == [1, 1, 2]
    assert reward.tolist() == [0.0, 1.0, 1.0]


def test_checkpoints_hold_it() -> None:
    one, other = (Replay(2, Policy(WIDTH, N_Z, 4, 1.0)) for _ in range(2))
    play(one, batch([2], first=1), [1.0])
    other.load_state_dict(one.state_dict())
    found = [play(replay, batch([1], first=5), [0.0])[0] for replay in (one, other)]
    assert torch.equal(found[0].chosen, found[1].chosen)
    assert len(found[1].chosen) == 2


def test_processes_keep_what_all_played_and_the_first_learns_from_it() -> None:
    class Second(Processes):
        """Process 1 of 2; process 0 found a success as well."""

        def gather(self, values: list) -> list:
            return [(torch.ones(1, WIDTH), torch.full((1, N_Z), 9.0), torch.tensor(1.0), torch.tensor(0)), *values]

    replay = Replay(2, Policy(WIDTH, N_Z, 4, 1.0))
    reward, own = torch.tensor([1.0, 0.0, 1.0, 0.0]), [2, 3]
    replay.join(batch([1, 1], first=1), reward, None, own, Second(1, 2))
    assert replay.chosen[:, 0, 0].tolist() == [9.0, 1.0]
    decisions, reward, _, own = replay.join(batch([1, 1], first=5), reward, None, own, Second(1, 2))
    assert len(decisions.mask) == len(own) == 2
    assert len(reward) == 6
