"""Internal RL on text: decoding as `generate` does, what is scored, what learns, and a problem with a known answer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.testing import assert_close

from internalrl.controller.steered import SteeredModel, bare
from internalrl.errors import InternalRLError
from internalrl.players.stepwise import Rollout, RowChance, choose, rollout
from internalrl.reinforce.agents import InternalAgent, RawTokenAgent
from internalrl.reinforce.completions import Completions, pad_prompts
from internalrl.reinforce.objective import advantages, clipped_surrogate
from internalrl.reinforce.trainer import InternalRLTrainer
from internalrl.settings.stages import InternalRLConfig
from tests.support.language import EOS, language_model, pad_left, prompts, steered_language_model
from tests.support.tiny import N_Z, close
from tests.support.written import letters, steered_to_a

HORIZON, COUNT = 12, 10
ENDS = [EOS, 5, 8, 11]  # so that some texts end early
PROMPTS = [row[: 2 + number % 4] for number, row in enumerate(prompts(COUNT, 5))]
DATASET = [{"prompt": "abc", "answer": "x"}, {"prompt": "fghij", "answer": "y"}, {"prompt": "k", "answer": "z"}]


def completions(rows: slice = slice(None), horizon: int = HORIZON) -> Completions:
    return Completions(pad_prompts([row.tolist() for row in PROMPTS[rows]]), ENDS, horizon)


def chance(rows: range = range(COUNT)) -> RowChance:
    return RowChance.draw(torch.Generator().manual_seed(5), rows, COUNT, HORIZON, N_Z)


def played(steered: SteeredModel, temperature: float = 0.0, rows: range = range(COUNT)) -> Rollout:
    """Completions of `rows`, with codes and tokens that are theirs alone."""
    noise = chance(rows)

    def propose(switched: Tensor, x: Tensor) -> Tensor:
        return noise.codes.next(torch.zeros(len(rows), dtype=torch.bool).index_fill(0, switched, True))[switched]

    return rollout(steered, completions(slice(rows.start, rows.stop)), propose, temperature, generator=noise)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen3"])
def test_a_rollout_writes_what_generate_writes(kind: str) -> None:
    """Given the same codes: prompts of several lengths, caches that drop rows, positions, sliding windows."""
    steered = steered_language_model(kind)
    found = played(steered)
    assert found.length.min() < HORIZON == found.length.max()  # so that rows are dropped
    codes = torch.zeros(COUNT, HORIZON, N_Z)
    for row in range(COUNT):
        own = found.code[row][found.switch[row]]
        codes[row, : len(own)], codes[row, len(own) :] = own, own[-1]
    options = {"max_new_tokens": HORIZON, "do_sample": False, "eos_token_id": ENDS}
    expected = steered.generate(**pad_left(PROMPTS), codes=codes, **options)[:, 5:]
    for row, length in enumerate(found.length.tolist()):
        assert torch.equal(found.actions[row, :length], expected[row, :length])
        assert length == HORIZON or expected[row, length - 1] in ENDS


def test_a_row_writes_the_same_in_any_batch() -> None:
    """Codes and sampled tokens depend on the row alone, so that processes can share a batch."""
    steered = steered_language_model()
    whole = played(steered, temperature=1.0)
    for rows in (range(5), range(5, 10), range(3, 4)):
        part = played(steered, 1.0, rows)
        longest = part.actions.shape[1]
        assert torch.equal(part.actions, whole.actions[rows.start : rows.stop, :longest])
        assert torch.equal(part.switch, whole.switch[rows.start : rows.stop, :longest])


@pytest.mark.parametrize("kind", ["internal", "raw-action"])
def test_threads_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch played in three parts, side by side, on copies that share their weights."""
    monkeypatch.setattr("internalrl.players.threads.LEAST", 2)
    steered = steered_language_model(policy=True)
    assert steered.policy is not None
    agent = InternalAgent(steered, steered.policy, 1.0) if kind == "internal" else RawTokenAgent(steered)
    weights = [tensor.data_ptr() for tensor in steered.parameters()]
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(agent.play(completions(), chance()))
        finally:
            torch.set_num_threads(before)
    (alone, decided), (parts, joined) = found
    assert torch.equal(parts.actions, alone.actions)
    assert torch.equal(parts.switch, alone.switch)
    assert torch.equal(joined.mask, decided.mask)
    close(agent.log_prob(joined)[joined.mask], agent.log_prob(decided)[decided.mask])
    assert weights == [tensor.data_ptr() for tensor in steered.parameters()]


