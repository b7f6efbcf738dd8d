"""What clients send: OpenAI's requests, and what steering adds to them.

An option that would change the answer is obeyed or refused by its name. One that is not offered may still be sent with
the values that change nothing, and those that never change an answer with any; null is as good as leaving it out, also
where the name is unknown.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

CHOICES = 16
"""Most sequences that one request may ask for."""
CODE_NUMBERS = 1 << 13
"""Most numbers in the codes of a request."""
ARMS = 64
"""Most versions that traffic may be split among."""
REQUEST_ID = "^[A-Za-z0-9-]{1,128}$"
"""What the id of an answer looks like."""


def complaint(message: str, param: str | None = None) -> PydanticCustomError:
    """What a validator raises; `param` names an option where the validator is not its own."""
    return PydanticCustomError("complaint", message, {"param": param})


class Only:
    """Values of an option that is not offered: those that ask for what is done anyway."""

    def __init__(self, *values: Any):
        self.values = values

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._checked)

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [*self.values, None]}

    def _checked(self, value: Any) -> Any:
        same = (value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in self.values)
        if value is None or any(same):
            return value
        raise complaint("this is not offered; leave it out")


Zero = Annotated[Any, Only(0)]
One = Annotated[Any, Only(1)]
No = Annotated[Any, Only(False)]
Yes = Annotated[Any, Only(True)]
Nothing = Annotated[Any, Only([], {}, "")]
Unread = Any
"""Of an option that never changes an answer."""

Text = Annotated[str, Field(min_length=1, max_length=256)]
TokenNumber = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = Annotated[list[TokenNumber], Field(min_length=1, fail_fast=True)]
Code = Annotated[list[Annotated[float, Field(ge=-1e6, le=1e6)]], Field(min_length=1, max_length=1024, fail_fast=True)]
Weight = Annotated[float, Field(gt=0, le=1e6)]


def _few(weights: Any) -> Any:
    """Pydantic would complain of each of many."""
    if isinstance(weights, dict) and len(weights) > ARMS:
        raise complaint(f"there may be {ARMS} of them")
    return weights


class Body(BaseModel):
    """An object of a request; names that it does not know may only be null."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, None]


class StreamOptions(Body):
    include_usage: bool | None = Field(default=False, description="End the stream with a chunk that holds the usage.")
    include_obfuscation: Unread = None


class Generate(Body):
    """What both kinds of request have in common."""

    model: str = Field(min_length=1, max_length=256, description="An adapter, one of its live versions, or the base.")
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = Field(default=1, description="Answers to make.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=None, description="0 is greedy. By default, as for top_p and top_k, what the base samples with, or 1."
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        default=None, description="0 and -1 are all tokens."
    )
    stop: Text | Annotated[list[Text], Field(max_length=4, fail_fast=True)] | None = Field(
        default=None, description="Texts that end the answer, and are no part of it."
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        default=None, description="The answer depends on nothing else; answer i of several has seed + i."
    )
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = Field(
        default=None, description="Requests of one user get the same version while traffic is split."
    )

    steering: Literal["policy", "prior", "off"] | None = Field(
        default=None,
        description="Who chooses the codes; by default the policy where the adapter has one, else the prior.",
    )
    codes: Code | Annotated[list[Code], Field(min_length=1, max_length=4096, fail_fast=True)] | None = Field(
        default=None, description="Codes chosen beforehand: one for the answer, or one per segment."
    )
    code_temperature: Annotated[float, Field(ge=0, le=10)] | None = Field(
        1.0, description="Factor on the standard deviation of policy or prior; 0 takes the mean."
    )
    trace: bool | None = Field(default=False, description="Add the segments of each answer to it, as `trace`.")

    # OpenAI's options that are not offered, and those that never change an answer.
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Nothing = None
    metadata: Unread = None
    prompt_cache_key: Unread = None
    prompt_cache_options: Unread = None
    prompt_cache_retention: Unread = None
    safety_identifier: Unread = None
    service_tier: Unread = None
    store: Unread = None
    # What clients of other servers send beside them.
    add_generation_prompt: Yes = None
    bad_words: Nothing = None
    cache_prompt: Unread = None
    continue_final_message: No = None
    early_stopping: No = None
    ignore_eos: No = None
    include_stop_str_in_output: No = None
    length_penalty: One = None
    min_p: Zero = None
    min_tokens: Zero = None
    priority: Zero = None
    repeat_penalty: One = None
    repetition_penalty: One = None
    return_token_ids: No = None
    return_tokens_as_token_ids: No = None
    skip_special_tokens: Yes = None
    spaces_between_special_tokens: Yes = None
    stop_token_ids: Nothing = None
    typical_p: One = None
    use_beam_search: No = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.codes and sum(len(code) if isinstance(code, list) else 1 for code in self.codes) > CODE_NUMBERS:
            raise complaint(f"there may be {CODE_NUMBERS} numbers in all", "codes")
        return self


