"""`internalrl reinforce` with prompts: a YAML file, dotted reward paths, the run folder, refusals; then `evaluate`."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internalrl import cli
from internalrl.analysis import evaluate_text
from internalrl.base.pretrain_text import save_language_model
from internalrl.controller.steered import SteeredModel
from internalrl.players.stepwise import rollout
from internalrl.run.folder import RunFolder
from tests.support.conversing import rows, steered_answers, talking
from tests.support.language import language_model, steer
from tests.support.written import letters


def half_of(completions: list[str], weight: list[float], **columns: Any) -> list[float]:
    return [w * sum(letter < "k" for letter in text) / 4 for text, w in zip(completions, weight, strict=True)]


def length(completion_ids: list[list[int]]) -> list[float]:
    return [float(len(tokens)) for tokens in completion_ids]


@pytest.fixture
def discovered(tmp_path: Path) -> Path:
    steered = steer(language_model())
    save_language_model(steered.base, letters(), tmp_path / "discovered" / "base")
    steered.save_pretrained(tmp_path / "discovered" / "adapter")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab", "weight": 1}\n{"prompt": "cdk", "weight": 2}\n')
    (tmp_path / "rl.yaml").write_text(
        f"discovered: {tmp_path / 'discovered'}\nprompts: {tmp_path / 'prompts.jsonl'}\n"
        "rewards: [tests.cli.test_reinforce_text.half_of]\n"
        "max_completion_length: 4\nnum_generations: 4\nbatch_size: 8\nepisodes: 24\nepochs: 2\npolicy_hidden: 6\n"
    )
    return tmp_path


def reinforce(folder: Path, *options: str) -> int:
    return cli.main(["reinforce", "--config", str(folder / "rl.yaml"), "--run", str(folder / "run"), *options])


def test_a_language_model_is_reinforced(discovered: Path) -> None:
    assert reinforce(discovered) == 0
    lines = [json.loads(line) for line in (discovered / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["episodes"] for line in lines] == [8, 16, 24]
    assert lines[0]["rewards/half_of/mean"] == lines[0]["reward"]
    summary = json.loads((discovered / "run" / "summary.json").read_text())
    assert summary["success"] == pytest.approx(np.mean([line["reward"] for line in lines]))
    again = SteeredModel.from_pretrained(discovered / "run" / "base", discovered / "run" / "adapter")
    assert again.policy is not None
    assert again.provenance["reinforce"]["rewards"] == ["tests.cli.test_reinforce_text.half_of"]


def evaluate(folder: Path, *options: str) -> int:
    return cli.main(["evaluate", str(folder / "run"), "--episodes", "9", "--json", *options])


def test_a_reinforced_model_is_evaluated(
    discovered: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts in turn, in parts, judged by the run's rewards: the mean over all completions."""
    reinforce(discovered)
    capsys.readouterr()
    seen: list[list[Any]] = []
    own = half_of

    def spy(completions: list[str], weight: list[float], **columns: Any) -> list[float]:
        rewards = own(completions, weight)
        seen.append(list(zip(completions, weight, rewards, strict=True)))
        return rewards

    monkeypatch.setattr("tests.cli.test_reinforce_text.half_of", spy)
    monkeypatch.setattr(evaluate_text, "CHUNK", 4)
    found, written = {}, {}
    for options in ((), ("--controller", "prior"), ("--controller", "off"), ("--deterministic",)):
        seen.clear()
        assert evaluate(discovered, *options) == 0
        found[options] = json.loads(capsys.readouterr().out)
        written[options] = first = seen.copy()
        assert [len(part) for part in first] == [4, 4, 1]
        assert [weight for part in first for _, weight, _ in part] == [1, 2] * 4 + [1]
        rewards = np.array([reward for part in first for *_, reward in part])
        assert found[options]["reward"] == found[options]["rewards/spy/mean"] == pytest.approx(rewards.mean())
        low, high = found[options]["reward_95"]
        assert low + high == pytest.approx(2 * rewards.mean())
        assert high - low == pytest.approx(2 * 2.306004 * rewards.std(ddof=1) / 3, rel=1e-4), "t of nine rewards"
        seen.clear()
        evaluate(discovered, *options)
        capsys.readouterr()
        assert seen == first
    assert all(a != b for a, b in combinations(written.values(), 2)), "each of them writes something else"
    assert found[()]["prompts"] == 2
    assert found["--controller", "off"]["segments_per_episode"] is None
    assert found[()]["segments_per_episode"] >= 1


