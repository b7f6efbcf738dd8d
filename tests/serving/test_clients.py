"""Client libraries as people use them: two turns, whole and streamed, with what each sends by its own default."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import openai
import pytest

from internalrl.serving.main import Bounds
from tests.support.live_server import Served, config_for, save_models, serving

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it fetches a list of prices
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import litellm
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI
    from langchain_openai import OpenAI as LangChainText

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
MORE = {"role": "user", "content": "More"}


@pytest.fixture(scope="module", autouse=True)
def loop() -> Iterator[None]:
    """LiteLLM takes an event loop, or makes one and leaves it open."""
    with closing(asyncio.new_event_loop()) as loop:
        asyncio.set_event_loop(loop)
        yield
        asyncio.set_event_loop(None)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = save_models(tmp_path_factory.mktemp("clients"))
    with serving(config_for(folder, bounds=Bounds(answer_tokens=8)), folder) as running:
        yield running


def test_openai(served: Served) -> None:
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        chat: Any = client.chat.completions
        first = chat.create(model="code", messages=HELLO).choices[0].message
        assert first.content
        turns = [*HELLO, first, MORE]
        assert chat.create(model="code", messages=turns).choices[0].message.content
        assert "".join(
            part.choices[0].delta.content or "" for part in chat.create(model="code", messages=turns, stream=True)
        )
        with suppress(openai.LengthFinishReasonError), chat.stream(model="code", messages=turns) as stream:
            for _ in stream:
                final = stream.current_completion_snapshot.choices[0].message
        assert final.content
        assert chat.create(model="code", messages=[*turns, final, MORE]).choices[0].message.content
        assert chat.create(model="code", messages=[*turns, final.model_dump(), MORE]).choices[0].message.content


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_langchain(served: Served) -> None:
    chat = ChatOpenAI(base_url=served.url, api_key="none", model="code", max_retries=0)  # type: ignore[arg-type]
    hello: list[Any] = [SystemMessage("Be brief."), HumanMessage("Hello")]
    first = chat.invoke(hello)
    assert first.content
    turns = [*hello, first, HumanMessage("More")]
    assert chat.invoke(turns).content
    assert "".join(str(part.content) for part in chat.stream(turns))
    text = LangChainText(base_url=served.url, api_key="none", model="code", max_retries=0, max_tokens=8)  # type: ignore[call-arg,arg-type]
    assert text.invoke("Hello")
    assert "".join(text.stream("Hello"))


@pytest.mark.filterwarnings("ignore")
def test_litellm(served: Served) -> None:
    options: dict[str, Any] = {"model": "openai/code", "api_base": served.url, "api_key": "none", "num_retries": 0}
    first = litellm.completion(messages=HELLO, **options).choices[0].message
    assert first.content
    for sent in (first, first.model_dump()):
        turns = [*HELLO, sent, MORE]
        assert litellm.completion(messages=turns, **options).choices[0].message.content
        stream = litellm.completion(messages=turns, stream=True, **options)
        assert "".join(part.choices[0].delta.content or "" for part in stream)
    text = litellm.text_completion(prompt="Hello", max_tokens=8, **{**options, "model": "text-completion-openai/code"})
    assert text.choices[0].text
