"""Internal RL within limits: no denied code is ever in force, and what is left is learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from internalrl.analysis import evaluate
from internalrl.analysis.report.runs import open_models
from internalrl.cli import main
from internalrl.controller.policy import Policy, PolicyActor
from internalrl.domains import register_environments
from internalrl.errors import InternalRLError, OptionError
from internalrl.players.stepwise import Rollout
from internalrl.reinforce import agents
from internalrl.reinforce.agents import Decisions, InternalAgent
from internalrl.reinforce.gym import InternalEnvironment
from internalrl.reinforce.train import load_steered, reinforce
from internalrl.reinforce.train import main as stage
from internalrl.run.folder import RunFolder
from internalrl.settings.schema import to_dict
from internalrl.settings.stages import EvaluateConfig, ReinforceConfig
from internalrl.strategies.library import Library, meaning_of
from internalrl.strategies.limits import Limits
from tests.support import stages
from tests.support.finished import finished_run
from tests.support.strategies import denying, library
from tests.support.tiny import N_Z, WIDTH, codes, environment, tiny_steered, widen

EPISODES = 256


def corners() -> Library:
    """Six strategies around the origin: many random codes are of each."""
    return library(np.concatenate([np.eye(N_Z), -np.eye(N_Z)]))


class OneRightStrategy:
    """Episodes of one segment, which succeed if the code in force lies beyond 1.2 on the first of two axes."""

    def __init__(self, limits: Limits | None):
        self.module, self.limits = Policy(2, 2, hidden=4, initial_std=1.2), limits
        self.executed: list[Tensor] = []
        self.denied = 0

    def play(self, environment: Any, generator: torch.Generator) -> tuple[Rollout, Decisions]:
        actor = PolicyActor(self.module, EPISODES, generator, limits=self.limits)
        code = actor(torch.arange(EPISODES), torch.ones(EPISODES, 2))
        self.executed.append(code)
        nothing, decisions = torch.zeros(EPISODES, 1), Decisions(*actor.segments())
        self.denied += int((decisions.chosen[:, 0] != code).any(1).sum())
        return Rollout((code[:, 0] > 1.2).float(), torch.ones(EPISODES), *[nothing] * 6), decisions

    def log_prob(self, decisions: Decisions) -> Tensor:
        return self.module.log_prob(decisions.seen, decisions.chosen)


@pytest.mark.parametrize("on_denied", ["project", "resample"])
@pytest.mark.parametrize(("denied", "expected"), [((3,), 0.9), ((1,), 0.9), ((2, 3), 0.0)])
def test_what_is_allowed_is_learned(on_denied: str, denied: tuple[int, ...], expected: float, tmp_path: Path) -> None:
    """Of strategies at −3, 0 and 3: success lies at the edge of the middle one and all over the right one."""
    limits = denying(library([[-3, 0], [0, 0], [3, 0]]), *denied, on_denied=on_denied)
    agent = OneRightStrategy(limits)
    config = ReinforceConfig(episodes=(30 if expected else 6) * EPISODES, batch_size=EPISODES, lr=0.02)
    summary = reinforce(agent, lambda _: np.zeros(0), config, RunFolder.create(tmp_path / "run", {}, seed=0))
    assert agent.denied > 0
    assert limits.allows(torch.cat(agent.executed)).all()
    assert (summary["success"] >= expected) if expected else (summary["success"] == 0.0)


@pytest.mark.parametrize("on_denied", ["project", "resample"])
def test_no_denied_code_steers_an_episode(on_denied: str) -> None:
    """The policy's own choices are what is scored, and some of them were denied."""
    policy = Policy(WIDTH, N_Z, hidden=6, initial_std=1.2)
    widen(policy, 0.4, seed=0)
    limits = denying(corners(), 1, 2, 6, on_denied=on_denied)
    agent = InternalAgent(tiny_steered(), policy, limits=limits)
    played, decisions = agent.play(environment(48), torch.Generator().manual_seed(0))
    executed, chosen = played.code[played.switch], decisions.chosen[decisions.mask]
    allowed = limits.allows(chosen)
    assert 0.2 < allowed.float().mean() < 0.8
    assert limits.allows(executed).all()
    assert torch.equal(executed[allowed], chosen[allowed])
    assert sum(count for told, count in limits.counts.items() if told.startswith("denied")) == int((~allowed).sum())
    played, decisions = InternalAgent(tiny_steered(), policy).play(environment(48), torch.Generator().manual_seed(0))
    assert torch.equal(played.code[played.switch], decisions.chosen[decisions.mask])