def test_uniform_numbers_choose_as_often_as_is_likely() -> None:
    logits = torch.randn(1, 7).expand(50_000, -1)
    uniform = torch.rand(50_000)
    found = torch.bincount(choose(logits, 0.7, uniform=uniform), minlength=7) / 50_000
    assert_close(found, torch.softmax(logits[0] / 0.7, -1), atol=0.01, rtol=0)
    edges = choose(logits[:2], 1.0, uniform=torch.tensor([0.0, 1 - 1e-7]))
    assert edges.tolist() == [0, 6]


def test_only_the_policy_learns_and_the_base_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steered = steered_language_model()
    trainer = make_trainer(steered, tmp_path, epochs=2)
    before = {name: tensor.clone() for name, tensor in steered.state_dict().items()}
    run_base: Callable[..., Any] = steered.base.forward
    calls = []
    monkeypatch.setattr(
        steered.base, "forward", lambda *a, **k: (calls.append(torch.is_grad_enabled()), run_base(*a, **k))[1]
    )
    trainer.train()
    assert calls
    assert not any(calls)  # the base ran while playing only
    changed = {name for name, tensor in steered.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".policy." in name}


def test_the_ratio_is_one_at_first() -> None:
    """What the policy says of its codes is what they were drawn with."""
    steered = steered_language_model(policy=True)
    assert steered.policy is not None
    agent = InternalAgent(steered, steered.policy)
    result, decisions = agent.play(completions(), chance())
    log_prob = agent.log_prob(decisions)
    noise = chance().codes.next(torch.ones(COUNT, dtype=torch.bool))
    drawn = -0.5 * (noise**2).sum(1) - (steered.policy.log_std.sum() + N_Z / 2 * np.log(2 * np.pi))
    close(log_prob[:, 0], drawn)
    assert torch.equal(decisions.mask.sum(1), result.switch.sum(1))
    advantage = torch.randn(COUNT)
    loss = clipped_surrogate(log_prob, log_prob.detach(), advantage, decisions.mask, 0.2)
    close(loss, -(advantage[:, None] * decisions.mask).sum() / decisions.mask.sum())


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_raw_tokens_are_scored_as_the_bare_base_would(temperature: float) -> None:
    base = language_model()
    agent = RawTokenAgent(bare(base), temperature)
    result, decisions = agent.play(completions(), chance())
    log_prob = agent.log_prob(decisions)
    for row, prompt in enumerate(PROMPTS):
        tokens = result.actions[row, : result.length[row]]
        logits = base(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1] / temperature
        expected = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
        close(log_prob[row][decisions.mask[row]], expected)
    log_prob[decisions.mask].sum().backward()
    assert all(p.grad is not None for p in base.parameters())
    assert all(p.grad is None for p in agent.steered.metacontroller.parameters())


