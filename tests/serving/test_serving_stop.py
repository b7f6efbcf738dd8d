"""A server that is told to stop: answers may end, those that do not are told so, and everything is closed."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from internalrl.serving.audit.store import AuditStore, Query
from internalrl.serving.main import AuditOptions
from tests.support import server_process
from tests.support.live_server import Served, config_for, save_models, serving

STEP = 0.03
"""Seconds of a pass, at least."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("stop"))


def events(url: str, headers: dict[str, str], begun: threading.Event, **options: Any) -> list[str]:
    """The events of a stream of `code`, to its end."""
    body = {"model": "code", "prompt": "a", "max_tokens": 60, "seed": 1, "stream": True, **options}
    found = []
    with (
        httpx2.Client(verify=False, timeout=60, headers=headers) as client,
        client.stream("POST", f"{url}/completions", json=body) as answer,
    ):
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line:
                found.append(line.removeprefix("data: "))
                begun.set()
    return found


@contextmanager
def slow(folder: Path, state: Path, drain: float) -> Iterator[Served]:
    """A server whose answers take their time; it stops when the block ends."""
    options: dict[str, Any] = {"registry": state / "registry", "audit": AuditOptions(folder=state / "audit")}
    with serving(config_for(folder, drain_seconds=drain, **options), folder) as served:
        handle = served.app.service.engine.base.register_forward_pre_hook(lambda *_: time.sleep(STEP))
        yield served
    handle.remove()


def audited(audit: Path) -> str:
    """The text that is in the audit's database; nothing may be left in its journal."""
    assert not list((audit / "journal").glob("*"))
    with closing(AuditStore(audit)) as store:
        return "".join(segment.text or "" for segment in reversed(store.find(Query(limit=1000))))


def written(found: list[str]) -> str:
    chunks = [json.loads(event) for event in found if event.startswith('{"id"')]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def test_running_answers_may_end(folder: Path, tmp_path: Path) -> None:
    begun = threading.Event()
    with ThreadPoolExecutor(1) as clients:
        with slow(folder, tmp_path, drain=60) as served:
            stream = clients.submit(events, served.url, {}, begun)
            assert begun.wait(20)
        found = stream.result(60)
    assert found[-1] == "[DONE]"
    assert audited(tmp_path / "audit") == written(found)


def test_answers_that_do_not_end_in_time_are_told_so(folder: Path, tmp_path: Path) -> None:
    begun = threading.Event()

    def whole(url: str) -> httpx2.Response:
        body = {"model": "code", "prompt": "a", "max_tokens": 400, "seed": 1}
        return httpx2.post(f"{url}/completions", json=body, verify=False, timeout=60)

    with ThreadPoolExecutor(2) as clients:
        with slow(folder, tmp_path, drain=0.3) as served:
            stream: Future[list[str]] = clients.submit(events, served.url, {}, begun, max_tokens=400)
            answer = clients.submit(whole, served.url)
            assert begun.wait(20)
            while served.app.service.engine.stats().running < 2:
                time.sleep(0.01)
            began = time.monotonic()
        assert time.monotonic() - began < 10
        found, refused = stream.result(60), answer.result(60)
    assert len(found) > 1
    assert json.loads(found[-1])["error"]["code"] == "shutting_down"
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert written(found) in audited(tmp_path / "audit")


def test_requests_that_come_too_late_are_told_so(folder: Path, tmp_path: Path) -> None:
    """Over a connection that is still open, say."""
    with slow(folder, tmp_path, drain=0) as served:
        served.app.service._stopping = True
        answer = httpx2.post(f"{served.url}/completions", json={"model": "code", "prompt": "a"}, verify=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_close_everything(tmp_path: Path, number: signal.Signals) -> None:
    """Also a second one, for those who do not want to wait."""
    server_process.save_models(tmp_path, hidden_size=256, num_hidden_layers=8)
    begun = threading.Event()
    with server_process.server(tmp_path, "--drain-seconds", "60") as running, ThreadPoolExecutor(1) as clients:
        stream = clients.submit(events, f"{running.url}/v1", running.headers, begun, max_tokens=400, n=8)
        assert begun.wait(60)
        running.process.send_signal(number)
        time.sleep(0.5)
        assert running.process.poll() is None
        running.process.send_signal(number)
        assert running.process.wait(30) == 0
        found = stream.result(60)
        audit = running.folder / "audit"
    assert json.loads(found[-1])["error"]["code"] == "shutting_down"
    assert len(audited(audit)) >= len(written(found)) > 0
