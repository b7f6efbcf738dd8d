"""Text as batches of tokens: read from JSONL, a list or `datasets`, padded on the right, the same for every resume.

A dataset has one of these forms, as in TRL; what is learned is the completion, and the end of text after it.

    {"text": "…"}                                   all of it
    {"prompt": "…", "completion": "…"}              the completion
    {"messages": [{"role": …, "content": …}, …]}    the last message
    {"prompt": [messages], "completion": [messages]}

Prompt and completion become tokens separately, so that a completion begins where one that is generated would.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from internalrl.errors import InternalRLError
from internalrl.run.streams import Stream

Rows = Sequence[Mapping[str, Any]]
"""A dataset: a list of dicts, or a `datasets.Dataset`, which is one to its reader."""

BUCKET = 8  # batches that are drawn together and sorted by length, so that padding is short


@dataclass(frozen=True)
class Examples:
    """N texts as tokens, one after the other in `tokens`; text i is tokens[ends[i − 1] : ends[i]]."""

    tokens: NDArray[np.int32]
    ends: NDArray[np.int64]
    prompts: NDArray[np.int64]
    """(N,): tokens of each text's prompt, which are read and not learned."""
    pad: int
    """The token that fills up a batch; it is never learned, whatever it is."""

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,): tokens of each text, prompt and end of text included."""
        return np.diff(self.ends, prepend=0)

    def batch(self, rows: NDArray[np.integer]) -> TextBatch:
        """The texts numbered `rows` (B,)."""
        lengths = self.lengths[rows]
        steps = np.arange(lengths.max())
        real = steps < lengths[:, None]
        index = np.where(real, (self.ends[rows] - lengths)[:, None] + steps, 0)
        tokens = np.where(real, self.tokens[index], self.pad).astype(np.int64)
        learned = real & (steps >= np.maximum(self.prompts[rows], 1)[:, None])  # nothing predicts a first token
        return TextBatch(*(torch.from_numpy(x) for x in (tokens, real, learned, self.prompts[rows])))


@dataclass
class TextBatch:
    """B texts of up to T tokens.

    `tokens` (B, T) int64, `real` (B, T) bool, False at padding, which is on the right; `mask` (B, T) bool, True at
    tokens to be learned: those of completions, and the end of text. `prompts` (B,) int64, length of each prompt.
    """

    tokens: Tensor
    real: Tensor
    mask: Tensor
    prompts: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


def read_rows(source: Rows | str | Path) -> Rows:
    """The rows of a dataset that is given, or of a JSONL file; InternalRLError where there are none."""
    rows = _read_jsonl(Path(source)) if isinstance(source, str | Path) else source
    where = source if isinstance(source, str | Path) else "The dataset"
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise InternalRLError(
            f"The dataset is a {type(rows).__name__}; give a list of dicts, a datasets.Dataset (not a streamed one) or "
            "a JSONL file."
        )
    if not len(rows):
        raise InternalRLError(f"{where} is empty; give at least one row.")
    if not isinstance(rows[0], Mapping):
        raise InternalRLError(f"{where} holds {type(rows[0]).__name__}s; give rows with named columns, as dicts.")
    return rows


def _read_jsonl(file: Path) -> Rows:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise InternalRLError(f"Cannot read {file} ({error}); give a JSONL file in UTF-8.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise InternalRLError(f"Line {number} of {file} is no JSON ({error}); give one object a line.") from error
        if row is not None:
            rows.append(row)
    return rows


def tokenise(
    rows: Rows | str | Path, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, max_length: int | None = None
) -> Examples:
    """`rows` as tokens for the model with this `config`; every completion ends with the end-of-text token.

    Args:
        max_length: tokens of a text, by default the model's context; what goes beyond is cut off the completion.

    Raises:
        InternalRLError: no rows, missing columns, a tokenizer of another vocabulary, a prompt that fills `max_length`.
    """
    rows = read_rows(rows)
    check_tokenizer(tokenizer, config)
    longest = min(max_length or 10**9, context_length(config) or 10**9)
    texts = [_split(row, tokenizer, number) for number, row in enumerate(rows)]
    prompts = encode_prompts([prompt for prompt, _ in texts], tokenizer)
    completions = _encode([completion for _, completion in texts], tokenizer)
    parts: list[list[int]] = []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if len(prompt) >= longest:
            raise InternalRLError(
                f"The prompt of row {number} is {len(prompt)} tokens long, which leaves no room for a completion in "
                f"{longest}; shorten it, or leave the row out."
            )
        parts.append([*prompt, *completion, tokenizer.eos_token_id][:longest])
    ends = np.cumsum([len(part) for part in parts])
    tokens = np.fromiter((token for part in parts for token in part), np.int32, int(ends[-1]))
    return Examples(tokens, ends, np.array([len(prompt) for prompt in prompts]), pad_token(tokenizer))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """InternalRLError unless every token of the tokenizer is one of the model's, and one ends a text."""
    size = config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise InternalRLError(
            f"The tokenizer knows {len(tokenizer)} tokens, but the model's vocabulary has {size}; use the tokenizer "
            "that belongs to the model."
        )
    ends = config.get_text_config().eos_token_id
    known = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id is None or (ends is not None and tokenizer.eos_token_id not in known):
        raise InternalRLError(
            f"The tokenizer ends a text with token {tokenizer.eos_token_id}, the model with {ends}; use the tokenizer "
            "that belongs to the model."
        )


