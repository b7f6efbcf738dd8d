"""Conversations with environments: what is read, what is decided, how tools are called, beside TRL's own trainer."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from internalrl.controller.policy import Policy
from internalrl.controller.steered import SteeredModel, bare
from internalrl.errors import InternalRLError
from internalrl.players.stepwise import RowChance, rollout
from internalrl.reinforce.agents import InternalAgent, RawTokenAgent
from internalrl.reinforce.conversations import Conversations, Host
from internalrl.reinforce.trainer import InternalRLTrainer
from internalrl.run.metrics import read_metrics
from internalrl.settings.stages import InternalRLConfig
from tests.support.conversing import CALL, PROMPT, Box, conversational, right, rows, steered_answers, talking
from tests.support.language import prompts, randomise, steered_language_model
from tests.support.tiny import N_Z, close

HORIZON = 64
ENDS = [talking().eos_token_id]


def tokens(text: str) -> list[int]:
    found: list[int] = talking()(text, add_special_tokens=False)["input_ids"]
    return found


def conversations(count: int = 6, horizon: int = HORIZON, factory: Any = Box) -> Conversations:
    host = Host(factory, talking(), ENDS)
    return Conversations(host.begin(rows(count)), host, horizon, np.arange(count))


def of_what_it_reads(rows: Tensor, x: Tensor) -> Tensor:
    return 3 * x[:, :N_Z]


@pytest.fixture
def steered() -> SteeredModel:
    """Its switch fires at about every other token, and its codes disturb the model a little."""
    found = steered_answers()
    up = found.metacontroller.up.clone()
    randomise(found)
    with torch.no_grad():
        found.metacontroller.up.copy_(0.02 * up)
    return found


def test_tools_answer_and_the_model_reads_on(steered: SteeredModel) -> None:
    environment = conversations()
    result = rollout(steered, environment, of_what_it_reads)
    for row, talk in enumerate(environment.talks):
        written = result.actions[row, : result.length[row]].tolist()
        secret, answer = talk.environment.secret, "PQ".replace(talk.environment.secret, "")
        assert talking().decode(written) == f"{CALL}<tool>{secret}<end><model>{answer}<end>"
        assert talk.read == tokens(PROMPT) + written
        given = result.given[row, : result.length[row]]
        assert given.tolist() == [len(tokens(CALL)) <= t < len(written) - 2 for t in range(len(written))]
        call, tool, last = talk.completion
        assert call["tool_calls"][0]["function"] == {"name": "look", "arguments": {}}
        assert tool == {"role": "tool", "name": "look", "content": secret}
        assert last == {"role": "assistant", "content": answer}


def test_an_answer_is_read_as_a_prompt_is(steered: SteeredModel) -> None:
    """History, switches and codes of the second turn are those of a text that begins with all before it."""
    environment = conversations()
    result = rollout(steered, environment, of_what_it_reads)
    assert not (result.switch & result.given).any()
    assert 2 < result.switch.sum(1).float().mean() < 40
    for row, talk in enumerate(environment.talks):
        opened = len(talk.read) - 2 - len(tokens(PROMPT))  # the step that wrote the second turn's first token
        assert result.switch[row, 0]
        assert result.switch[row, opened]
        decoding = steered.start(1)
        for step in (0, 1):
            seen = talk.read[: -2 + step] if step == 0 else talk.read[-2:-1]
            fresh = steered.step(torch.tensor([seen]), decoding, of_what_it_reads)
            assert result.switch[row, opened + step] == fresh.switch[0]
            assert_close(result.switch_logit[row, opened + step], fresh.switch_logit[0], atol=1e-4, rtol=1e-4)
            assert_close(result.code[row, opened + step], fresh.code[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_silent_rows_are_not_steered(kind: str) -> None:
    """Logits are those of one forward pass that is steered where something was decided, and nowhere else."""
    steered, texts = steered_language_model(kind), prompts(5, 14)
    silent = torch.rand(5, 11, generator=torch.Generator().manual_seed(0)) < 0.4
    silent[:, 0] = False
    decoding, steps = steered.start(5), []
    for t in range(11):
        seen = texts[:, :4] if t == 0 else texts[:, t + 3, None]
        steps.append(steered.step(seen, decoding, of_what_it_reads, silent[:, t]))
    switch = torch.stack([step.switch for step in steps], 1)
    assert not (switch & silent).any()
    assert switch[:, 1:][silent[:, :-1] & ~silent[:, 1:]].all()  # the next that is not silent opens a segment
    assert not switch[:, 1:][~silent[:, :-1] & ~silent[:, 1:]].all()
    where, code = F.pad(~silent, (3, 0)), F.pad(torch.stack([step.code for step in steps], 1), (0, 0, 3, 0))
    expected = steered(input_ids=texts, code=code, where=where).logits[:, 3:]
    found = torch.stack([step.logits for step in steps], 1)
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
    everywhere = steered(input_ids=texts, code=code, where=F.pad(silent | ~silent, (3, 0))).logits[:, 3:]
    assert (everywhere - expected).abs().max() > 0.1


def test_the_models_own_tokens_are_steered(steered: SteeredModel) -> None:
    """They are the best ones of a forward pass that is steered where the model decided, and nowhere else."""
    environment = conversations()
    result = rollout(steered, environment, of_what_it_reads)
    before, decided = len(tokens(PROMPT)) - 1, result.mask & ~result.given
    for row, talk in enumerate(environment.talks):
        seen, length = torch.tensor([talk.read[:-1]]), int(result.length[row])
        where, code = torch.zeros_like(seen, dtype=torch.bool), torch.zeros(1, seen.shape[1], N_Z)
        where[0, before:], code[0, before:] = decided[row, :length], result.code[row, :length]
        best = steered(input_ids=seen, code=code, where=where).logits[0, before:].argmax(-1)
        own = decided[row, :length]
        assert torch.equal(best[own], result.actions[row, :length][own])


def chance(count: int) -> RowChance:
    return RowChance.draw(torch.Generator().manual_seed(5), range(count), count, HORIZON, N_Z)


@pytest.mark.parametrize("kind", ["internal", "raw-action"])
def test_parts_of_a_batch_are_the_whole(kind: str, steered: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are dropped, and threads with their own parts, change nobody's conversation."""
    monkeypatch.setattr("internalrl.players.threads.LEAST", 2)
    steered.policy = Policy(steered.metacontroller.width, N_Z, hidden=6, initial_std=1.2)
    agent = InternalAgent(steered, steered.policy, 1.0) if kind == "internal" else RawTokenAgent(steered, 1.0)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            environment = conversations(10)
            found.append((*agent.play(environment, chance(10)), [talk.read for talk in environment.talks]))
        finally:
            torch.set_num_threads(before)
    (alone, decided, said), (parts, joined, again) = found
    assert said == again
    assert torch.equal(parts.actions, alone.actions)
    assert torch.equal(parts.given, alone.given)
    close(agent.log_prob(joined)[joined.mask], agent.log_prob(decided)[decided.mask])


