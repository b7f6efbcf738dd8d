"""Events of the engine become the chunks of OpenAI's answers. No network here."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from internalrl.players.engine.requests import Event, Finished, Token

Kind = Literal["chat", "text"]
_OBJECTS = {"chat": ("chat.completion", "chat.completion.chunk"), "text": ("text_completion", "text_completion")}
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


class Vocabulary:
    """Tokens as log-probabilities show them: each by itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids)
        self.piece = lru_cache(maxsize=1 << 17)(self._piece)

    def _piece(self, number: int) -> tuple[str, list[int] | None]:
        """A token's text and bytes. One that is a part of a character is written as OpenAI does, bytes:\\xe2\\x82."""
        text = str(self._tokenizer.decode([number], clean_up_tokenization_spaces=False))
        raw = str(self._tokenizer.convert_ids_to_tokens(number) or text)  # the base may have more than its tokenizer
        if "\ufffd" not in text:
            if raw.startswith("▁") and not text.startswith(" "):  # SentencePiece drops the space of a first word
                text = f" {text}"
            return text, list(text.encode())
        if match := re.fullmatch("<0x([0-9A-F]{2})>", raw):
            data = [int(match[1], 16)]
        elif all(character in _BYTES for character in raw):
            data = [_BYTES[character] for character in raw]
        else:
            return text, None
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data


class Answer:
    """One request's answer; `add` events as they come, and send `chunk`s of what that returns, or a `whole.Whole`.

    Args:
        version: what answers: a version of an adapter, or the base.
        reported: how many likely tokens go with each token; None is no log-probabilities.
    """

    def __init__(
        self,
        kind: Kind,
        id_: str,
        model: str,
        version: str,
        vocabulary: Vocabulary,
        seeds: Iterable[int],
        prompt_tokens: int,
        reported: int | None,
        trace: bool,
    ):
        self.id, self.kind, self._vocabulary = id_, kind, vocabulary
        self._reported, self._trace, self._version = reported, trace, version
        self._seeds = list(seeds)
        self._head = {"id": id_, "created": int(time.time()), "model": model, "system_fingerprint": version}
        self._tokens = [0 for _ in self._seeds]
        self._prompt_tokens = prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(self._tokens)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read, generated, and both."""
        made = self.completion_tokens
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self._prompt_tokens + made,
        }

    def add(self, index: int, event: Event) -> dict[str, Any] | None:
        """Take an event of choice `index`; returns the choice of a chunk, or None where there is nothing to tell."""
        logprobs = None
        if isinstance(event, Token):
            self._tokens[index] += 1
            if self._reported is not None and event.number not in self._vocabulary.special:
                logprobs = self._logprobs(event)
            if not event.text and logprobs is None:
                return None
        part: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": None}
        if isinstance(event, Finished):
            part["finish_reason"] = event.reason
            if self._trace:
                adapter = self._version if event.segments else None
                segments = [vars(segment) for segment in event.segments]
                part["trace"] = {"adapter": adapter, "seed": self._seeds[index], "segments": segments}
        if self.kind == "chat":
            return {**part, "delta": {"content": event.text} if event.text else {}}
        return {**part, "text": event.text}

    def opening(self) -> list[dict[str, Any]]:
        """Choices of the first chunks of a stream: in a chat they say who speaks."""
        if self.kind == "text":
            return []
        role = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": role, "logprobs": None, "finish_reason": None}
            for index in range(len(self._tokens))
        ]

    def chunk(self, choices: list[dict[str, Any]], usage: bool = False) -> dict[str, Any]:
        """A chunk of a stream with these choices; the one with the usage has none."""
        tail = {"usage": self.usage} if usage else {}
        return {**self._head, "object": _OBJECTS[self.kind][1], "choices": choices, **tail}

    @property
    def no_logprobs(self) -> dict[str, Any] | None:
        """The log-probabilities of a choice without a token."""
        if self._reported is None:
            return None
        if self.kind == "chat":
            return {"content": [], "refusal": None}
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [] if self._reported else None, "text_offset": []}

    @property
    def choices(self) -> int:
        """How many there are."""
        return len(self._tokens)

    @property
    def head(self) -> dict[str, Any]:
        """What a whole answer says beside its choices."""
        return {**self._head, "object": _OBJECTS[self.kind][0]}

    def _logprobs(self, token: Token) -> dict[str, Any]:
        """One token's log-probabilities, as a chunk has them."""
        text, data = self._vocabulary.piece(token.number)
        top = [(*self._vocabulary.piece(number), _finite(logprob)) for number, logprob in token.top]
        if self.kind == "chat":
            entry = {"token": text, "bytes": data, "logprob": _finite(token.logprob)}
            tops = [{"token": text, "bytes": data, "logprob": logprob} for text, data, logprob in top]
            return {"content": [{**entry, "top_logprobs": tops}], "refusal": None}
        likely: dict[str, float | None] = {}
        for piece, _, logprob in top:
            likely.setdefault(piece, logprob)  # of tokens with the same text, the likeliest
        return {
            "tokens": [text],
            "token_logprobs": [_finite(token.logprob)],
            "top_logprobs": [likely] if self._reported else None,
            "text_offset": [token.start],
        }


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI writes this number for it."""
    return logprob and max(logprob, -9999.0)
