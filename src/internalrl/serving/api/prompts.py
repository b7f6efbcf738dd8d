"""Requests become prompts: messages through the base's chat template, texts through its tokenizer."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from internalrl.serving.api.openai_requests import ChatRequest, Message, ToolCall
from internalrl.serving.api.problems import Problem


class Prompts:
    """Makes token numbers of what clients send, in one thread: a fast tokenizer is not made for several."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer

    def chat(self, body: ChatRequest) -> tuple[int, ...]:
        """The prompt that the chat template makes of the messages."""
        if not self._tokenizer.chat_template:
            raise Problem(400, "The base has no chat template; use /v1/completions.", param="messages")
        template = self._tokenizer.get_chat_template()
        messages = [_message(message, index, template) for index, message in enumerate(body.messages)]
        more: dict[str, Any] = {"reasoning_effort": body.reasoning_effort} if body.reasoning_effort else {}
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **more)
        except Exception as error:  # a template may refuse whatever it likes, in whatever way
            raise Problem(400, "The base's chat template does not take these messages.", param="messages") from error
        return self.text(str(text), special=False)  # the template wrote the special tokens

    def text(self, text: str, special: bool = True) -> tuple[int, ...]:
        """The tokens of a text; `special` are those that the tokenizer puts around it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Problem(400, "A text holds half of a surrogate pair; send valid Unicode.") from error
        return tuple(self._tokenizer.encode(text, add_special_tokens=special))


def _message(message: Message, index: int, template: str) -> dict[str, Any]:
    """A message as chat templates know it."""
    role: str = message.role
    if role == "developer" and role not in template:
        role = "system"
    told: dict[str, Any] = {"role": role, "content": message.text}
    for name in ("name", "reasoning_content", "reasoning", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            told[name] = value
    if message.tool_calls:
        if "tool_calls" not in template:
            sentence = f"messages[{index}].tool_calls: the base's chat template has no place for them; leave them out."
            raise Problem(400, sentence, param="messages")
        told["tool_calls"] = [
            _call(call, f"messages[{index}].tool_calls[{place}].function.arguments")
            for place, call in enumerate(message.tool_calls)
        ]
    return told


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    """A call as chat templates know it: its arguments are an object, not a text."""
    arguments: Any = call.function.arguments or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise Problem(400, f"{where}: this is no JSON object.", param="messages")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
