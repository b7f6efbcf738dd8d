"""Keys, sizes, times and errors of the server, over real sockets."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from internalrl import cli
from internalrl.errors import InternalRLError
from internalrl.players.engine.running import Running
from internalrl.serving.api.security import LOCAL, Key, Keys, Quotas
from internalrl.serving.main import Bounds, ServeConfig, main
from tests.support.live_server import BASE, Served, config_for, save_models, serving

BOUNDS = Bounds(body_bytes=20_000, body_seconds=2.0, request_seconds=60.0, answer_tokens=400)
WEB = httpx2.Client(verify=False, timeout=60)  # making one reads all certificates of this machine
SLOTS = 2
ASK = {"model": "code", "prompt": "a", "max_tokens": 4, "seed": 1}


@pytest.fixture(scope="module", autouse=True)
def web() -> Iterator[None]:
    with WEB:
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("security"))


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving(config_for(folder, bounds=BOUNDS, slots=SLOTS, queue=10), folder) as running:
        yield running


@pytest.fixture(scope="module")
def locked(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with keys."""
    registry = tmp_path_factory.mktemp("locked")
    Keys(registry).create("first")
    with serving(config_for(folder, registry=registry), folder) as running:
        yield running


def new_key(served: Served, *scopes: Any, **limits: int) -> str:
    _, text = served.app.service.keys.create("test", scopes or ("generate",), **limits)
    served.app.service.keys.refresh()
    return text


