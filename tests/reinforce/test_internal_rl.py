"""Internal RL's arithmetic against numbers worked out by hand, and the policy's two ways of being run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from internalrl.controller.policy import Policy, PolicyActor
from internalrl.players.stepwise import BatchEnvironment
from internalrl.reinforce.agents import InternalAgent, RawActionAgent
from internalrl.reinforce.objective import advantages, clipped_surrogate
from internalrl.reinforce.train import reinforce
from internalrl.run.folder import RunFolder
from internalrl.settings.stages import ReinforceConfig
from tests.support.tiny import N_Z, WIDTH, close, environment, tiny_steered, widen


@pytest.fixture
def policy() -> Policy:
    policy = Policy(WIDTH, N_Z, hidden=6, initial_std=1.0)
    widen(policy, 0.4, seed=0)
    return policy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_advantages_by_hand() -> None:
    """Mean 1/4 and standard deviation √(3/16), over the batch and without Bessel's correction."""
    std = math.sqrt(3) / 4
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]) / (std + 1e-3)
    assert_close(advantages(torch.tensor([1.0, 0.0, 0.0, 0.0])), expected)
    assert_close(expected[0], torch.tensor(1.7280), atol=1e-4, rtol=0)


def test_equal_rewards_give_no_advantage() -> None:
    for reward in (0.0, 1.0):
        assert not advantages(torch.full((5,), reward)).any()
    assert not advantages(torch.ones(1)).any()


def test_clipped_surrogate_by_hand() -> None:
    """Ratios 1.5, 0.5, 1.1 with advantage 2, and 1.5, 0.5 with −1; each takes the smaller product."""
    ratio = torch.tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 9.0]])
    old = torch.tensor([[-1.0, -2.0, 0.5], [0.0, -0.3, 7.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantage = torch.tensor([2.0, -1.0])
    # min(3, 2.4), min(1, 1.6), min(2.2, 2.2); min(-1.5, -1.2), min(-0.5, -0.8); the last is no decision
    expected = -(2.4 + 1.0 + 2.2 - 1.5 - 0.8) / 5
    loss = clipped_surrogate(old + ratio.log(), old, advantage, mask, clip=0.2)
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_clipped_surrogate_stops_pushing_outside_the_clip() -> None:
    """−A ρ / n, but zero where the ratio has already gone as far as the advantage may push it."""
    ratio = torch.tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 1.0]])
    log_prob = ratio.log().requires_grad_()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    loss = clipped_surrogate(log_prob, torch.zeros(2, 3), torch.tensor([2.0, -1.0]), mask, clip=0.2)
    loss.backward()
    expected = torch.tensor([[0.0, -2 * 0.5 / 5, -2 * 1.1 / 5], [1.5 / 5, 0.0, 0.0]])
    assert_close(log_prob.grad, expected)


def test_actor_walks_the_policy_step_by_step(policy: Policy) -> None:
    """Rows switch at different times; each one's codes come from what it alone has read so far."""
    actor = PolicyActor(policy, 4, generator(), deterministic=True)
    calls = [[0, 1, 2, 3], [2], [0, 2], [3, 0], [2, 3]]
    read: dict[int, list[torch.Tensor]] = {row: [] for row in range(4)}
    for k, rows in enumerate(calls):
        x = torch.randn(len(rows), WIDTH, generator=generator(k))
        code = actor(torch.tensor(rows), x)
        for row, seen, chosen in zip(rows, x, code, strict=True):
            read[row].append(seen)
            alone = policy(torch.stack(read[row])[None]).mean[0, -1]
            assert_close(chosen, alone.detach(), atol=1e-6, rtol=1e-6)
    x, code, mask = actor.segments()
    assert mask.sum(1).tolist() == [3, 1, 4, 3]
    for row in range(4):
        assert torch.equal(x[row][mask[row]], torch.stack(read[row]))
        assert not x[row][~mask[row]].any()
    assert_close(policy(x).mean.detach()[mask], code[mask], atol=1e-6, rtol=1e-6)
    hidden = policy.recurrent(x)[0].detach()
    assert_close(actor.hidden, hidden[torch.arange(4), mask.sum(1) - 1], atol=1e-6, rtol=1e-6)


def test_actor_samples_from_the_policy(policy: Policy) -> None:
    x = torch.randn(1, WIDTH, generator=generator()).expand(20_000, -1)
    code = PolicyActor(policy, 20_000, generator())(torch.arange(20_000), x)
    expected = policy(x[:1, None])
    assert_close(code.mean(0), expected.mean[0, 0].detach(), atol=0.04, rtol=0)
    assert_close(code.std(0), expected.stddev[0, 0].detach(), atol=0.04, rtol=0.02)
    again = PolicyActor(policy, 20_000, generator())(torch.arange(20_000), x)
    assert torch.equal(code, again)