def test_only_own_tokens_are_scored() -> None:
    base = conversational()
    agent = RawTokenAgent(bare(base), 0.7)
    environment = conversations(8)
    result, decisions = agent.play(environment, chance(8))
    assert torch.equal(decisions.mask, result.mask & ~result.given)
    assert result.given.any()
    log_prob = agent.log_prob(decisions)
    for row, talk in enumerate(environment.talks):
        logits = base(torch.tensor([talk.read])).logits[0, len(tokens(PROMPT)) - 1 : -1] / 0.7
        expected = torch.log_softmax(logits, -1).gather(1, result.actions[row, : len(logits), None])[:, 0]
        own = decisions.mask[row]
        close(log_prob[row][own], expected[own[: len(logits)]])


# ------------------------------------------------------------------------------------------------------- the tools


class Desk:
    """Tools of all kinds; what the model says is put into its mouth."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def reset(self, **columns: Any) -> None:
        self.asked.clear()

    def add(self, a: int, b: int = 1) -> int:
        """Add.

        Args:
            a: one number.
            b: the other.
        """
        self.asked.append((a, b))
        return a + b

    async def wait(self, seconds: float) -> str:
        """Wait.

        Args:
            seconds: how long.
        """
        await asyncio.sleep(0)
        return f"waited {seconds}"

    def _private(self) -> None:
        raise AssertionError

    def get_reward(self) -> float:
        return float(len(self.asked))


def said(text: str, factory: Any = Desk, horizon: int = 500) -> Conversations:
    """One conversation in which the model says `text`, turn by turn, whatever it is asked."""
    host = Host(factory, talking(), ENDS)
    environment = Conversations(host.begin([{}]), host, horizon, np.arange(1))
    words = iter(tokens(text))
    for _ in range(horizon):
        if not environment.alive[0]:
            break
        environment.step(np.array([-1 if environment.given[0] else next(words)]))
    return environment


def call(name: str, arguments: str) -> str:
    return f'<call>{{"name": "{name}", "arguments": {arguments}}}</call>'


@pytest.mark.parametrize(
    ("turn", "answer", "failures"),
    [
        (call("add", '{"a": 2, "b": 3}'), "5", 0),
        (call("add", '{"a": 2}'), "3", 0),
        (call("wait", '{"seconds": 0.5}'), "waited 0.5", 0),
        (call("add", '{"c": 2}'), "{'error':", 1),
        (call("subtract", "{}"), "{'error': 'Tool subtract not found.'}", 1),
        (call("reset", "{}"), "{'error': 'Tool reset not found.'}", 1),
        (call("_private", "{}"), "{'error': 'Tool _private not found.'}", 1),
        (call("get_reward", "{}"), "{'error': 'Tool get_reward not found.'}", 1),
    ],
)
def test_a_tool_is_called(turn: str, answer: str, failures: int) -> None:
    (talk,) = said(f"{turn}<end>fine<end>").talks
    assert talk.completion[1]["content"].startswith(answer)
    assert talk.completion[2] == {"role": "assistant", "content": "fine"}
    assert (talk.calls, talk.failures) == (1, failures)
    assert (
        talking().decode(talk.read).endswith(f"{turn}<end><tool>{talk.completion[1]['content']}<end><model>fine<end>")
    )


def test_several_calls_of_a_turn_are_answered_in_order() -> None:
    turn, more = call("wait", '{"seconds": 1}') + call("add", '{"a": 1}'), call("add", '{"a": 5}')
    (talk,) = said(f"{turn}<end>{more}<end>so<end>").talks
    assert [message["content"] for message in talk.completion if message["role"] == "tool"] == ["waited 1", "2", "6"]
    assert talk.environment.asked == [(1, 1), (5, 1)]


@pytest.mark.parametrize(
    "turn", ["<call>{no json</call>", "<call>[1]</call>", '<call>{"name": "add"}</call>', "<call>"]
)
def test_what_makes_no_sense_is_text(turn: str) -> None:
    (talk,) = said(f"{turn}<end>").talks
    assert [message["role"] for message in talk.completion] == ["assistant"]
    assert not talk.calls


def test_an_answer_without_room_ends_a_conversation() -> None:
    turn = call("wait", '{"seconds": 1}')
    enough = len(tokens(f"{turn}<end><tool>waited 1<end><model>")) + 1
    (talk,) = said(f"{turn}<end>x<end>", horizon=enough).talks
    assert len(talk.read) - len(tokens("<tool>add<end><tool>wait<end><user><end><model>")) == enough
    (talk,) = said(f"{turn}<end>x<end>", horizon=enough - 1).talks
    assert [message["role"] for message in talk.completion] == ["assistant"]
    assert talking().decode(talk.read).endswith("</call><end>")


def test_a_notebook_has_a_loop_already() -> None:
    async def cell() -> Any:
        return said(call("wait", '{"seconds": 2}') + "<end>x<end>").talks[0].completion[1]["content"]

    assert asyncio.run(cell()) == "waited 2"


def test_instances_are_used_again() -> None:
    made = []

    def factory() -> Desk:
        made.append(Desk())
        return made[-1]

    host = Host(factory, talking(), ENDS)
    first, second = (host.begin([{}] * 3) for _ in range(2))
    assert len(made) == 3 == len({id(talk.environment) for talk in first})
    assert [talk.environment for talk in first] == [talk.environment for talk in second]


# ----------------------------------------------------------------------------------------------------- the trainer


def trainer(model: Any, folder: Path, factory: Any = Box, dataset: Any = None, **more: Any) -> InternalRLTrainer:
    values: dict[str, Any] = {
        "episodes": 16, "batch_size": 8, "num_generations": 4, "max_completion_length": HORIZON, "policy_hidden": 6,
    }  # fmt: skip
    functions = more.pop("reward_funcs", right)
    args = InternalRLConfig(output_dir=folder / "run", **{**values, **more})
    dataset = rows(4) if dataset is None else dataset
    return InternalRLTrainer(model, functions, args, dataset, talking(), environment_factory=factory)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # TRL's own affair
def test_the_same_environment_serves_trl(tmp_path: Path) -> None:
    """At a temperature that leaves no choice: the same prompts, tokens, messages, rewards and names in the logs."""
    from trl import GRPOConfig, GRPOTrainer

    seen: list[list[Any]] = [[], []]

    def judge(number: int) -> Any:
        def right_letter(prompts: Any, completions: Any, completion_ids: Any, environments: Any, **more: Any) -> Any:
            secrets = [environment.secret for environment in environments]
            seen[number] += [list(row) for row in zip(secrets, prompts, completions, completion_ids, strict=True)]
            return [float(row[-1]["content"] == secret) for row, secret in zip(completions, secrets, strict=True)]

        return right_letter

    theirs = GRPOTrainer(
        conversational(), judge(0), train_dataset=Dataset.from_list(rows(4)), processing_class=talking(),
        environment_factory=Box,
        args=GRPOConfig(
            output_dir=str(tmp_path / "theirs"), use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=1,
            per_device_train_batch_size=16, num_generations=4, max_completion_length=HORIZON, logging_steps=1,
            temperature=0.01, save_strategy="no", report_to="none", disable_tqdm=True,
        ),
    )  # fmt: skip
    theirs.train()
    trainer(
        conversational(), tmp_path, reward_funcs=judge(1), agent="raw-action", temperature=0.01, batch_size=16
    ).train()
    key = str
    assert sorted(seen[0], key=key) == sorted(seen[1], key=key)
    assert len(seen[0]) == 16
    logged = {name for line in theirs.state.log_history for name in line}
    (line,) = read_metrics(tmp_path / "run")
    assert {name for name in line if name.startswith("tools/")} == {
        name for name in logged if name.startswith("tools/")
    }
    assert line["tools/call_frequency"] == 1
    assert line["tools/failure_frequency"] == 0


def test_an_environment_may_own_prompts_and_reward(tmp_path: Path) -> None:
    class Dice:
        def reset(self, **columns: Any) -> str:
            return f"go: which? {random.Random(0).random()}"

        async def get_reward(self) -> float:
            return 0.25

    found = trainer(steered_answers(), tmp_path, Dice, [], reward_funcs=())
    summary = found.train()
    assert summary["episodes"] == 16
    assert {line["rewards/Dice/mean"] for line in read_metrics(tmp_path / "run")} == {0.25}


def test_rows_choose_among_environments(tmp_path: Path) -> None:
    class Deaf:
        def reset(self, **columns: Any) -> None:
            assert "environment" not in columns

        def get_reward(self) -> float:
            return 1.0

    seen = []

    def kinds(environments: list[Any], environment: list[str], **columns: Any) -> list[float | None]:
        seen.extend((type(e).__name__, name) for e, name in zip(environments, environment, strict=True))
        return [None if name == "deaf" else 0.5 for name in environment]

    dataset = [{**row, "environment": name} for row, name in zip(rows(2), ("box", "deaf"), strict=True)]
    trainer(steered_answers(), tmp_path, {"box": Box, "deaf": Deaf}, dataset, reward_funcs=kinds).train()
    assert set(seen) == {("Box", "box"), ("Deaf", "deaf")}
    assert {line["rewards/Deaf/mean"] for line in read_metrics(tmp_path / "run")} == {1.0}


def test_a_reset_that_fails_loses_nothing(tmp_path: Path) -> None:
    """The run goes on where it failed, and ends as one that never did."""
    resets: list[int] = []

    class Tired(Box):
        def reset(self, secret: str, **columns: Any) -> str:
            resets.append(1)
            if len(resets) == 14:  # in the second iteration
                raise OSError("too tired")
            return super().reset(secret)

    trainer(steered_answers(), tmp_path / "whole", episodes=24).train()
    with pytest.raises(InternalRLError, match=r"Tired could not be reset \(OSError: too tired\); nothing is lost"):
        trainer(steered_answers(), tmp_path / "torn", Tired, episodes=24).train()
    trainer(steered_answers(), tmp_path / "torn", Tired, episodes=24).train(resume_from_checkpoint=True)
    assert read_metrics(tmp_path / "torn" / "run") == read_metrics(tmp_path / "whole" / "run")


class Silent:
    """Has no reset."""


class Untold(Box):
    def ask(self, what):  # type: ignore[no-untyped-def]
        return what


class Broken(Box):
    def reset(self, **columns: Any) -> str:
        raise KeyError("secret")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"factory": Silent}, "environment Silent has no method `reset`"),
        ({"factory": Untold}, "tools of Untold cannot be shown"),
        ({"factory": Broken}, "environment Broken could not be reset .KeyError: 'secret'."),
        ({"factory": {"box": Box}}, "asks for the environment None; known are box"),
        ({"dataset": [{"prompt": "go"}]}, "Row 0 has no messages in `prompt`"),
        ({"reward_funcs": []}, "reward functions are called"),
        ({"max_completion_length": 120}, "more than the model's context of 128"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InternalRLError, match=sentence):
        trainer(steered_answers(), tmp_path, **changes)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("chat_template", None, "cannot be shown to the model"),
        ("chat_template", "{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}", "leaves out what"),
        ("response_template", None, "has no response_template"),
    ],
)
def test_a_tokenizer_must_know_tools(name: str, value: Any, sentence: str) -> None:
    tokenizer = talking()
    setattr(tokenizer, name, value)
    with pytest.raises(InternalRLError, match=sentence):
        Host(Box, tokenizer, ENDS)


@pytest.mark.parametrize("deaf", [False, True])
def test_the_policy_learns_to_say_what_it_was_told(deaf: bool, tmp_path: Path) -> None:
    """The base says the other letter. Where tools answer the same whatever the letter is, there is nothing to learn."""

    class Deaf(Box):
        def look(self) -> str:
            """What is in some box."""
            return "P"

    args: dict[str, Any] = {
        "episodes": 30 * 256, "batch_size": 256, "num_generations": 4, "policy_hidden": 16, "lr": 1e-2,
    }  # fmt: skip
    summary = trainer(steered_answers(), tmp_path, Deaf if deaf else Box, rows(64), **args).train()
    first = read_metrics(tmp_path / "run")[0]["reward"]
    assert first < 0.6
    assert summary["success"] < 0.7 if deaf else summary["success"] > 0.9