def context_length(config: PretrainedConfig) -> int | None:
    """The most tokens that the model can read; None where nothing limits them."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills up a batch: the tokenizer's own padding, or the end of text."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    assert isinstance(token, int)
    return token


def prompt_text(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as the model reads it: text as it is, messages through the chat template up to the model's turn."""
    return prompt if isinstance(prompt, str) else _chat(tokenizer, prompt, answer=True)


def encode_prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of prompts, after a beginning-of-text token if the tokenizer puts one there."""
    empty: list[int] = tokenizer("")["input_ids"]
    begin = empty[:1] if empty[:1] == [tokenizer.bos_token_id] else []
    return [tokens if tokens[:1] == begin else begin + tokens for tokens in _encode(texts, tokenizer)]


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return encoded


def _split(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, number: int) -> tuple[str, str]:
    """A row as the texts of its prompt and its completion."""
    match dict(row):
        case {"prompt": str(prompt), "completion": str(completion)}:
            return prompt, completion
        case {"prompt": list(prompt), "completion": list(completion)} if prompt and completion:
            return _split_chat(prompt, completion, tokenizer, number)
        case {"messages": list(messages)} if len(messages) > 1:
            return _split_chat(messages[:-1], messages[-1:], tokenizer, number)
        case {"text": str(text)} if text:
            return "", text
    raise InternalRLError(
        f"Row {number} has the columns {', '.join(map(str, row)) or '(none)'}; give text in `text`, in `prompt` and "
        "`completion`, or two or more `messages`."
    )


def _split_chat(
    prompt: list[Any], completion: list[Any], tokenizer: PreTrainedTokenizerBase, number: int
) -> tuple[str, str]:
    before, whole = _chat(tokenizer, prompt, answer=True), _chat(tokenizer, [*prompt, *completion])
    if not whole.startswith(before):
        raise InternalRLError(
            f"The chat template writes the prompt of row {number} otherwise when an answer follows, so it cannot be "
            "told where the completion begins; give `prompt` and `completion` as text."
        )
    end = str(tokenizer.eos_token)
    return before, whole[len(before) :].rstrip().removesuffix(end)  # it is added after every completion


def _chat(tokenizer: PreTrainedTokenizerBase, messages: list[Any], answer: bool = False) -> str:
    if not tokenizer.chat_template:
        raise InternalRLError("The tokenizer has no chat template, which messages need; give plain text.")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # templates raise what they like
        raise InternalRLError(f"The chat template refuses these messages ({error}); give what it asks for.") from error
    return str(text)


def text_batches(examples: Examples, size: int, seed: int, stream: Stream, start: int = 0) -> Iterator[TextBatch]:
    """Endless batches of `size` texts, epoch after epoch, each in a new order.

    Batch k depends on (stream, seed, k) alone.

    Args:
        start: index of the first batch, to resume a run.
    """
    chunk = size * BUCKET
    while True:
        first = start // BUCKET * chunk
        drawn = in_epochs(len(examples), first, first + chunk, seed, stream)
        order = np.argsort(examples.lengths[drawn], kind="stable").reshape(BUCKET, size)
        rng = stream.numpy(seed, 2 * (start // BUCKET) + 1)  # odd: the even numbers are the epochs'
        for rows in rng.permutation(order)[start % BUCKET :]:
            yield examples.batch(drawn[rows])
        start += BUCKET - start % BUCKET


def in_epochs(count: int, first: int, last: int, seed: int, stream: Stream) -> NDArray[np.int64]:
    """Numbers `first` to `last` − 1 of the endless sequence that epochs of `count` texts make."""
    epochs = range(first // count, (last - 1) // count + 1)
    numbers = np.concatenate([stream.numpy(seed, 2 * epoch).permutation(count) for epoch in epochs])
    begin = first - epochs[0] * count
    return numbers[begin : begin + last - first]
