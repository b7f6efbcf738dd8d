"""The official client against a real server: what it sends is understood, what it gets it understands."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from internalrl.players.engine.requests import Finished, Request, Token
from tests.support.live_server import BASE, Served, config_for, save_models, serving

HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
PROMPT = "system: Be brief.\nuser: Hello\nassistant: "
"""What the chat template makes of it."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = save_models(tmp_path_factory.mktemp("serve"))
    with serving(config_for(folder, context=256), folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as found:
        yield found


def from_engine(served: Served, adapter: str | None, prompt: str, seed: int, most: int) -> str:
    """What the engine answers without a server."""
    engine = served.app.service.engine
    numbers = tuple(engine.tokenizer.encode(prompt, add_special_tokens=False))
    events = engine.submit(Request(numbers, adapter=adapter, seed=seed, max_tokens=most))
    return "".join(event.text for event in events)


def test_models_say_what_they_steer(client: openai.OpenAI) -> None:
    found = {model.id: model for model in client.models.list()}
    assert set(found) == {BASE, "code", "support"}
    assert {name: getattr(model, "parent", None) for name, model in found.items()} == {
        BASE: None,
        "code": BASE,
        "support": BASE,
    }
    assert found["code"].model_extra["versions"] == {"code@1": 1.0}  # type: ignore[index]
    assert client.models.retrieve("support").model_extra["parent"] == BASE  # type: ignore[index]
    assert client.models.retrieve("support@1").id == "support@1"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


@pytest.mark.parametrize("model", ["code", "support", "support@1", BASE])
def test_chat_is_what_the_engine_says(client: openai.OpenAI, served: Served, model: str) -> None:
    version = {"code": "code@1", "support": "support@1", "support@1": "support@1"}.get(model)
    expected = from_engine(served, version, PROMPT, 7, 20)
    answer = client.chat.completions.create(model=model, messages=HELLO, max_completion_tokens=20, seed=7)
    [choice] = answer.choices
    assert choice.message.content == expected
    assert (choice.finish_reason, choice.message.role, answer.object) == ("length", "assistant", "chat.completion")
    assert (answer.model, answer.system_fingerprint) == (model, version or BASE)
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 20)
    assert answer.usage.total_tokens == len(PROMPT) + 20

    chunks = list(client.chat.completions.create(model=model, messages=HELLO, max_tokens=20, seed=7, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].usage is None


def test_adapters_differ_and_steering_can_be_left_out(client: openai.OpenAI) -> None:
    def text(model: str, **options: Any) -> str:
        answer = client.completions.create(model=model, prompt="a", max_tokens=24, seed=1, extra_body=options)
        return answer.choices[0].text

    assert len({text("code"), text("support"), text(BASE)}) == 3
    assert text("code", steering="off") == text(BASE)
    assert text("code", steering="prior") != text("code", steering="policy")
    assert text("support", code_temperature=0.0) != text("support")
    zero, one = [0.0] * 3, [1.0] * 3
    assert text("support", codes=zero) == text("support", codes=[zero]) != text("support", codes=one)
    assert text("support", codes=[one, zero]) not in (text("support", codes=one), text("support", codes=zero))


def test_several_answers(client: openai.OpenAI, served: Served) -> None:
    options: Any = {"model": "code", "max_tokens": 16}
    both = client.chat.completions.create(messages=HELLO, n=2, seed=5, **options)
    alone = [client.chat.completions.create(messages=HELLO, seed=seed, **options) for seed in (5, 6)]
    texts = [answer.choices[0].message.content for answer in alone]
    assert [choice.message.content for choice in both.choices] == texts
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage
    assert both.usage.completion_tokens == 32

    pieces: dict[int, str] = {0: "", 1: ""}
    reasons: dict[int, str | None] = {}
    usage = None
    for chunk in client.chat.completions.create(
        messages=HELLO, n=2, seed=5, stream=True, stream_options={"include_usage": True}, **options
    ):
        assert usage is None  # it comes last
        usage = chunk.usage
        for part in chunk.choices:
            pieces[part.index] += part.delta.content or ""
            reasons[part.index] = part.finish_reason
    assert [pieces[0], pieces[1]] == texts
    assert reasons == {0: "length", 1: "length"}
    assert usage == both.usage

    prompts = client.completions.create(prompt=["a", "b"], n=2, seed=5, **options).choices
    assert [choice.text for choice in prompts] == [
        client.completions.create(prompt=prompt, seed=seed, **options).choices[0].text
        for prompt in "ab"
        for seed in (5, 6)
    ]
    encoded: Any = [served.app.service.engine.tokenizer.encode(prompt) for prompt in "ab"]
    numbers = client.completions.create(prompt=encoded, n=2, seed=5, **options).choices
    assert [choice.text for choice in numbers] == [choice.text for choice in prompts]


def test_stop_texts(client: openai.OpenAI) -> None:
    options: Any = {"model": "code", "prompt": "a", "max_tokens": 40, "seed": 2}
    whole = client.completions.create(**options).choices[0]
    stop = whole.text[6:9]
    for stops in (stop, ["never said", stop]):
        cut = client.completions.create(**options, stop=stops).choices[0]
        assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    chunks = list(client.completions.create(**options, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text[: whole.text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_log_probabilities(client: openai.OpenAI, served: Served) -> None:
    engine = served.app.service.engine
    numbers = tuple(engine.tokenizer.encode(PROMPT))
    events = list(engine.submit(Request(numbers, adapter="code@1", seed=3, max_tokens=12, logprobs=3)))
    tokens = [event for event in events if isinstance(event, Token)]
    options: Any = {"model": "code", "seed": 3, "max_tokens": 12}

    chat = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=3, **options).choices[0]
    assert chat.logprobs
    assert chat.logprobs.content
    assert [entry.logprob for entry in chat.logprobs.content] == [token.logprob for token in tokens]
    for entry, token in zip(chat.logprobs.content, tokens, strict=True):
        assert [top.logprob for top in entry.top_logprobs] == [logprob for _, logprob in token.top]
    # One token is one byte here, so the bytes are the answer, also where they are no character by themselves.
    data = bytes(byte for entry in chat.logprobs.content for byte in entry.bytes or [])
    assert data.decode(errors="replace") == chat.message.content
    stream = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=3, stream=True, **options)
    parts = [chunk.choices[0].logprobs for chunk in stream]
    assert [entry for part in parts if part for entry in part.content or []] == chat.logprobs.content

    text = client.completions.create(prompt=PROMPT, logprobs=3, **options).choices[0]
    assert text.logprobs
    assert text.logprobs.token_logprobs == [token.logprob for token in tokens]
    assert text.logprobs.tokens == [entry.token for entry in chat.logprobs.content]
    assert text.logprobs.text_offset
    assert text.logprobs.text_offset[0] == 0
    assert text.logprobs.top_logprobs
    assert all(len(top) == 3 for top in text.logprobs.top_logprobs)
    bare = client.completions.create(prompt=PROMPT, logprobs=0, **options).choices[0].logprobs
    assert bare
    assert (bare.token_logprobs, bare.top_logprobs) == (text.logprobs.token_logprobs, None)
    assert client.completions.create(prompt=PROMPT, **options).choices[0].logprobs is None


def test_the_trace_is_the_engines(client: openai.OpenAI, served: Served) -> None:
    engine = served.app.service.engine
    request = Request(tuple(engine.tokenizer.encode(PROMPT)), adapter="code@1", seed=3, max_tokens=12)
    *_, finished = engine.submit(request)
    assert isinstance(finished, Finished)
    options: Any = {"model": "code", "messages": HELLO, "seed": 3, "max_tokens": 12}
    traced: Any = client.chat.completions.create(**options, extra_body={"trace": True}).choices[0]
    assert (traced.trace["adapter"], traced.trace["seed"]) == ("code@1", 3)
    assert [(s["start"], s["stop"], s["text"], tuple(s["code"])) for s in traced.trace["segments"]] == [
        (s.start, s.stop, s.text, s.code) for s in finished.segments
    ]
    *_, last = client.chat.completions.create(**options, stream=True, extra_body={"trace": True})
    assert last.choices[0].model_extra["trace"] == traced.trace  # type: ignore[index]
    assert not hasattr(client.chat.completions.create(**options).choices[0], "trace")
    base: Any = client.chat.completions.create(**{**options, "model": BASE}, extra_body={"trace": True}).choices[0]
    assert base.trace["segments"] == []


def test_without_a_seed_answers_differ_and_can_be_repeated(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> Any:
        return client.completions.create(model="code", prompt="a", max_tokens=16, **options).choices[0]

    first, second = (ask(extra_body={"trace": True}) for _ in range(2))
    assert first.text != second.text
    assert ask(seed=first.trace["seed"]).text == first.text
    assert ask(temperature=0, seed=1).text != first.text


@pytest.mark.parametrize(
    ("options", "error", "param"),
    [
        ({"model": "nothing"}, openai.NotFoundError, "model"),
        ({"model": "support@9"}, openai.NotFoundError, "model"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"n": 17}, openai.BadRequestError, "n"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"seed": 2**63}, openai.BadRequestError, "seed"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, openai.BadRequestError, None),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools"),
        ({"extra_body": {"code_temprature": 1}}, openai.BadRequestError, "code_temprature"),
        ({"extra_body": {"codes": [1.0]}}, openai.BadRequestError, None),
        ({"extra_body": {"codes": []}}, openai.BadRequestError, "codes"),
        ({"model": BASE, "extra_body": {"steering": "prior"}}, openai.BadRequestError, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own(
    client: openai.OpenAI, options: dict[str, Any], error: type[openai.APIStatusError], param: str | None, stream: bool
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "code", "messages": HELLO, "stream": stream, **options})
    body = caught.value.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["param"] == param
    assert body["message"].endswith(".")
    assert "xxx" not in body["message"]


def test_completions_refuse_what_they_cannot_do(client: openai.OpenAI) -> None:
    for options in ({"echo": True}, {"suffix": "x"}, {"best_of": 2}, {"prompt": ""}, {"prompt": []}, {"prompt": [999]}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**{"model": "code", "prompt": "a", **options})
    with pytest.raises(openai.BadRequestError, match="more than 16 answers"):
        client.completions.create(model="code", prompt=["a"] * 9, n=2)
    # What changes nothing may be sent.
    client.completions.create(
        model="code", prompt="a", max_tokens=1, echo=False, best_of=1, presence_penalty=0, user="me", logit_bias={}
    )
    client.chat.completions.create(
        model="code", messages=HELLO, max_tokens=1, response_format={"type": "text"}, store=False, metadata={"a": "b"}
    )


def test_many_clients_at_once_get_their_own_answers(served: Served) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        model = ("code", "support", BASE)[seed % 3]
        if seed % 2:
            answer = await client.completions.create(model=model, prompt=f"{seed}", seed=seed, max_tokens=12)
            return answer.choices[0].text
        stream = await client.completions.create(model=model, prompt=f"{seed}", seed=seed, max_tokens=12, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def both() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*(ask(client, seed) for seed in range(24)))
            return list(together), [await ask(client, seed) for seed in range(24)]

    together, alone = asyncio.run(both())
    assert together == alone
