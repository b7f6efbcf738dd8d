"""OpenAI's requests become the engine's."""

from __future__ import annotations

from typing import Any

from internalrl.players.engine.requests import Codes, Request
from internalrl.serving.api.openai_requests import ChatRequest, CompletionRequest


def to_engine(
    body: ChatRequest | CompletionRequest,
    prompt: tuple[int, ...],
    adapter: str | None,
    most: int,
    choice: int,
    index: int,
    id_: str,
) -> Request:
    """What the engine is asked for choice `choice` of a prompt; it is choice `index` of the request."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    # One above the last of 64 bits is the first again.
    seed = None if body.seed is None else (body.seed + choice + 2**63) % 2**64 - 2**63
    return Request(
        prompt=prompt,
        adapter=adapter,
        max_tokens=most,
        temperature=body.temperature,
        top_p=None if body.top_p is None else max(body.top_p, 1e-9),  # 0 is the likeliest token
        top_k=None if body.top_k is None else max(body.top_k, 0),
        stop=tuple(stop),
        seed=seed,
        logprobs=body.reported,
        steering=body.steering,
        codes=_codes(body.codes),
        code_temperature=1.0 if body.code_temperature is None else body.code_temperature,
        id=id_ if index == 0 else f"{id_}-{index}",
    )


def _codes(codes: list[float] | list[list[float]] | None) -> Codes | None:
    if codes is None:
        return None
    rows: list[Any] = codes if isinstance(codes[0], list) else [codes]
    return tuple(tuple(row) for row in rows)
