"""`internalrl reinforce` with prompts: a YAML file, dotted reward paths, the run folder, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from internalrl import cli
from internalrl.base.pretrain_text import save_language_model
from internalrl.metacontroller.steered import SteeredModel
from tests.conversing import rows, steered_answers, talking
from tests.language import language_model, steer
from tests.written import letters


def half_of(completions: list[str], weight: list[float], **columns: Any) -> list[float]:
    return [w * sum(letter < "k" for letter in text) / 4 for text, w in zip(completions, weight, strict=True)]


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
    again = SteeredModel.from_pretrained(discovered / "run" / "base", discovered / "run" / "adapter")
    assert again.policy is not None
    assert again.provenance["reinforce"]["rewards"] == ["tests.cli.test_reinforce_text.half_of"]


def test_raw_tokens_are_reinforced(discovered: Path) -> None:
    assert reinforce(discovered, "--agent", "raw-action", "--temperature", "1") == 0
    assert (discovered / "run" / "base" / "tokenizer.json").is_file()


def test_environments_are_named_by_a_path(tmp_path: Path) -> None:
    steered = steered_answers()
    save_language_model(steered.base, talking(), tmp_path / "discovered" / "base")
    steered.save_pretrained(tmp_path / "discovered" / "adapter")
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows(4)))
    (tmp_path / "rl.yaml").write_text(
        f"discovered: {tmp_path / 'discovered'}\nprompts: {tmp_path / 'prompts.jsonl'}\n"
        "environment: tests.conversing.Box\nrewards: [tests.conversing.right]\n"
        "max_completion_length: 64\nnum_generations: 4\nbatch_size: 8\nepisodes: 8\npolicy_hidden: 6\n"
    )
    assert reinforce(tmp_path) == 0
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["tools/call_frequency"] > 0.5
    assert line["completions/max_length"] > 40


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
