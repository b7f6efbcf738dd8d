"""What comes of requests to an engine."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import pytest

from internalrl.players.engine.requests import Finished, Token
from internalrl.players.engine.stream import Stream


@dataclass
class Answer:
    """All events of a request."""

    tokens: list[Token]
    end: Finished

    @property
    def numbers(self) -> list[int]:
        return [token.number for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + self.end.text


def read(stream: Stream) -> Answer:
    """Wait for its end."""
    *tokens, end = stream
    assert isinstance(end, Finished)
    assert all(isinstance(token, Token) for token in tokens)
    return Answer(tokens, end)  # type: ignore[arg-type]


def prompt(length: int = 8, seed: int = 0) -> tuple[int, ...]:
    """So many tokens of `served.byte_tokenizer`."""
    return tuple(random.Random(seed).choices(range(1, 200), k=length))


def same(found: Answer, expected: Answer) -> None:
    """Assert that two answers are the same but for the last digits."""
    assert (found.numbers, found.text, found.end.reason) == (expected.numbers, expected.text, expected.end.reason)
    assert len(found.end.segments) == len(expected.end.segments)
    for one, other in zip(found.end.segments, expected.end.segments, strict=True):
        assert (one.start, one.stop, one.text) == (other.start, other.stop, other.text)
        assert one.code == pytest.approx(other.code, abs=1e-3)
        assert one.switch_probability == pytest.approx(other.switch_probability, abs=1e-3)
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-2)


def wait_until(condition: Any, seconds: float = 20) -> None:
    """Look again and again."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
