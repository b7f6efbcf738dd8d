"""What clients get, for the description of the API; the server builds plain dicts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class Segment(BaseModel):
    index: int
    start: int
    stop: int
    code: list[float]
    switch_probability: float
    log_probability: float
    text: str
    strategy: str | None
    violation: str | None


class Trace(BaseModel):
    adapter: str | None
    seed: int
    segments: list[Segment]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None
    trace: Trace | None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Choice):
    message: AnswerMessage


class TextChoice(_Choice):
    text: str


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str = Field(description="The version that answered, or the base.")
    usage: Usage


class ChatAnswer(_Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextAnswer(_Answer):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "internalrl"
    parent: str | None = Field(default=None, description="The base that an adapter steers.")
    versions: dict[str, float] | None = Field(default=None, description="Live versions of an adapter and their shares.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"]


class FeedbackAnswer(BaseModel):
    object: Literal["feedback"] = "feedback"
    request_id: str
    version: str = Field(description="The version that made the answer.")


class Routed(BaseModel):
    """What is live under a name after a change: version -> share."""

    model: str
    versions: dict[str, float]


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """How every error is answered."""

    error: Problem
