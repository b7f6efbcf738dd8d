"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from uuid import uuid4

Codes = tuple[tuple[float, ...], ...]
"""A code per segment; the last one stays in force."""


@dataclass(frozen=True)
class Request:
    """One sequence to generate. Ranges are checked by `Engine.submit`.

    Attributes:
        prompt: token numbers, at least one.
        adapter: key of an adapter of the engine; None is the bare base.
        max_tokens: most tokens to generate.
        temperature: of the tokens; 0 is greedy. top_p, top_k: nucleus and the most likely tokens; 1 and 0 are all. None
            is what the base's generation_config samples with, else 1, 1 and 0.
        stop: texts at which generation ends; they are not part of the answer.
        seed: of tokens and codes; None draws one. The answer depends on nothing else.
        logprobs: how many of the most likely tokens to report with each token; None reports no log-probabilities.
        steering: who chooses the codes; by default the policy where the adapter has one, else the prior.
        codes: chosen beforehand instead.
        code_temperature: factor on the standard deviation of policy or prior; 0 takes the mean.
        id: names the request in the audit.
    """

    prompt: tuple[int, ...]
    adapter: str | None = None
    max_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    steering: Literal["policy", "prior", "off"] | None = None
    codes: Codes | None = None
    code_temperature: float = 1.0
    id: str = field(default_factory=lambda: uuid4().hex)


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        number: of the token; text: what it adds to the answer. It is empty while a character is incomplete, or might
            begin a stop text; a later event brings it.
        start: characters of the answer before what the token adds to it, also where that is still held back.
        logprob: of the token, in nats, before temperature, top_p and top_k; None if none were asked for.
        top: the most likely tokens there and their log-probabilities, the likeliest first.
    """

    number: int
    text: str
    start: int = 0
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class SegmentRecord:
    """Generated tokens `start` to `stop` − 1 of a request, made under one code.

    Attributes:
        index: of the segment in its request, from 0.
        code: in force; empty where steering was switched off for the segment.
        switch_probability: the switch's, at `start`; the first segment opens whatever it says.
        log_probability: of the segment's tokens together, in nats, before temperature, top_p and top_k.
        text: of the segment.
        strategy: the nearest named strategy, with limits.
        violation: what the limits objected to, and did.
    """

    index: int
    start: int
    stop: int
    code: tuple[float, ...]
    switch_probability: float
    log_probability: float
    text: str
    strategy: str | None = None
    violation: str | None = None


@dataclass(frozen=True)
class Finished:
    """The last event of a request.

    Attributes:
        reason: "stop" at an end-of-sequence token or a stop text, "length" at max_tokens or the end of the context,
            "cancelled", or "error".
        text: what was still held back.
        segments: of the whole answer; empty for the bare base.
        error: one sentence where the reason is "error".
    """

    reason: Literal["stop", "length", "cancelled", "error"]
    text: str = ""
    segments: tuple[SegmentRecord, ...] = ()
    error: str | None = None


FAILED = "The server failed to answer this request; its log tells why."
"""The error of a request that ended by no mistake of its own."""

NO_MEMORY = "There was not enough memory for this request; ask for less, or try again later."
"""The error of a request for which an allocation failed."""

Event = Token | Finished
