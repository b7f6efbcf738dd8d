"""What clients send and get: OpenAI's requests and answers, and what steering adds to them.

Of OpenAI's options, those that would change the answer and are not offered are accepted only with the value that
changes nothing; those that never change an answer (`user`, `metadata`, …) are accepted. Everything else is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

CHOICES = 16
"""Most sequences that one request may ask for."""
REQUEST_ID = "^[A-Za-z0-9-]{1,128}$"
"""What the id of an answer looks like."""

Text = Annotated[str, Field(min_length=1, max_length=256)]
TokenNumber = Annotated[int, Field(ge=0, le=2**31 - 1)]
Code = Annotated[list[Annotated[float, Field(ge=-1e6, le=1e6)]], Field(min_length=1, max_length=1024)]
Weight = Annotated[float, Field(gt=0, le=1e6)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, ser_json_inf_nan="null")


class StreamOptions(_Body):
    include_usage: bool = Field(default=False, description="End the stream with a chunk that holds the usage.")


class _Generate(_Body):
    """What both kinds of request have in common."""

    model: str = Field(min_length=1, max_length=256, description="An adapter, one of its live versions, or the base.")
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = Field(default=1, description="Answers to make.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(default=1.0, description="0 is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(default=0, description="0 is all tokens.")
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = Field(
        default=None, description="Texts that end the answer, and are no part of it."
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        default=None, description="The answer depends on nothing else; answer i of several has seed + i."
    )
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None

    steering: Literal["policy", "prior", "off"] | None = Field(
        default=None,
        description="Who chooses the codes; by default the policy where the adapter has one, else the prior.",
    )
    codes: Code | Annotated[list[Code], Field(min_length=1, max_length=4096)] | None = Field(
        default=None, description="Codes chosen beforehand: one for the answer, or one per segment."
    )
    code_temperature: Annotated[float, Field(ge=0, le=10)] | None = Field(
        1.0, description="Factor on the standard deviation of policy or prior; 0 takes the mean."
    )
    trace: bool = Field(default=False, description="Add the segments of each answer to it, as `trace`.")

    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = Field(
        default=None, description="Requests of one user get the same version while traffic is split."
    )
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(_Body):
    type: Literal["text"]


class ChatRequest(_Generate):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def reported(self) -> int | None:
        """How many likely tokens to report with each; None is no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Generate):
    """POST /v1/completions"""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=CHOICES)]
        | Annotated[list[TokenNumber], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenNumber], Field(min_length=1)]], Field(min_length=1, max_length=CHOICES)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @property
    def reported(self) -> int | None:
        """How many likely tokens to report with each; None is no log-probabilities."""
        return self.logprobs


class FeedbackRequest(_Body):
    """POST /v1/feedback: how good an answer was, in one of the two ways."""

    request_id: str = Field(pattern=REQUEST_ID, description="The `id` of the answer.")
    reward: Annotated[float, Field(ge=-1e9, le=1e9)] | None = None
    thumbs: Literal["up", "down"] | None = None


class PromoteRequest(_Body):
    """POST /v1/admin/adapters/{name}/promote"""

    version: Annotated[int, Field(ge=1, le=2**31 - 1)]


class SplitRequest(_Body):
    """POST /v1/admin/adapters/{name}/split"""

    weights: Annotated[dict[Annotated[str, Field(pattern="^[1-9][0-9]{0,8}$")], Weight], Field(min_length=1)] = Field(
        description='Version number -> weight, in any unit: {"3": 90, "4": 10}.'
    )


# -- answers: for the documentation of the API; the server builds plain dicts -----------------------------------


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
