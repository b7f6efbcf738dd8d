"""Texts of requests become tokens beside the event loop, in two lanes: short ones never wait for long ones.

What cannot be a prompt is told before it is read: a text with more characters than so many tokens stand for.
"""

from __future__ import annotations

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor

from transformers import PreTrainedTokenizerBase

from internalrl.serving.api.openai_requests import CHOICES, ChatRequest, CompletionRequest
from internalrl.serving.api.problems import Problem, busy
from internalrl.serving.api.prompts import Prompts

SHORT = 8192
"""Characters of a request that is read in the lane for short ones."""
WAITING = 64
"""Requests that may wait in a lane."""

Tokens = tuple[int, ...]
Part = ChatRequest | str | Tokens
"""What one prompt is made of."""


class Tokenizing:
    """Makes prompts of requests.

    Args:
        tokenizer: of the base; the second lane has a copy.
        most: tokens that a prompt may have; None is any number.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, most: int | None):
        self.most = most
        self._longest = max(map(len, tokenizer.get_vocab()), default=1)
        self._lanes = [_Lane(tokenizer), _Lane(copy.deepcopy(tokenizer))]

    def fewest(self, body: ChatRequest | CompletionRequest) -> int:
        """Tokens that the prompts have at least, known without reading them; Problem if one of them is too long.

        Nothing in the vocabulary stands for more characters than its longest entry has.
        """
        parts = _parts(body)
        if len(parts) * (body.n or 1) > CHOICES:
            raise Problem(400, f"This asks for more than {CHOICES} answers; send several requests.", param="n")
        fewest = [len(part) if isinstance(part, tuple) else -(-_characters(part) // self._longest) for part in parts]
        if self.too_long(max(fewest)):
            raise self.refusal()
        return sum(fewest)

    async def prompts(self, body: ChatRequest | CompletionRequest) -> list[Tokens]:
        """The token numbers of the prompts."""
        parts = _parts(body)
        if all(isinstance(part, tuple) for part in parts):
            return [part for part in parts if isinstance(part, tuple)]
        return await self._lanes[sum(map(_characters, parts)) > SHORT].read(parts)

    def too_long(self, tokens: int) -> bool:
        """Whether a prompt of so many has no room."""
        return self.most is not None and tokens > self.most

    def refusal(self) -> Problem:
        """What is answered to a prompt that is too long."""
        message = f"A prompt has more than {self.most} tokens, for which there is room."
        return Problem(400, message, code="context_length_exceeded")

    def close(self) -> None:
        """Read nothing more."""
        for lane in self._lanes:
            lane.close()


class _Lane:
    """Reads one request after the other, in a thread and with a tokenizer of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._prompts = Prompts(tokenizer)
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self._waiting = 0

    async def read(self, parts: list[Part]) -> list[Tokens]:
        if self._waiting >= WAITING:
            raise busy()
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._all, parts)
        finally:
            self._waiting -= 1

    def _all(self, parts: list[Part]) -> list[Tokens]:
        return [
            part if isinstance(part, tuple)
            else self._prompts.text(part) if isinstance(part, str)
            else self._prompts.chat(part)
            for part in parts
        ]  # fmt: skip

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _parts(body: ChatRequest | CompletionRequest) -> list[Part]:
    if isinstance(body, ChatRequest):
        return [body]
    if isinstance(body.prompt, str):
        return [body.prompt]
    if isinstance(body.prompt[0], int):
        return [tuple(body.prompt)]
    return [entry if isinstance(entry, str) else tuple(entry) for entry in body.prompt]


def _characters(part: Part) -> int:
    if isinstance(part, ChatRequest):
        return sum(len(message.text) for message in part.messages)
    return len(part) if isinstance(part, str) else 0