def problem(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of an answer, which has OpenAI's form and says nothing of the server's insides."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    body = answer.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert not re.search(r'Traceback|File "|\.py|/tmp|/root|0x[0-9a-f]{6}', answer.text)
    found: dict[str, Any] = body["error"]
    return found


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- keys -----------------------------------------------------------------------------------------------------


def test_keys_are_hashed_and_revocable(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    key, text = keys.create("me", ("generate", "audit"), requests_per_minute=3)
    keys.refresh()
    assert keys.find(text) == key
    assert (key.scopes, key.requests_per_minute) == ({"generate", "audit"}, 3)
    secret = text.split("-", 2)[2]
    assert len(secret) >= 43
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert key.id.encode() in stored
    assert secret.encode() not in stored
    for wrong in ("", "x", text[:-1], text + "x", text.replace("irl", "abc"), f"irl-{key.id}-", f"irl-0-{secret}"):
        assert keys.find(wrong) is None
    other, other_text = keys.create("other")
    keys.refresh()
    assert keys.find(f"irl-{other.id}-{secret}") is None
    assert keys.find(other_text) == other

    elsewhere = Keys(tmp_path)
    elsewhere.revoke(key.id)
    keys.refresh()
    assert keys.find(text) is None
    assert keys.needed
    with pytest.raises(InternalRLError, match="No valid key"):
        keys.revoke(key.id)
    with pytest.raises(InternalRLError, match="'root' is no scope"):
        keys.create("x", ("root",))  # type: ignore[arg-type]


def test_keys_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*argv: str) -> Any:
        assert cli.main(["keys", *argv, "--registry", str(tmp_path), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    made = run("create", "me", "--scopes", "generate", "admin", "--tokens-per-minute", "100")
    [listed] = run("list")["keys"]
    assert made.pop("key").startswith(f"irl-{listed['id']}-")
    assert made == listed
    assert (listed["scopes"], listed["tokens_per_minute"], listed["revoked"]) == ("admin generate", 100, None)
    assert run("revoke", listed["id"])["revoked"]
    assert cli.main(["keys", "revoke", listed["id"], "--registry", str(tmp_path)]) == 2


def test_without_keys_only_this_machine_is_served(folder: Path, served: Served) -> None:
    with pytest.raises(InternalRLError, match="keys create"):
        main(config_for(folder, host="0.0.0.0", registry=folder / "no-keys"))
    page = WEB.get(f"{served.url}/models", headers={"Host": "evil.example"})
    assert "localhost" in problem(page, 403)["message"]
    for host in ("localhost", f"localhost:{served.port}", "[::1]:80", "127.0.0.1"):
        assert WEB.get(f"{served.url}/models", headers={"Host": host}).status_code == 200


def test_scopes(locked: Served) -> None:
    def ask(key: str | None, method: str, path: str, body: Any = None) -> httpx2.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return WEB.request(method, locked.root + path, json=body, headers=headers)

    addresses = {
        "generate": ("POST", "/v1/completions", ASK),
        "feedback": ("POST", "/v1/feedback", {"request_id": "x", "thumbs": "up"}),
        "metrics": ("GET", "/metrics", None),
        "audit": ("GET", "/audit", None),
        "admin": ("POST", "/v1/admin/adapters/nothing/rollback", None),
    }
    for scope in addresses:
        key = new_key(locked, scope)
        for other, address in addresses.items():
            status = ask(key, *address).status_code
            assert (status == 403) == (scope != other), (scope, other, status)
            assert status in (200, 403, 404)
    for wrong in (None, "irl-x-y", "nonsense"):
        for address in (*addresses.values(), ("GET", "/openapi.json", None), ("GET", "/nothing", None)):
            assert problem(ask(wrong, *address), 401)["code"] == "invalid_api_key"
    assert ask(None, "GET", "/health").json() == {"status": "ok"}

    auditor = new_key(locked, "audit")  # a browser asks for a password
    assert ask(None, "GET", "/audit").headers["www-authenticate"].startswith("Basic")
    assert WEB.get(f"{locked.root}/audit", auth=("anyone", auditor)).status_code == 200
    generator = new_key(locked, "generate")
    assert WEB.get(f"{locked.url}/models", auth=("anyone", generator)).status_code == 401


def test_a_client_with_a_wrong_or_a_revoked_key(locked: Served) -> None:
    text = new_key(locked)
    with openai.OpenAI(base_url=locked.url, api_key=text, max_retries=0) as client:
        client.completions.create(**ASK)  # type: ignore[call-overload]
        Keys(locked.app.service.keys.folder).revoke(text.split("-")[1])  # in another process, say
        wait_until(lambda: locked.app.service.keys.find(text) is None)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_limits_of_a_key(locked: Served) -> None:
    def client(**limits: int) -> openai.OpenAI:
        return openai.OpenAI(base_url=locked.url, api_key=new_key(locked, **limits), max_retries=0)

    with client(requests_per_minute=2) as few:
        for _ in range(2):
            few.models.list()
        with pytest.raises(openai.RateLimitError) as caught:
            few.models.list()
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 31
    with client(tokens_per_minute=40) as short:
        ask: Any = {"model": "code", "prompt": "abc", "seed": 1}
        with pytest.raises(openai.RateLimitError, match="more tokens than"):
            short.completions.create(**ask, max_tokens=38)
        text = short.completions.create(**ask, max_tokens=20).choices[0].text
        # 3 + 20 of 40 are used. What was reserved and not used is given back.
        for _ in range(2):
            short.completions.create(**ask, max_tokens=10, stop=text[0])
        with pytest.raises(openai.RateLimitError, match="used up"):
            short.completions.create(**ask, max_tokens=20)


def test_quotas_refill_steadily() -> None:
    key, quotas = dataclasses.replace(LOCAL, tokens_per_minute=60), Quotas()
    assert quotas.take(key, "tokens", 60, 0.0) == 0
    assert quotas.take(key, "tokens", 10, 0.0) == pytest.approx(10)
    assert quotas.take(key, "tokens", 10, 4.0) == pytest.approx(6)
    assert quotas.take(key, "tokens", 10, 10.0) == 0
    quotas.give_back(key, 5, 10.0)
    assert quotas.take(key, "tokens", 5, 10.0) == 0
    assert quotas.take(key, "tokens", 60, 1000.0) == 0  # never more than a minute's worth
    assert quotas.take(key, "tokens", 1, 1000.0) > 0
    assert quotas.take(key, "tokens", 61, 9999.0) == float("inf")
    assert quotas.take(Key("free", "", frozenset()), "requests", 10**9, 0.0) == 0


# -- sizes and times ------------------------------------------------------------------------------------------


def test_large_bodies_are_refused_also_in_chunks(served: Served) -> None:
    body = json.dumps({**ASK, "user": "x" * 30_000}).encode()
    headers = {"Content-Type": "application/json"}
    refused = problem(WEB.post(f"{served.url}/completions", content=body, headers=headers), 413)
    assert refused["code"] == "body_too_large"
    chunks = iter([body[i : i + 1000] for i in range(0, len(body), 1000)])
    problem(WEB.post(f"{served.url}/completions", content=chunks, headers=headers), 413)
    small = iter([json.dumps(ASK).encode()[i : i + 10] for i in range(0, 100, 10)])
    assert WEB.post(f"{served.url}/completions", content=small, headers=headers).status_code == 200


@contextmanager
def raw(served: Served, data: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(data)
        yield connection


class Paced:
    """Lets the engine make as many steps as are allowed, so that no test has to be faster than it."""

    def __init__(self) -> None:
        self._step, self._allowed, self._free = Running.step, threading.Semaphore(0), threading.Event()

    def allow(self, steps: int) -> None:
        self._allowed.release(steps)

    def free(self) -> None:
        """No more waiting."""
        self._free.set()

    @property
    def step(self) -> Callable[[Running, int], int]:
        """In place of the engine's own."""

        def step(running: Running, most: int) -> int:
            while not (self._free.is_set() or self._allowed.acquire(timeout=0.02)):
                pass
            return self._step(running, most)

        return step


@contextmanager
def paced() -> Iterator[Paced]:
    """Engines step only when they may, until the block ends."""
    pace = Paced()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Running, "step", pace.step)
        try:
            yield pace
        finally:
            pace.free()


def waiting(served: Served) -> int:
    stats = served.app.service.engine.stats()
    return stats.running + stats.waiting


@contextmanager
def occupied(served: Served, sequences: int, stream: bool = False) -> Iterator[Paced]:
    """A client asks for so many long sequences; when the block ends it leaves. The engine steps only when it may."""
    ask = {**ASK, "max_tokens": 400, "n": sequences, "stream": stream}
    with paced() as pace:
        with raw(served, post(json.dumps(ask).encode())):
            wait_until(lambda: waiting(served) == sequences)
            yield pace
        wait_until(lambda: served.app._open == 0)  # the server has noticed
        before = served.app.service.engine.stats().tokens
        pace.allow(2)  # the step that was about to be made, and the one before which slots are freed
        wait_until(lambda: waiting(served) == 0)
        assert served.app.service.engine.stats().tokens - before <= 2 * SLOTS, "it went on for nobody"


def read_all(connection: socket.socket) -> bytes:
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def post(body: bytes, *, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body


def test_slow_heads_and_bodies_are_cut_off(served: Served) -> None:
    heads = (b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
    began = time.monotonic()
    with ExitStack() as stack:
        slow = [stack.enter_context(raw(served, head)) for head in heads]
        half = stack.enter_context(raw(served, post(b'{"model"', length=100)))
        late = stack.enter_context(raw(served, post(b"", length=10**9)))
        assert b" 413 " in late.recv(65536)  # at once; what it still sends is thrown away, but not for ever
        with suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - began < 30:
                late.sendall(b" " * 100)
                time.sleep(0.02)
        assert [read_all(connection) for connection in slow] == [b""] * 3
        assert b" 408 " in read_all(half).split(b"\r\n")[0]
    assert BOUNDS.body_seconds - 0.1 < time.monotonic() - began < 25


def test_what_is_no_http_is_answered_as_all_errors_are(served: Served) -> None:
    for data in (b"nonsense\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        with raw(served, data) as connection:
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert b" 400 " in head
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_the_whole_answer_has_a_time(served: Served) -> None:
    with occupied(served, 10) as pace, pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.app, "_bounds", dataclasses.replace(BOUNDS, request_seconds=1.0))
        assert problem(WEB.post(f"{served.url}/completions", json=ASK), 408)["code"] == "deadline"
        with WEB.stream("POST", f"{served.url}/completions", json={**ASK, "stream": True}) as answer:
            assert answer.status_code == 200
            with pytest.raises(httpx2.RemoteProtocolError):
                list(answer.iter_lines())
        pace.allow(2)
        wait_until(lambda: waiting(served) == 10)  # these were dropped, and nobody else


# -- clients that leave, or read slowly -----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(served: Served, stream: bool) -> None:
    with occupied(served, 12, stream=stream) as pace:
        pace.allow(5)


@contextmanager
def reader(served: Served) -> Iterator[socket.socket]:
    """A connection that takes little at a time."""
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(60)
        slow.connect(("127.0.0.1", served.port))
        yield slow


def answered(served: Served) -> int:
    """Completions that have been given, or broken off."""
    line = 'internalrl_http_requests_total{route="/v1/completions",status="200"} '
    [value] = [text for text in WEB.get(f"{served.root}/metrics").text.splitlines() if text.startswith(line)]
    return int(float(value.removeprefix(line)))


def test_a_full_queue_is_answered_with_429(served: Served) -> None:
    with occupied(served, 12):
        refused = WEB.post(f"{served.url}/completions", json=ASK)
        assert problem(refused, 429)["code"] == "busy"
        assert int(refused.headers["retry-after"]) >= 1
        assert WEB.get(f"{served.root}/health").status_code == 200
    problem(WEB.post(f"{served.url}/completions", json={**ASK, "n": 13, "max_tokens": 400}), 429)
    wait_until(lambda: waiting(served) == 0)  # of a request that fits only in part nothing stays


def test_a_slow_reader_holds_nobody_up_and_loses_nothing(served: Served) -> None:
    engine = served.app.service.engine
    ask = {**ASK, "max_tokens": 100, "logprobs": 20, "n": 4}
    expected = [choice["text"] for choice in WEB.post(f"{served.url}/completions", json=ask).json()["choices"]]
    with reader(served) as slow:
        before = engine.stats().requests
        slow.sendall(post(json.dumps({**ask, "stream": True}).encode()))
        # Nothing is read, but the engine goes on, ends the answer and frees the slots.
        wait_until(lambda: engine.stats().requests == before + 4)
        assert WEB.post(f"{served.url}/completions", json=ASK).status_code == 200
        got = b""
        while b"[DONE]" not in got:
            part = slow.recv(65536)
            assert part
            got += part
    assert len(got) > 300_000  # more than the buffers on the way
    texts = ["", "", "", ""]
    for line in got.splitlines():
        if line.startswith(b"data: {"):
            [choice] = json.loads(line[6:])["choices"]
            texts[choice["index"]] += choice["text"]
    assert texts == expected


def test_a_client_that_never_reads_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.app, "_bounds", dataclasses.replace(BOUNDS, request_seconds=0.5))
    ask = {**ASK, "max_tokens": 400, "stream": True, "logprobs": 20, "n": 4}
    before = answered(served)
    with reader(served) as slow:
        slow.sendall(post(json.dumps(ask).encode()))
        wait_until(lambda: answered(served) == before + 1)
        assert b"[DONE]" not in read_all(slow)


# -- errors ---------------------------------------------------------------------------------------------------


def test_every_error_has_openais_form(served: Served) -> None:
    root, url = served.root, served.url
    assert problem(WEB.get(f"{root}/nothing"), 404)
    assert problem(WEB.get(f"{url}/completions"), 405)
    assert problem(WEB.request("OPTIONS", f"{url}/completions"), 405)
    assert problem(WEB.get(f"{root}/docs"), 404)
    json_type = {"Content-Type": "application/json"}
    bodies = (b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 9000, b"9" * 9000, b'{"model": NaN}', b"{}")
    for body in bodies:
        problem(WEB.post(f"{url}/completions", content=body, headers=json_type), 400)
    problem(WEB.post(f"{url}/completions", content=json.dumps(ASK), headers={"Content-Type": "text/plain"}), 400)
    strange = (
        {"prompt": "\ud800"},
        {"stop": ["\udfff"]},
        {"user": "\ud800"},
        {"temperature": float("nan")},
        {"codes": [1e400]},
        {"codes": [[]]},
        {"seed": 1.5},
        {"n": True},
        {"x" * 500: 1},
        {"<script>": 1},
    )
    for options in strange:
        answer = WEB.post(f"{url}/completions", content=json.dumps({**ASK, **options}), headers=json_type)
        assert answer.status_code in (200, 400), (options, answer.text)
        assert "script" not in answer.text
        assert len(answer.text) < 400


def test_no_page_of_another_origin_may_ask(served: Served) -> None:
    answer = WEB.get(f"{served.url}/models", headers={"Origin": "https://evil.example"})
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert "server" not in answer.headers


def test_our_own_failure_is_told_without_its_insides(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret of /srv/file.py")

    monkeypatch.setattr(served.app.service, "check_model", fail)
    for stream in (False, True):
        answer = WEB.post(f"{served.url}/completions", json={**ASK, "stream": stream})
        assert problem(answer, 500)["type"] == "server_error"
        assert "secret" not in answer.text


def test_serve_says_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*argv: str) -> str:
        assert cli.main(["serve", *argv]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    base, registry = str(folder / "base"), ("--registry", str(folder / "wrong"), "--port", "0")
    assert "give NAME=PATH" in complaint(base, "--adapter", "code")
    assert "twice" in complaint(base, "--adapter", "a=b", "--adapter", "a=c")
    assert "--port" in complaint(base, "--port", "70000")
    assert "no model" in complaint(str(folder / "nothing"), *registry)
    assert "cannot be read" in complaint(base, "--adapter", f"code={folder / 'nothing'}", *registry)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another" in complaint(base, "--port", str(taken.getsockname()[1]))
    assert ServeConfig(BASE).adapter == ()