class Part(Body):
    """A part of a message's content."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    annotations: Nothing = None
    cache_control: Unread = None
    prompt_cache_breakpoint: Unread = None

    @property
    def said(self) -> str:
        """What it says."""
        return (self.text if self.type == "text" else self.refusal) or ""


class FunctionCall(Body):
    name: Annotated[str, Field(max_length=1024)]
    arguments: Annotated[str, Field(max_length=1 << 16)] | dict[str, Any] | None = Field(
        default=None, description="A JSON object, as a text."
    )


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] | None = "function"
    function: FunctionCall
    index: Unread = None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = Field(default=None, description="Handed to the chat template.")
    reasoning_content: str | None = Field(default=None, description="Handed to the chat template.")
    reasoning: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = Field(default=None, description="What an assistant said instead of its content.")
    audio: Nothing = None
    function_call: Nothing = None
    images: Nothing = None
    # What clients keep of an answer, and send back with it.
    annotations: Unread = None
    cache_control: Unread = None
    id: Unread = None
    provider_specific_fields: Unread = None
    reasoning_details: Unread = None
    thinking_blocks: Unread = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise complaint("content is missing; give a text")
        if self.tool_calls and self.role != "assistant":
            raise complaint("only an assistant makes tool_calls")
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        parts = [self.content] if isinstance(self.content, str) else [part.said for part in self.content or ()]
        return "".join([*parts, self.refusal or ""])


class TextFormat(Body):
    type: Literal["text"]


class ChatRequest(Generate):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = Field(
        default=None, description="Handed to the chat template, which may not know it."
    )
    modalities: Annotated[Any, Only(["text"])] = None
    response_format: TextFormat | None = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    tools: Nothing = None
    audio: Nothing = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    functions: Nothing = None
    moderation: Nothing = None
    parallel_tool_calls: Unread = None
    prediction: Unread = None
    verbosity: Annotated[Any, Only("medium")] = None
    web_search_options: Annotated[Any, Only()] = None
    add_special_tokens: No = None
    chat_template_kwargs: Nothing = None
    documents: Nothing = None
    echo: No = None
    include_reasoning: Yes = None

    @model_validator(mode="after")
    def _reported(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise complaint("this needs logprobs to be true", "top_logprobs")
        return self

    @property
    def reported(self) -> int | None:
        """How many likely tokens to report with each; None is no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generate):
    """POST /v1/completions"""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=CHOICES, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=CHOICES, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=CHOICES)] | None = None
    echo: No = None
    suffix: Nothing = None
    add_special_tokens: Yes = None

    @model_validator(mode="after")
    def _all_of_them(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise complaint("answers are not chosen from; leave it out, or send n", "best_of")
        return self

    @property
    def reported(self) -> int | None:
        """How many likely tokens to report with each; None is no log-probabilities."""
        return self.logprobs


class FeedbackRequest(Body):
    """POST /v1/feedback: how good an answer was, in one of the two ways."""

    request_id: str = Field(pattern=REQUEST_ID, description="The `id` of the answer.")
    reward: Annotated[float, Field(ge=-1e9, le=1e9)] | None = None
    thumbs: Literal["up", "down"] | None = None


class PromoteRequest(Body):
    """POST /v1/admin/adapters/{name}/promote"""

    version: Annotated[int, Field(ge=1, le=2**31 - 1)]


class SplitRequest(Body):
    """POST /v1/admin/adapters/{name}/split"""

    weights: Annotated[
        dict[Annotated[str, Field(pattern="^[1-9][0-9]{0,8}$")], Weight],
        Field(min_length=1, max_length=ARMS),
        BeforeValidator(_few),
    ] = Field(description='Version number -> weight, in any unit: {"3": 90, "4": 10}.')
