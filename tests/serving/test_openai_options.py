"""Every option of OpenAI's schema does what the table in docs/serving.md says; what was sent may be sent back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from internalrl.serving.main import Bounds
from tests.support.live_server import Served, config_for, save_models, serving

DOCS = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
CHAT = {"model": "code", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "seed": 1}
TEXT = {"model": "code", "prompt": "Hello", "max_tokens": 3, "seed": 1}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}

# Values that are taken, and values that are refused.
SAMPLES: dict[str, tuple[list[Any], list[Any]]] = {
    "model": (["code", "code@1"], ["", 1]),
    "messages": ([[{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]], [[], "x", [0], [{"role": "x"}]]),
    "prompt": (["a", ["a", "b"], [1, 2], [[1], [2]]], [[], [1, "x"], None, {}]),
    "n": ([1, 2], [0, 17, "2"]),
    "max_tokens": ([1, 5], [0, -1]),
    "max_completion_tokens": ([1, 5], [0, -1]),
    "temperature": ([0, 0.5, 2], [-1, 2.1, "1"]),
    "top_p": ([0, 0.5, 1], [-0.1, 1.1]),
    "seed": ([0, -5], [2**63, 1.5]),
    "stop": (["x", ["x", "y"], []], [["x"] * 5, 5]),
    "stream": ([False], ["yes"]),
    "stream_options": ([{"include_usage": True, "include_obfuscation": False}, {}], [{"include_everything": True}]),
    "logprobs": ([], ["x", 21]),
    "top_logprobs": ([0], [3, 21]),
    "user": (["me", ""], [5]),
    "reasoning_effort": (["none", "minimal", "low", "medium", "high", "xhigh"], [5]),
    "best_of": ([1], [2]),
    "echo": ([False], [True]),
    "suffix": ([""], ["x"]),
    "frequency_penalty": ([0, 0.0], [0.5, -1, "0", False]),
    "presence_penalty": ([0, 0.0], [0.5]),
    "logit_bias": ([{}], [{"5": 100}]),
    "response_format": ([{"type": "text"}], [{"type": "json_object"}, SCHEMA]),
    "modalities": ([["text"]], [["text", "audio"], ["audio"]]),
    "verbosity": (["medium"], ["low", "high"]),
    "tools": ([[]], [[TOOL]]),
    "functions": ([[]], [[TOOL["function"]]]),
    "tool_choice": (["none", "auto"], ["required", {"type": "function", "function": {"name": "look"}}]),
    "function_call": (["none", "auto"], [{"name": "look"}]),
    "audio": ([], [{"voice": "alloy", "format": "wav"}]),
    "moderation": ([], [{"model": "x"}]),
    "web_search_options": ([], [{}, {"search_context_size": "low"}]),
    "metadata": ([{}, {"a": "b"}], []),
    "parallel_tool_calls": ([True, False], []),
    "prediction": ([{"type": "content", "content": "Hello"}], []),
    "prompt_cache_key": (["x"], []),
    "prompt_cache_options": ([{"mode": "implicit"}], []),
    "prompt_cache_retention": (["in_memory", "24h"], []),
    "safety_identifier": (["x"], []),
    "service_tier": (["auto", "flex"], []),
    "store": ([True, False], []),
}
OTHERS: dict[str, tuple[list[Any], list[Any]]] = {
    "top_k": ([-1, 0, 5], [-2]),
    "min_p": ([0, 0.0], [0.1]),
    "repetition_penalty": ([1, 1.0], [1.1, True]),
    "length_penalty": ([1.0], [2]),
    "ignore_eos": ([False], [True, 0]),
    "min_tokens": ([0], [5]),
    "skip_special_tokens": ([True], [False]),
    "stop_token_ids": ([[]], [[5]]),
    "use_beam_search": ([False], [True]),
    "include_stop_str_in_output": ([False], [True]),
    "chat_template_kwargs": ([{}], [{"enable_thinking": False}]),
    "code_temprature": ([], [1]),
}
"""Options that OpenAI does not have."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = save_models(tmp_path_factory.mktemp("options"))
    with serving(config_for(folder, bounds=Bounds(answer_tokens=16)), folder) as running:
        yield running


@pytest.fixture(scope="module")
def web(served: Served) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=served.url, verify=False, timeout=60) as client:
        yield client


def schema(module: Any) -> set[str]:
    """The options of a request, in OpenAI's own client."""
    kinds = (module.CompletionCreateParamsNonStreaming, module.CompletionCreateParamsStreaming)
    return {name for kind in kinds for base in (kind, *kind.__orig_bases__) for name in base.__annotations__}


def table() -> dict[tuple[str, str], str]:
    """(option, chat or text) -> what docs/serving.md says of it."""
    said = {}
    for names, of, what in re.findall(r"^\| (`.+?`) +\| (both|chat|text) \| (.+) \|$", DOCS.read_text("utf-8"), re.M):
        for name in re.findall("`([a-z_]+)`", names):
            for kind in ("chat", "text") if of == "both" else (of,):
                said[name, kind] = what
    return said


def ask(web: httpx2.Client, kind: str, **options: Any) -> httpx2.Response:
    path, body = {"chat": ("/chat/completions", CHAT), "text": ("/completions", TEXT)}[kind]
    return web.post(path, json={**body, **options})