def test_other_prompts_and_rewards_are_evaluated(discovered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reinforce(discovered)
    (discovered / "one.jsonl").write_text('{"prompt": "k"}\n')
    capsys.readouterr()
    others = ("--prompts", str(discovered / "one.jsonl"), "--rewards", "tests.cli.test_reinforce_text.length")
    assert evaluate(discovered, *others, "--max-completion-length", "3") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == 1
    assert 0 < found["reward"] == found["mean_length"] <= 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--task", "0-1"], "--task and --forget are for grids"),
        (["--prompts", "nowhere.jsonl"], "Cannot read nowhere.jsonl"),
        (["--rewards", "no.such.function"], "There is no function no.such.function"),
    ],
)
def test_what_cannot_be_evaluated(
    options: list[str], sentence: str, discovered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reinforce(discovered)
    assert evaluate(discovered, *options) == 2
    assert sentence in capsys.readouterr().err


def test_a_run_without_prompts_or_policy_is_not_evaluated_alone(
    discovered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = discovered / "run"
    RunFolder.create(run, {}, seed=0)
    for part in ("base", "adapter"):
        (discovered / "discovered" / part).rename(run / part)
    assert evaluate(discovered, "--controller", "prior") == 2
    assert "no prompts and rewards of its own" in capsys.readouterr().err
    given = ("--prompts", str(discovered / "prompts.jsonl"), "--rewards", "tests.cli.test_reinforce_text.half_of")
    assert evaluate(discovered, *given) == 2
    assert "has no policy to choose codes with" in capsys.readouterr().err
    assert evaluate(discovered, *given, "--controller", "prior", "--max-completion-length", "4") == 0


def test_raw_tokens_are_reinforced(discovered: Path) -> None:
    assert reinforce(discovered, "--agent", "raw-action", "--temperature", "1") == 0
    assert (discovered / "run" / "base" / "tokenizer.json").is_file()


@pytest.mark.parametrize(("agent", "expected"), [("raw-action", [0.7, 0.0]), ("internal", [1.0, 0.0])])
def test_a_bare_base_is_evaluated_at_its_own_temperature(
    agent: str, expected: list[float], discovered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reinforce(discovered, "--agent", agent, "--temperature", "0.7")
    asked: list[float] = []

    def spy(steered: Any, environment: Any, propose: Any, temperature: float, **more: Any) -> Any:
        asked.append(temperature)
        return rollout(steered, environment, propose, temperature, **more)

    monkeypatch.setattr(evaluate_text, "rollout", spy)
    for options in ((), ("--deterministic",)):
        assert evaluate(discovered, "--controller", "off", *options) == 0
    assert asked == expected


def test_environments_are_named_by_a_path(tmp_path: Path) -> None:
    steered = steered_answers()
    save_language_model(steered.base, talking(), tmp_path / "discovered" / "base")
    steered.save_pretrained(tmp_path / "discovered" / "adapter")
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows(4)))
    (tmp_path / "rl.yaml").write_text(
        f"discovered: {tmp_path / 'discovered'}\nprompts: {tmp_path / 'prompts.jsonl'}\n"
        "environment: tests.support.conversing.Box\nrewards: [tests.support.conversing.right]\n"
        "max_completion_length: 64\nnum_generations: 4\nbatch_size: 8\nepisodes: 8\npolicy_hidden: 6\n"
    )
    assert reinforce(tmp_path) == 0
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["tools/call_frequency"] > 0.5
    assert line["completions/max_length"] > 40
    assert evaluate(tmp_path) == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rewards"], "--rewards is empty"),
        (["--rewards", "no.such.function"], "There is no function no.such.function"),
        (["--prompts", "nowhere.jsonl"], "Cannot read nowhere.jsonl"),
        (["--max-completion-length", "5000"], "more than the model's context"),
        (["--agent", "raw-action"], "temperature above 0"),
        (["--num-generations", "3"], "multiple of num_generations"),
    ],
)
def test_mistakes_are_told_before_a_folder_is_made(
    options: list[str], sentence: str, discovered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reinforce(discovered, *options) == 2
    assert sentence in capsys.readouterr().err
    assert not (discovered / "run").exists()