def test_limits_in_the_environment_over_codes() -> None:
    """Whatever library trains on it: a denied action is projected."""
    register_environments()
    world = gymnasium.make("internalrl/Grid-v0", size=4, colors=4, walls=1, horizon=14, task="0-1")
    limits = denying(corners(), 1, 2, 6)
    limited = InternalEnvironment(tiny_steered(), world, limits=limits)
    free = InternalEnvironment(tiny_steered(), world)

    def play(env: InternalEnvironment, chosen: Tensor, seed: int) -> list[Any]:
        seen, ended = [env.reset(seed=seed)[0].tolist()], False
        for code in chosen:
            if not ended:
                observation, _, terminated, truncated, info = env.step(code.numpy())
                seen += [observation.tolist(), info["segment_length"]]
                ended = terminated or truncated
        return seen

    changed = 0
    for seed in range(12):
        asked = codes(1, 8, seed)[0].clamp(-4, 4)
        taken = play(limited, asked, seed)
        assert taken == play(free, limits.decide(asked).codes, seed)
        changed += taken != play(free, asked, seed)
    assert changed
    with pytest.raises(InternalRLError, match="training cannot"):
        InternalEnvironment(tiny_steered(), world, limits=denying(corners(), 1, on_denied="off"))


@pytest.fixture
def discovered(tmp_path: Path) -> Path:
    """A run with an adapter, its library, and limits that deny half of the strategies."""
    run = finished_run(tmp_path / "discovered", ("pretrain", "discover"))
    replace(corners(), adapter=meaning_of(run.path / "adapter")).save(run.path / "adapter" / "strategies.json")
    (tmp_path / "limits.yaml").write_text("strategies: {strategy-1: deny, strategy-2: deny, strategy-6: deny}\n")
    return run.path


def config(discovered: Path) -> ReinforceConfig:
    return replace(stages.reinforce(discovered), limits=discovered.parent / "limits.yaml")


def test_a_stage_within_limits(discovered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No episode of training or evaluation is steered by a denied code; the run carries its limits with it."""
    rollouts: list[Rollout] = []
    for module in (agents, evaluate):
        play = module.rollout

        def recording(*args: Any, play: Any = play) -> Rollout:
            rollouts.append(play(*args))
            return rollouts[-1]

        monkeypatch.setattr(module, "rollout", recording)
    settings = config(discovered)
    run = RunFolder.create(tmp_path / "run", to_dict(settings), seed=0)
    summary = stage(settings, run)
    assert summary["violations"]["denied strategy-1: project"] > 0
    (tmp_path / "limits.yaml").unlink()
    trained = len(rollouts)
    assert trained == 5
    evaluate.main(EvaluateConfig(episodes=32), RunFolder.open(run.path, 0))
    assert len(rollouts) == trained + 1
    limits = open_models(run).limits
    assert limits is not None
    for played in rollouts:
        assert played.switch.any()
        assert limits.allows(played.code[played.switch]).all()
        assert torch.equal(limits.decide(played.code[played.switch]).codes, played.code[played.switch])


def test_limits_that_cannot_train(discovered: Path) -> None:
    file = discovered.parent / "limits.yaml"
    with pytest.raises(OptionError, match="no codes to limit"):
        replace(config(discovered), agent="raw-action")
    file.write_text("on_denied: off\n")
    with pytest.raises(InternalRLError, match="training cannot"):
        load_steered(config(discovered))
    replace(corners(), adapter="another").save(discovered / "adapter" / "strategies.json")
    file.write_text("{}\n")
    with pytest.raises(InternalRLError, match="mean something else"):
        load_steered(config(discovered))


def test_mistakes_on_the_command_line(
    discovered: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are told before a run folder is made."""
    monkeypatch.chdir(discovered.parent)
    Path("limits.yaml").write_text("strategies: {fly: deny}\n")
    asked = ["reinforce", "--discovered", "discovered", "--task", "0", "--limits", "limits.yaml", "--run", "run"]
    assert main(asked) == 2
    assert "limits.yaml: The limits name a strategy 'fly' that the library lacks" in capsys.readouterr().err
    assert main(["demo", "--reinforce.limits", "limits.yaml", "--run", "run"]) == 2
    assert "which a demo does not have yet" in capsys.readouterr().err
    assert not Path("run").exists()


def test_strategies_of_a_trajectory_model(discovered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From demonstrations where there is no policy; examples tell which colours were entered."""
    asked = ["strategies", "fit", discovered / "adapter", "--base", discovered / "base", "--samples", "24"]
    for source in ((), ("--source", "prior")):
        assert main([*map(str, asked), *source, "--most", "3"]) == 0
        told = capsys.readouterr().out
        assert ("demonstrations" if not source else "prior") in told
        assert "enters" in told
