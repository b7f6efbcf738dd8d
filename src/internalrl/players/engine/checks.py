"""What can be asked of an engine, one complaint per sentence."""

from __future__ import annotations

import math

from internalrl.errors import InternalRLError
from internalrl.players.engine.requests import Request


def check_request(request: Request, vocabulary: int, context: int | None) -> None:
    """InternalRLError unless a base with this vocabulary and context can answer `request`."""
    if not request.prompt:
        raise InternalRLError("The prompt is empty; give at least one token.")
    if not 0 <= min(request.prompt) <= max(request.prompt) < vocabulary:
        raise InternalRLError(
            f"The prompt holds tokens from {min(request.prompt)} to {max(request.prompt)}, but the base's vocabulary "
            f"has {vocabulary}; use the tokenizer that belongs to the base."
        )
    if context is not None and len(request.prompt) >= context:
        raise InternalRLError(
            f"The prompt is {len(request.prompt)} tokens long, but prompt and answer together may have {context}; "
            "shorten it."
        )
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    top_k = request.top_k or 0
    seed = 0 if request.seed is None else request.seed
    logprobs = 0 if request.logprobs is None else request.logprobs
    for what, value, allowed, right in (
        ("max_tokens", request.max_tokens, "1 or more", request.max_tokens >= 1),
        ("temperature", temperature, "a number of 0 or more", _at_least_0(temperature)),
        ("top_p", top_p, "a number above 0, at most 1", 0 < top_p <= 1),
        ("top_k", top_k, "0 or more", top_k >= 0),
        ("seed", seed, "an integer of 64 bits", -(2**63) <= seed < 2**63),
        ("logprobs", logprobs, "0 or more", logprobs >= 0),
        ("code_temperature", request.code_temperature, "a number of 0 or more", _at_least_0(request.code_temperature)),
    ):
        if not right:
            raise InternalRLError(f"{what} is {value}; give {allowed}.")
    if "" in request.stop:
        raise InternalRLError("A stop text is empty; give texts of at least one character.")
    if request.adapter is None and (request.codes is not None or request.steering in ("policy", "prior")):
        raise InternalRLError("The bare base has no codes; name an adapter, or leave codes and steering out.")
    if request.steering == "off" and request.codes is not None:
        raise InternalRLError("steering is 'off', but codes are given; leave one of them out.")


def _at_least_0(value: float) -> bool:
    return value >= 0 and math.isfinite(value)
