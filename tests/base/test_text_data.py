"""Datasets of text as batches: what is learned, what fills up, the order of batches, and what is refused."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from internalrl.base.text_data import BUCKET, Examples, read_rows, text_batches, tokenise
from internalrl.domains.code.grammar import PROMPT, CodeConfig, sample_programs, write_jsonl
from internalrl.domains.code.tokenizer import build_tokenizer
from internalrl.errors import InternalRLError
from internalrl.run.streams import Stream

CHATML = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(CodeConfig())


def config(tokenizer: PreTrainedTokenizerFast, **options: Any) -> PreTrainedConfig:
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    return AutoConfig.for_model("llama", **{**sizes, "max_position_embeddings": 256, **options})


def corpus(count: int) -> list[dict[str, str]]:
    programs = sample_programs(CodeConfig(), count, np.random.default_rng(0))
    return [{"prompt": PROMPT, "completion": completion} for completion in programs.completions]


@pytest.fixture(scope="module")
def examples(tokenizer: PreTrainedTokenizerFast) -> Examples:
    return tokenise(corpus(50), tokenizer, config(tokenizer))


def test_a_batch_reads_back_as_the_rows(tokenizer: PreTrainedTokenizerFast, examples: Examples) -> None:
    """Masked tokens are the completion and the end; those before are the prompt; the rest is padding."""
    rows = corpus(50)
    chosen = np.array([7, 0, 49, 7])
    batch = examples.batch(chosen)
    end = tokenizer.eos_token
    for row, tokens, real, mask, prompt in zip(
        chosen, batch.tokens, batch.real, batch.mask, batch.prompts, strict=True
    ):
        assert tokenizer.decode(tokens[mask]) == rows[row]["completion"] + end
        assert tokenizer.decode(tokens[:prompt]) == PROMPT
        assert torch.equal(real, torch.arange(len(real)) < real.sum())
        assert not (tokens[~real] != tokenizer.pad_token_id).any()
        assert torch.equal(mask, real & (torch.arange(len(real)) >= prompt))


def test_text_is_learned_but_for_its_first_token(tokenizer: PreTrainedTokenizerFast) -> None:
    text = PROMPT + corpus(1)[0]["completion"]
    batch = tokenise([{"text": text}], tokenizer, config(tokenizer)).batch(np.array([0]))
    assert tokenizer.decode(batch.tokens[0]) == text + tokenizer.eos_token
    assert batch.mask[0].tolist() == [False] + [True] * (batch.tokens.shape[1] - 1)


def test_chat_is_learned_in_its_last_message(tokenizer: PreTrainedTokenizerFast) -> None:
    chatty = build_tokenizer(CodeConfig())
    chatty.chat_template = CHATML
    question, answer = {"role": "x", "content": "x"}, {"role": "assistant", "content": "return x\n"}
    messages = tokenise([{"messages": [question, answer]}], chatty, config(chatty)).batch(np.array([0]))
    split = tokenise([{"prompt": [question], "completion": [answer]}], chatty, config(chatty)).batch(np.array([0]))
    assert chatty.decode(messages.tokens[messages.mask]) == "return x\n" + chatty.eos_token
    assert torch.equal(messages.tokens, split.tokens)
    assert torch.equal(messages.mask, split.mask)
    with pytest.raises(InternalRLError, match="no chat template"):
        tokenise([{"messages": [question, answer]}], tokenizer, config(tokenizer))


def test_a_beginning_of_text_is_added_where_the_tokenizer_does() -> None:
    from tokenizers.processors import TemplateProcessing

    beginning = build_tokenizer(CodeConfig())
    beginning.bos_token = "<unk>"
    number = beginning.bos_token_id
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", number)]
    )
    for row in ({"text": "return x\n"}, {"prompt": "", "completion": "return x\n"}):
        batch = tokenise([row], beginning, config(beginning)).batch(np.array([0]))
        assert batch.tokens[0, 0] == number
        assert beginning.decode(batch.tokens[batch.mask]) == "return x\n" + beginning.eos_token


def test_a_file_and_a_list_are_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", CodeConfig(), 50, np.random.default_rng(0))
    read = tokenise(tmp_path / "corpus.jsonl", tokenizer, config(tokenizer))
    given = tokenise(corpus(50), tokenizer, config(tokenizer))
    assert np.array_equal(read.tokens, given.tokens)
    assert np.array_equal(read.ends, given.ends)


def test_a_later_start_goes_on_as_the_first_run(examples: Examples) -> None:
    """Also in the middle of a bucket, and in a later epoch."""
    steps = 3 * BUCKET + 5
    whole = list(islice(text_batches(examples, 4, 1, Stream.PRETRAIN), steps))
    for start in (1, BUCKET, 2 * BUCKET + 3):
        for expected, found in zip(
            whole[start:], islice(text_batches(examples, 4, 1, Stream.PRETRAIN, start), steps), strict=False
        ):
            assert torch.equal(expected.tokens, found.tokens)
    other = next(text_batches(examples, 4, 2, Stream.PRETRAIN))
    assert other.tokens.shape != whole[0].tokens.shape or not torch.equal(other.tokens, whole[0].tokens)


def test_an_epoch_shows_every_text_once(examples: Examples) -> None:
    """50 texts, 5 at a time, 8 batches drawn together: 40 of 50, then 10 and 30 of the next 50."""
    seen = [int(n) for batch in islice(text_batches(examples, 5, 0, Stream.PRETRAIN), 40) for n in batch.real.sum(1)]
    assert len(seen) == 200
    assert sorted(seen) == sorted(examples.lengths.tolist() * 4)


def test_what_is_too_long_is_cut(tokenizer: PreTrainedTokenizerFast, examples: Examples) -> None:
    cut = tokenise(corpus(50), tokenizer, config(tokenizer), max_length=40)
    assert cut.lengths.tolist() == [min(40, length) for length in examples.lengths]
    short = tokenise(corpus(50), tokenizer, config(tokenizer, max_position_embeddings=30))
    assert short.lengths.max() == 30


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "empty"),
        ([{"question": "x"}], "columns question; give"),
        ([{"prompt": "x"}], "columns prompt; give"),
        ([{"text": 3}], "columns text; give"),
        (["x"], "holds strs"),
        (iter([]), "datasets.Dataset"),
        ([{"prompt": "[]" * 300, "completion": "x"}], "no room"),
    ],
)
def test_datasets_that_are_refused(rows: Any, sentence: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InternalRLError, match=sentence):
        tokenise(rows, tokenizer, config(tokenizer, max_position_embeddings=20))


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InternalRLError, match="Cannot read"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InternalRLError, match="empty"):
        read_rows(tmp_path / "empty.jsonl")
    (tmp_path / "torn.jsonl").write_text(json.dumps({"text": "x"}) + '\n{"text": ')
    with pytest.raises(InternalRLError, match="Line 2"):
        read_rows(tmp_path / "torn.jsonl")


@pytest.mark.parametrize("options", [{"vocab_size": 20}, {"eos_token_id": 7}])
def test_another_models_tokenizer_is_refused(options: dict[str, int], tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InternalRLError, match="tokenizer that belongs to the model"):
        tokenise(corpus(1), tokenizer, config(tokenizer, **options))
