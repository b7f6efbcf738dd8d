"""An answer in one piece, put together of the chunks that a stream would have."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from internalrl.serving.api.answers import Answer


class Whole:
    """Takes what `Answer.add` returns.

    Log-probabilities are kept as they will be sent: of a thousand tokens, with twenty others beside each, in sixteen
    choices, they would be a million objects, and writing them at once would hold the event loop for a second.
    """

    def __init__(self, answer: Answer):
        self._answer = answer
        self._choices = [_Choice(index, answer) for index in range(answer.choices)]

    def add(self, part: dict[str, Any]) -> None:
        """A choice of a chunk."""
        self._choices[part["index"]].add(part)

    async def response(self) -> Response:
        """The answer, when all choices have finished."""
        pieces = [f'{json.dumps(self._answer.head)[:-1]}, "choices": ['.encode()]
        for index, choice in enumerate(self._choices):
            pieces.append((", " * (index > 0) + choice.text()).encode())
            await asyncio.sleep(0)
        pieces.append(f'], "usage": {json.dumps(self._answer.usage)}}}'.encode())
        return _Pieces(pieces)


class _Choice:
    """One choice so far."""

    def __init__(self, index: int, answer: Answer):
        self._chat, self._nothing = answer.kind == "chat", answer.no_logprobs
        self._said: dict[str, Any] = {"index": index}
        self._texts: list[str] = []
        self._logprobs: dict[str, list[str]] = {}

    def add(self, part: dict[str, Any]) -> None:
        self._texts.append(part["delta"].get("content", "") if self._chat else part["text"])
        self._said |= {name: part[name] for name in ("finish_reason", "trace") if name in part}
        for name, told in (part["logprobs"] or {}).items():
            if told is not None:
                self._logprobs.setdefault(name, []).append(json.dumps(told)[1:-1])  # without the list's brackets

    def text(self) -> str:
        """The choice as JSON."""
        text = "".join(self._texts)
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        if not self._logprobs:
            return json.dumps({**self._said, **said, "logprobs": self._nothing})
        told = {name: json.dumps(nothing) for name, nothing in (self._nothing or {}).items()}
        told |= {name: f"[{', '.join(values)}]" for name, values in self._logprobs.items()}
        members = ", ".join(f'"{name}": {value}' for name, value in told.items())
        return f'{json.dumps({**self._said, **said})[:-1]}, "logprobs": {{{members}}}}}'


class _Pieces(Response):
    """Sends JSON in pieces: the next one when the client has read enough of those before."""

    media_type = "application/json"

    def __init__(self, pieces: list[bytes]):
        super().__init__(headers={"content-length": str(sum(map(len, pieces)))})
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
