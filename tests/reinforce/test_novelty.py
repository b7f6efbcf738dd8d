"""What is worth trying again while nothing is rewarded."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from internalrl.errors import InternalRLError
from internalrl.reinforce.novelty import SCALE, Novelty
from internalrl.reinforce.trainer import InternalRLTrainer
from internalrl.run.metrics import read_metrics
from internalrl.settings.stages import InternalRLConfig
from tests.support.language import steered_language_model
from tests.support.written import letters


def test_it_counts() -> None:
    """Against a dictionary: within a batch and from batch to batch."""
    novelty, met = Novelty(0.7), Counter[str]()
    for batch in (["a", "b", "a"], ["a", "c", "b", "c"], ["d"] * 5):
        decisions = list(range(len(batch)))
        expected = []
        for outcome, count in zip(batch, decisions, strict=True):
            expected.append(-math.log(1 + met[outcome]) - 0.7 * count)
            met[outcome] += 1
        assert_close(novelty.worth(batch, decisions), torch.tensor(expected))
    advantages = novelty.advantages(["e", "a", "e"], [2, 2, 2])
    assert_close(advantages.mean(), torch.tensor(0.0))
    assert_close(advantages[0] - advantages[1], torch.tensor(SCALE * math.log(1 + met["a"])))
    met["a"] += 1
    again = Novelty(0.7)
    again.load_state_dict(novelty.state_dict())
    assert again.worth(["a"], [0]).item() == pytest.approx(-math.log(1 + met["a"]))


def nothing(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


def beginnings(completions: list[str]) -> list[str]:
    return [text[:1] for text in completions]


def make_trainer(folder: Path, outcomes: Any, reward: Any = nothing) -> InternalRLTrainer:
    args = InternalRLConfig(
        output_dir=folder, episodes=6 * 16, batch_size=16, num_generations=8, max_completion_length=8, epochs=2,
        policy_hidden=6, lr=1e-2,
    )  # fmt: skip
    dataset = [{"prompt": "abc"}, {"prompt": "fg"}]
    return InternalRLTrainer(steered_language_model(), reward, args, dataset, letters(), outcomes=outcomes)


def moved(trainer: InternalRLTrainer) -> bool:
    before = [p.clone() for p in trainer.agent.module.parameters()]
    trainer.train()
    return any(not torch.equal(a, b) for a, b in zip(before, trainer.agent.module.parameters(), strict=True))


def test_a_policy_moves_without_rewards_only_if_outcomes_are_known(tmp_path: Path) -> None:
    assert not moved(make_trainer(tmp_path / "blind", None))
    assert moved(make_trainer(tmp_path / "path", "tests.reinforce.test_novelty.beginnings"))


def test_counts_survive_a_kill(tmp_path: Path) -> None:
    calls: list[int] = []

    def failing(completions: list[str]) -> list[float]:
        calls.append(1)
        if len(calls) == 4:
            raise OSError("gone")
        return nothing(completions)

    failing.__name__ = "nothing"
    make_trainer(tmp_path / "whole", beginnings).train()
    with pytest.raises(InternalRLError, match="nothing failed"):
        make_trainer(tmp_path / "torn", beginnings, failing).train()
    make_trainer(tmp_path / "torn", beginnings).train(resume_from_checkpoint=True)
    assert read_metrics(tmp_path / "torn") == read_metrics(tmp_path / "whole")


def test_prompts_have_their_own_counts(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", beginnings)
    environment = trainer.writing.begin(trainer.writing.numbers(0, 0))
    played, _ = trainer.agent.play(environment, torch.Generator().manual_seed(0))
    tried = trainer.writing.judge(environment, played).tried
    texts = letters().batch_decode(played.actions, skip_special_tokens=True)
    assert tried == [f"{number} {text[:1]}" for number, text in zip(environment.numbers, texts, strict=True)]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [(["a"], "returned 1 values for 16 completions"), ([1] * 16, "returned 16 values"), (3, "returned a int")],
)
def test_outcomes_are_strings_one_for_each(answer: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InternalRLError, match=sentence):
        make_trainer(tmp_path / "run", lambda completions: answer).train()
