"""Beside TRL itself: the same reward functions and dataset for its trainer and ours, and the same names in the logs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from internalrl.base.text_data import tokenise
from internalrl.reinforce.trainer import InternalRLTrainer
from internalrl.run.metrics import read_metrics
from internalrl.settings.stages import InternalRLConfig
from tests.support.language import language_model, steered_language_model
from tests.support.written import letters

ROWS = [{"prompt": "abc", "answer": "x"}, {"prompt": "fghij", "answer": "y"}]
BATCH, GROUP, LONGEST = 8, 4, 6

Seen = list[dict[str, Any]]


def rewards(seen: Seen) -> list[Callable[..., Any]]:
    """As TRL takes them: plain, and a coroutine without an opinion on half of what it is shown."""

    def short(completions: list[str], **columns: Any) -> list[float]:
        seen.append({"completions": completions, **columns})
        return [-float(len(text)) for text in completions]

    async def early(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
        return [None if a == "y" else float(text[:1] < "h") for text, a in zip(completions, answer, strict=True)]

    return [short, early]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's and transformers' own affair
def test_the_same_rewards_and_dataset_serve_both_trainers(tmp_path: Path) -> None:
    dataset, theirs_seen, ours_seen = Dataset.from_list(ROWS), [], []
    tokenizer = letters()
    theirs = GRPOTrainer(
        language_model(), rewards(theirs_seen), train_dataset=dataset, processing_class=tokenizer,
        args=GRPOConfig(
            output_dir=str(tmp_path / "theirs"), use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=1,
            per_device_train_batch_size=BATCH, num_generations=GROUP, max_completion_length=LONGEST, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True,
        ),
    )  # fmt: skip
    theirs.train()
    ours = InternalRLTrainer(
        steered_language_model(), rewards(ours_seen), train_dataset=dataset, processing_class=tokenizer,
        args=InternalRLConfig(
            output_dir=tmp_path / "ours", episodes=BATCH, batch_size=BATCH, num_generations=GROUP,
            max_completion_length=LONGEST, temperature=1.0,
        ),
    )  # fmt: skip
    ours.train()

    shared = {"completions", "prompts", "completion_ids", "answer"}
    (one,), (other,) = theirs_seen, ours_seen
    assert shared <= one.keys()
    assert shared == other.keys()
    for name in shared:
        assert [type(value) for value in one[name]] == [type(value) for value in other[name]]
    for name in ("prompts", "answer"):  # both compare completions of the same prompt
        assert sorted(one[name]) == sorted(other[name])

    logged = {name for line in theirs.state.log_history for name in line}
    (line,) = read_metrics(tmp_path / "ours")
    names = {name for name in line if "/" in name or name.startswith(("reward", "frac")) or name == "entropy"}
    assert {"reward", "reward_std", "frac_reward_zero_std", "rewards/short/mean", "rewards/early/std"} <= names
    assert names <= logged


def test_a_dataset_of_the_library_is_read_as_its_rows_are() -> None:
    tokenizer, config = letters(), language_model().config
    for rows in ([{"prompt": "ab", "completion": "cd"}, {"prompt": "e", "completion": "fgh"}], [{"text": "abc"}] * 2):
        mine, theirs = tokenise(rows, tokenizer, config), tokenise(Dataset.from_list(rows), tokenizer, config)
        assert mine.tokens.tolist() == theirs.tokens.tolist()
        assert mine.ends.tolist() == theirs.ends.tolist()
        assert mine.prompts.tolist() == theirs.prompts.tolist()