def test_the_table_has_every_option_of_the_schema() -> None:
    chat, text = schema(chat_create_params), schema(completion_create_params)
    assert len(chat) > 35
    assert len(text) > 15
    missing = {(name, "chat") for name in chat} | {(name, "text") for name in text}
    assert missing - set(table()) == set()
    assert {name for name, _ in table()} == set(SAMPLES)


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_every_option_does_what_the_table_says(web: httpx2.Client, kind: str) -> None:
    plain = ask(web, kind).json()["choices"]
    for (name, of), what in table().items():
        if of != kind:
            continue
        taken, refused = SAMPLES[name]
        if name == "logprobs":
            taken = [True, False] if kind == "chat" else [0, 20]
        assert what.startswith(("offered", "only", "changes nothing")), what
        assert bool(refused) == (not what.startswith("changes nothing")), name
        for value in taken:
            answer = ask(web, kind, **{name: value})
            assert answer.status_code == 200, (name, value, answer.text)
            if not what.startswith("offered"):
                assert answer.json()["choices"] == plain, (name, value)
        for value in refused:
            answer = ask(web, kind, **{name: value})
            assert answer.status_code in (400, 404), (name, value)
            error = answer.json()["error"]
            assert error["param"] == name, (name, value, error)
            assert error["message"].endswith(".")
        if name not in ("model", "messages", "prompt"):
            answer = ask(web, kind, **{name: None})
            assert answer.status_code == 200, (name, answer.text)
            if name != "max_tokens":
                assert answer.json()["choices"] == plain or name == "seed", name


def test_options_of_other_servers_that_change_nothing(web: httpx2.Client) -> None:
    plain = ask(web, "chat").json()["choices"]
    for name, (taken, refused) in OTHERS.items():
        for value in [*taken, None]:
            answer = ask(web, "chat", **{name: value})
            assert answer.status_code == 200, (name, value, answer.text)
            assert name == "top_k" or answer.json()["choices"] == plain
        for value in refused:
            assert ask(web, "chat", **{name: value}).json()["error"]["param"] == name, (name, value)


def test_top_p_of_0_is_greedy(web: httpx2.Client) -> None:
    greedy = ask(web, "text", temperature=0, max_tokens=12).json()["choices"][0]["text"]
    assert ask(web, "text", top_p=0, max_tokens=12).json()["choices"][0]["text"] == greedy


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"refusal": None, "tool_calls": None, "function_call": None, "audio": None, "parsed": None, "anything": None},
        {"annotations": [], "reasoning_content": None, "reasoning": None, "name": None},
        {"provider_specific_fields": {"refusal": None}, "thinking_blocks": None, "images": []},
        {"refusal": "", "tool_calls": [], "function_call": {}},
        {"reasoning_content": "I thought."},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_can_be_sent_back(web: httpx2.Client, more: dict[str, Any], stream: bool) -> None:
    if stream:
        lines = ask(web, "chat", stream=True).text.splitlines()
        message: dict[str, Any] = {"content": ""}
        for line in lines:
            if line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                message |= {**delta, "content": message["content"] + delta.get("content", "")}
    else:
        message = ask(web, "chat").json()["choices"][0]["message"]
    turns = [*CHAT["messages"], {**message, **more}, {"role": "user", "content": "More"}]
    answer = ask(web, "chat", messages=turns)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] > len(f"user: Hello\n{message['content']}user: More\n")


@pytest.mark.parametrize("nothing", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_an_assistant_may_have_said_nothing(web: httpx2.Client, nothing: dict[str, Any]) -> None:
    turns = [*CHAT["messages"], {"role": "assistant", **nothing}, {"role": "user", "content": "More"}]
    answer = ask(web, "chat", messages=turns)
    assert answer.status_code == 200, answer.text


def test_what_a_message_cannot_hold_is_refused_by_name(web: httpx2.Client) -> None:
    def complaint(message: dict[str, Any]) -> str:
        answer = ask(web, "chat", messages=[*CHAT["messages"], message])
        assert answer.status_code == 400, message
        assert answer.json()["error"]["param"] == "messages"
        said: str = answer.json()["error"]["message"]
        return said

    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert "messages[1].content[0].type" in complaint({"role": "user", "content": [image]})
    assert "messages[1].audio" in complaint({"role": "assistant", "content": None, "audio": {"id": "x"}})
    assert "messages[1].function_call" in complaint({"role": "assistant", "function_call": {"name": "x"}})
    assert "messages[1].contents" in complaint({"role": "user", "content": "a", "contents": "x"})
    assert "content is missing" in complaint({"role": "user", "content": None})
    call = {"id": "x", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    # The tiny base's template would not show them.
    assert "messages[1].tool_calls" in complaint({"role": "assistant", "content": None, "tool_calls": [call]})
    assert "tool_calls" in complaint({"role": "user", "content": "a", "tool_calls": [call]})


LLAMA_INDEX = [
    {"model": "code", "max_tokens": 3, "stream": False, "temperature": 0.1, "messages": CHAT["messages"]},
    {"model": "code", "max_tokens": 3, "stream": True, "temperature": 0.1, "messages": CHAT["messages"]},
    {"model": "code", "prompt": "Hello", "max_tokens": 3, "stream": False, "temperature": 0.1},
]
"""What LlamaIndex's OpenAILike sends; as it needs an older client of OpenAI's than these tests, it is not run here."""


@pytest.mark.parametrize("body", LLAMA_INDEX)
def test_what_llama_index_sends(web: httpx2.Client, body: dict[str, Any]) -> None:
    path = "/completions" if "prompt" in body else "/chat/completions"
    assert web.post(path, json=body).status_code == 200