def test_parts_of_a_loss_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw tokens scored a few texts at a time give the same update."""
    found = []
    for together in (1000, 3):
        monkeypatch.setattr("internalrl.reinforce.agents.SCORED_TOGETHER", together)
        base = language_model()
        make_trainer(base, tmp_path / str(together), agent="raw-action", temperature=1.0, lr=1e-3).train()
        found.append(base.state_dict())
    for name, tensor in found[0].items():
        assert_close(tensor, found[1][name], atol=1e-5, rtol=1e-4)


def test_prompts_are_compared_with_themselves() -> None:
    reward = torch.tensor([1.0, 0.0, 5.0, 5.0, 3.0, 9.0])
    groups = torch.tensor([2, 2, 0, 0, 1, 1])
    expected = torch.tensor([0.5 / 0.501, -0.5 / 0.501, 0.0, 0.0, -3 / 3.001, 3 / 3.001])
    assert_close(advantages(reward, groups), expected)
    assert torch.equal(advantages(reward, torch.zeros(6, dtype=torch.long)), advantages(reward))


# ---------------------------------------------------------------------------------------------------- the trainer


def vowels(completions: list[str], **columns: list[Any]) -> list[float]:
    return [sum(letter in "aeio" for letter in text) / HORIZON for text in completions]


def make_trainer(
    model: Any, folder: Path, reward_funcs: Any = vowels, dataset: Any = None, **settings: Any
) -> InternalRLTrainer:
    values: dict[str, Any] = {
        "episodes": 3 * 16, "batch_size": 16, "num_generations": 4, "max_completion_length": HORIZON, "epochs": 2,
        "policy_hidden": 6, **settings,
    }  # fmt: skip
    args = InternalRLConfig(output_dir=folder / "run", overwrite_output_dir=True, **values)
    return InternalRLTrainer(model, reward_funcs, args, DATASET if dataset is None else dataset, letters())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_rewards_are_asked_as_in_trl(tmp_path: Path) -> None:
    """Prompts, completions, tokens and the other columns in; several functions, one a coroutine; None; weights."""
    seen: list[dict[str, Any]] = []

    def first(prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[str]) -> Any:
        seen.append({"prompts": prompts, "answer": answer, "completions": completions, "ids": completion_ids})
        return [1.0 if number % 2 else None for number in range(len(prompts))]

    async def second(completions: list[str], **columns: Any) -> list[float]:
        assert columns.keys() == {"prompts", "completion_ids", "answer"}
        return [0.25] * len(completions)

    make_trainer(steered_language_model(), tmp_path, [first, second], reward_weights=(2.0, 4.0)).train()
    tokenizer, answers = letters(), {row["prompt"]: row["answer"] for row in DATASET}
    assert len(seen) == 3
    for batch in seen:
        assert [answers[prompt] for prompt in batch["prompts"]] == batch["answer"]
        assert {batch["prompts"].count(prompt) % 4 for prompt in batch["prompts"]} == {0}
        assert batch["completions"] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["ids"]]
    metrics = lines(tmp_path)[0]
    assert metrics["rewards/first/mean"] == 1
    assert metrics["rewards/second/mean"] == 0.25
    assert metrics["reward"] == pytest.approx(0.5 * 2 + 0.25 * 4)
    assert metrics["reward_std"] == pytest.approx(1.0)
    assert metrics["frac_reward_zero_std"] == 0
    lengths = [len(ids) for ids in seen[0]["ids"]]
    assert metrics["completions/mean_length"] == np.mean(lengths)
    assert metrics["completions/clipped_ratio"] == np.mean([ids[-1] != EOS for ids in seen[0]["ids"]])
    assert metrics["entropy"] > 0


def test_metrics_go_to_a_tracker_where_asked(tmp_path: Path) -> None:
    """As its name is no setting of the run, a run goes on without the tracker that it began with."""
    make_trainer(steered_language_model(), tmp_path, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "reinforce")).Reload()
    shown = [event.value for event in events.Scalars("reward")]
    assert shown == pytest.approx([line["reward"] for line in lines(tmp_path)], rel=1e-6)
    make_trainer(steered_language_model(), tmp_path).train(resume_from_checkpoint=True)


def test_messages_are_answered_with_messages(tmp_path: Path) -> None:
    tokenizer = letters()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}k{% endif %}"
    )
    asked = []

    def reward(prompts: list[Any], completions: list[Any]) -> list[float]:
        asked.append((prompts, completions))
        return [0.0] * len(prompts)

    message = [{"role": "user", "content": "abc"}]
    args = InternalRLConfig(
        output_dir=tmp_path / "run", episodes=8, batch_size=8, num_generations=8, max_completion_length=4
    )
    trainer = InternalRLTrainer(steered_language_model(), reward, args, [{"prompt": message}], tokenizer)
    assert tokenizer.decode(trainer.writing.prompts[0]) == "abck"
    trainer.train()
    given, answered = asked[0]
    assert given == [message] * 8
    assert {(answer[0]["role"], len(answer)) for answer in answered} == {("assistant", 1)}


def test_what_was_learned_is_in_the_adapter(tmp_path: Path) -> None:
    steered = steered_language_model()
    trainer = make_trainer(steered, tmp_path)
    summary = trainer.train()
    again = SteeredModel.from_pretrained(language_model(), tmp_path / "run" / "adapter")
    assert again.policy is not None
    assert steered.policy is not None
    for name, tensor in steered.policy.state_dict().items():
        assert torch.equal(again.policy.state_dict()[name], tensor)
    assert summary["episodes"] == 48
    raw = language_model()
    make_trainer(raw, tmp_path / "raw", agent="raw-action", temperature=1.0).train()
    saved = type(raw).from_pretrained(tmp_path / "raw" / "run" / "model")
    assert torch.equal(saved.get_input_embeddings().weight, raw.get_input_embeddings().weight)
    with pytest.raises(InternalRLError, match="load the base that it was trained on"):
        SteeredModel.from_pretrained(language_model(seed=1), tmp_path / "run" / "adapter")


@pytest.mark.parametrize(("agent", "replay"), [("internal", 0), ("internal", 8), ("raw-action", 0)])
def test_a_failing_reward_loses_nothing(agent: str, replay: int, tmp_path: Path) -> None:
    """The run goes on where it failed, and ends as one that never did."""

    def model() -> Any:
        return steered_language_model() if agent == "internal" else language_model()

    settings = {"agent": agent, "replay": replay, "temperature": 0.7, "episodes": 5 * 16}
    make_trainer(model(), tmp_path / "whole", **settings).train()
    calls = []

    def failing(completions: list[str], **columns: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("a typing error")
        return vowels(completions)

    failing.__name__ = "vowels"
    with pytest.raises(InternalRLError, match=r"vowels failed \(KeyError: 'a typing error'\); nothing is lost"):
        make_trainer(model(), tmp_path / "torn", failing, **settings).train()
    make_trainer(model(), tmp_path / "torn", **settings).train(resume_from_checkpoint=True)
    assert lines(tmp_path / "torn") == lines(tmp_path / "whole")
    (file,) = [f.relative_to(tmp_path / "whole") for f in (tmp_path / "whole").rglob("*model.safetensors")]
    assert (tmp_path / "torn" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ([1.0] * 3, "returned 3 values for 16 completions"),
        ([float("nan")] * 16, "returned a number that is not finite"),
        ([float("inf")] * 16, "returned a number that is not finite"),
        (["good"] * 16, "returned 16 values"),
        (1.0, "returned a float for 16"),
        (None, "returned a NoneType for 16"),
        ([None] * 16, "No reward function scores completion 0"),
    ],
)
def test_answers_that_are_refused(answer: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InternalRLError, match=sentence):
        make_trainer(steered_language_model(), tmp_path, lambda completions: answer).train()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dataset": []}, "empty"),
        ({"dataset": [{"text": "a"}]}, "no text or messages in `prompt`"),
        ({"dataset": [{"prompt": ""}]}, "no text or messages in `prompt`"),
        ({"dataset": [{"prompt": "a"}, {"prompt": "a" * 60}]}, "prompt of row 1 has 60 tokens"),
        ({"reward_funcs": []}, "reward functions are called"),
        ({"reward_funcs": [vowels, vowels]}, "different names"),
        ({"reward_funcs": "tests.support.written.nothing"}, "no function tests.support.written.nothing"),
        ({"reward_funcs": "tests.support.written.LETTERS"}, "dotted path of a function"),
        ({"reward_weights": (1.0, 2.0)}, "2 reward weights for 1"),
        ({"num_generations": 5}, "multiple of num_generations"),
        ({"model": language_model()}, "needs a steered model"),
        ({"model": language_model(), "agent": "raw-action"}, "temperature above 0"),
        ({"model": steered_language_model("mamba2")}, "finished texts cannot be dropped"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    model = changes.pop("model", None) or steered_language_model("llama", max_position_embeddings=64)
    with pytest.raises(InternalRLError, match=sentence):
        make_trainer(model, tmp_path, **changes)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    longer = letters()
    longer.add_tokens(["zz"])
    args = InternalRLConfig(output_dir=tmp_path / "run", batch_size=16)
    with pytest.raises(InternalRLError, match="belongs to the model"):
        InternalRLTrainer(steered_language_model(), vowels, args, DATASET, longer)
    with pytest.raises(InternalRLError, match="has no tokenizer"):
        InternalRLTrainer(steered_language_model(), vowels, args, DATASET)


# ------------------------------------------------------------------------------------------------- a known answer


@pytest.mark.parametrize("shuffled", [False, True])
def test_rare_codes_are_found_and_shuffled_rewards_teach_nothing(shuffled: bool, tmp_path: Path) -> None:
    """A text of "aaaa" needs a code that is drawn in 2 % of texts."""
    shuffle = random.Random(0).shuffle

    def all_a(completions: list[str]) -> list[float]:
        rewards = [float(text == "aaaa") for text in completions]
        if shuffled:
            shuffle(rewards)
        return rewards

    args = InternalRLConfig(
        output_dir=tmp_path / "run", episodes=60 * 256, batch_size=256, num_generations=256, max_completion_length=4,
        policy_hidden=8, initial_std=1.2,
    )  # fmt: skip
    trainer = InternalRLTrainer(steered_to_a(), all_a, args, [{"prompt": "bcd"}], letters())
    summary = trainer.train()
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["reward"]
    assert 0 < first < 0.05
    assert summary["success"] < 0.1 if shuffled else summary["success"] > 0.9