def test_policy_starts_wide_and_near_the_prior() -> None:
    policy = Policy(WIDTH, N_Z, hidden=6, initial_std=1.5)
    found = policy(torch.randn(5, 3, WIDTH, generator=generator()))
    assert_close(found.stddev, torch.full((5, 3, N_Z), 1.5))
    assert found.mean.abs().max() < 0.2


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_raw_actions_are_scored_as_they_were_drawn(temperature: float) -> None:
    """Cached decoding drew them, at a temperature; one full forward gives the same numbers."""
    agent = RawActionAgent(tiny_steered(), temperature)
    played, decisions = agent.play(environment(12), generator())
    log_prob, mask = agent.log_prob(decisions), decisions.mask
    drawn = torch.distributions.Categorical(logits=played.logits / temperature).log_prob(played.actions)
    close(log_prob.detach()[mask], drawn[mask])
    assert not played.code.any()
    assert torch.equal(mask.sum(1), played.length)
    log_prob[mask].sum().backward()
    assert agent.module is agent.steered.base
    untouched = {name for name, p in agent.steered.named_parameters() if p.grad is None}
    meta = {name for name, _ in agent.steered.named_parameters() if name.startswith("adapters.")}
    unused = {f"base.{name}" for name in ("observation_head.weight", "observation_head.bias")}
    assert untouched == meta | unused | {"base.backbone.embed_tokens.weight"}


def test_codes_are_scored_as_they_were_drawn(policy: Policy) -> None:
    """The standardised codes that steered are the generator's own numbers."""
    agent = InternalAgent(tiny_steered(), policy)
    played, decisions = agent.play(environment(12), generator())
    mask = decisions.mask
    assert torch.equal(mask.sum(1), played.switch.sum(1))
    assert torch.equal(decisions.chosen[mask], played.code[played.switch])
    noise = torch.randn(12, N_Z, generator=generator())
    expected = -0.5 * (noise**2).sum(1) - (policy.log_std.sum() + N_Z / 2 * math.log(2 * math.pi))
    close(agent.log_prob(decisions)[:, 0], expected)


@pytest.mark.parametrize("kind", ["internal", "raw-action"])
def test_parts_played_side_by_side_are_what_each_is_alone(
    kind: str, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three threads on one model's copies: hooks, caches and random numbers of one part touch no other."""
    monkeypatch.setattr("internalrl.players.threads.LEAST", 4)
    steered = tiny_steered()
    agent = InternalAgent(steered, policy, temperature=1.0) if kind == "internal" else RawActionAgent(steered)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        played, decisions = agent.play(environment(13), generator())
        again, _ = agent.play(environment(13), generator())
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert torch.equal(again.code, played.code)
    assert torch.equal(again.actions, played.actions)
    seeds = torch.randint(2**62, (3,), generator=generator()).tolist()
    for rows, seed in zip(np.array_split(np.arange(13), 3), seeds, strict=True):
        part, chosen = agent._play(steered, environment(13).select(rows), generator(seed))
        steps, count = part.actions.shape[1], chosen.mask.shape[1]
        assert torch.equal(played.length[rows], part.length)
        assert torch.equal(played.actions[rows, :steps], part.actions)
        assert not played.actions[rows, steps:].any()
        close(played.logits[rows, :steps], part.logits)
        close(decisions.chosen[rows, :count].float(), chosen.chosen.float())
        assert torch.equal(decisions.mask[rows, :count], chosen.mask)
        assert not decisions.mask[rows, count:].any()


@pytest.mark.parametrize(("budget", "iterations"), [(3, 1), (4, 1), (11, 2), (12, 3)])
def test_the_last_batch_does_not_pass_the_budget(budget: int, iterations: int, tmp_path: Path) -> None:
    """Batches of four: what is left over is not played, but one batch always is."""
    played = []

    def environments(iteration: int) -> BatchEnvironment:
        played.append(iteration)
        return environment(4, seed=iteration)

    config = ReinforceConfig(episodes=budget, batch_size=4, epochs=1)
    summary = reinforce(
        RawActionAgent(tiny_steered()), environments, config, RunFolder.create(tmp_path / "run", {}, seed=0)
    )
    assert played == list(range(iterations))
    assert summary["episodes"] == 4 * iterations
