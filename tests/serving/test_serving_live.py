"""A running server follows the registry: promotions, rollbacks, splits; feedback, the audit and metrics over HTTP."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

from internalrl.serving.api import service as service_module
from internalrl.serving.audit.store import AuditStore, Query
from internalrl.serving.main import AuditOptions, Bounds
from internalrl.serving.registry.registry import Registry
from internalrl.strategies.library import STRATEGIES_FILE, meaning_of
from tests.support.live_server import BASE, Served, config_for, save_models, serving
from tests.support.strategies import library

WEB = httpx2.Client(verify=False, timeout=60)


@pytest.fixture(scope="module", autouse=True)
def web() -> Iterator[None]:
    with WEB:
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("live"))


@pytest.fixture
def served(folder: Path, tmp_path: Path) -> Iterator[Served]:
    options: dict[str, Any] = {"registry": tmp_path / "registry", "audit": AuditOptions(folder=tmp_path / "audit")}
    with serving(config_for(folder, adapter=(f"support={folder / 'support'}",), **options), folder) as running:
        yield running


def ask(served: Served, seed: int = 1, **options: Any) -> dict[str, Any]:
    body = {"model": "support", "prompt": "a", "max_tokens": 12, "seed": seed, **options}
    answer = WEB.post(f"{served.url}/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def post(served: Served, path: str, body: Any = None, status: int = 200) -> Any:
    answer = WEB.post(served.root + path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def registry_of(served: Served) -> Registry:
    """The registry as another process has it."""
    return Registry(served.app.service.keys.folder)


def test_a_promotion_elsewhere_is_followed_without_losing_a_request(served: Served, folder: Path) -> None:
    registry = registry_of(served)
    answers: list[tuple[float, float, str, str]] = []
    failures: list[str] = []
    stop = threading.Event()

    def client(number: int) -> None:
        with httpx2.Client(verify=False, timeout=60) as own:
            body = {"model": "support", "prompt": "a", "max_tokens": 12, "seed": 1}
            while not stop.is_set():
                began = time.monotonic()
                answer = own.post(f"{served.url}/completions", json=body)
                if answer.status_code != 200:
                    failures.append(answer.text)
                    return
                found = answer.json()
                text = found["choices"][0]["text"]
                answers.append((began, time.monotonic(), found["system_fingerprint"], text))

    before = ask(served)
    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    second = registry.add("support", folder / "more")
    promoted = time.monotonic()
    registry.promote(second.key)
    while not any(version == second.key for *_, version, _ in answers):
        assert time.monotonic() < promoted + 60
        time.sleep(0.01)
    time.sleep(0.3)
    rolled = time.monotonic()
    registry.rollback("support")
    while not any(began > rolled and version == "support@1" for began, _, version, _ in answers):
        assert time.monotonic() < rolled + 60
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    registry.close()
    assert not failures
    texts = {version: {text for *_, found, text in answers if found == version} for *_, version, _ in answers}
    assert texts["support@1"] == {before["choices"][0]["text"]}
    assert len(texts[second.key]) == 1
    assert texts[second.key] != texts["support@1"]
    assert served.app.service.engine.adapters == ("support@1",)  # the other is not kept


def test_running_answers_finish_on_their_version(served: Served, folder: Path) -> None:
    version = served.app.service.registry.add("support", folder / "more")
    expected = ask(served, max_tokens=200)["choices"][0]["text"]
    got: list[Any] = []
    running = threading.Thread(target=lambda: got.append(ask(served, max_tokens=200)))
    running.start()
    while served.app.service.engine.stats().running == 0 and running.is_alive():
        time.sleep(0.001)
    assert post(served, "/v1/admin/adapters/support/promote", {"version": 2})["versions"] == {version.key: 1.0}
    assert ask(served)["system_fingerprint"] == version.key  # at once: the endpoint waits for the server itself
    running.join()
    assert (got[0]["system_fingerprint"], got[0]["choices"][0]["text"]) == ("support@1", expected)


def test_splits_stick_to_users(served: Served, folder: Path) -> None:
    served.app.service.registry.add("support", folder / "more")
    routed = post(served, "/v1/admin/adapters/support/split", {"weights": {"1": 1, "2": 1}})
    assert routed["versions"] == {"support@1": 0.5, "support@2": 0.5}
    [listed] = [model for model in WEB.get(f"{served.url}/models").json()["data"] if model["id"] == "support"]
    assert listed["versions"] == routed["versions"]
    arms = {user: ask(served, user=user)["system_fingerprint"] for user in map(str, range(16))}
    assert set(arms.values()) == {"support@1", "support@2"}
    for user, arm in arms.items():
        assert ask(served, user=user)["system_fingerprint"] == arm
    assert ask(served, model="support@2")["system_fingerprint"] == "support@2"
    assert post(served, "/v1/admin/adapters/support/rollback")["versions"] == {"support@1": 1.0}


def test_admin_mistakes(served: Served) -> None:
    for path, body, status in (
        ("support/promote", {"version": 9}, 404),
        ("support/promote", {"version": 0}, 400),
        ("nothing/promote", {"version": 1}, 404),
        ("support/rollback", None, 404),
        ("support/split", {"weights": {"1": 1, "9": 1}}, 404),
        ("support/split", {"weights": {}}, 400),
        ("support/split", {"weights": {"one": 1}}, 400),
        ("SUPPORT/rollback", None, 400),
    ):
        assert "error" in post(served, f"/v1/admin/adapters/{path}", body, status)
    assert ask(served)["system_fingerprint"] == "support@1"


def test_feedback(served: Served) -> None:
    answers = [ask(served, seed) for seed in range(6)]
    for i, answer in enumerate(answers[:4]):
        said = {"thumbs": "up"} if i else {"reward": 0.25}
        got = post(served, "/v1/feedback", {"request_id": answer["id"], **said})
        assert got == {"object": "feedback", "request_id": answer["id"], "version": "support@1"}
    [outcome] = served.app.service.registry.compare("support").outcomes
    assert (outcome.n, outcome.mean) == (4, pytest.approx(0.8125))
    base = ask(served, model=BASE)["id"]
    for body, status in (
        ({"request_id": "nothing", "thumbs": "up"}, 404),
        ({"request_id": base, "thumbs": "up"}, 404),
        ({"request_id": answers[4]["id"]}, 400),
        ({"request_id": answers[4]["id"], "thumbs": "up", "reward": 1}, 400),
        ({"request_id": answers[4]["id"], "thumbs": "sideways"}, 400),
        ({"request_id": "../x", "thumbs": "up"}, 400),
    ):
        assert "error" in post(served, "/v1/feedback", body, status)


def test_answers_do_not_wait_for_a_database_that_hangs(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    service, back = served.app.service, threading.Event()
    answered, feedback = service.registry.answered, service.registry.feedback

    def hanging(work: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: (back.wait(120), work(*args, **options))[1]

    monkeypatch.setattr(service_module, "REMEMBER", 0.05)
    monkeypatch.setattr(service.registry, "answered", hanging(answered))
    monkeypatch.setattr(service.registry, "feedback", hanging(feedback))
    with ThreadPoolExecutor(24) as clients:
        try:
            nothing = {"request_id": "nothing", "thumbs": "up"}
            said = [clients.submit(post, served, "/v1/feedback", nothing, 404) for _ in range(12)]
            answers = [answer.result(60) for answer in [clients.submit(ask, served, seed) for seed in range(8)]]
            assert not any(entry.done() for entry in said)
        finally:
            back.set()
        assert all(entry.result(60) for entry in said)
        post(served, "/v1/feedback", {"request_id": answers[0]["id"], "thumbs": "up"})  # it was not forgotten


def test_every_answer_is_in_the_audit_when_it_arrives(served: Served) -> None:
    audit = served.app.service.audit
    assert audit
    answer = ask(served, trace=True, n=2)
    while audit.counts()["stored"] < audit.counts()["written"]:  # the journal has it; the database follows
        time.sleep(0.02)
    for index, choice in enumerate(answer["choices"]):
        page = WEB.get(f"{served.root}/audit/{answer['id']}{f'-{index}' if index else ''}").text
        assert page.count('<tr id="s') == len(choice["trace"]["segments"])
    assert answer["id"] in WEB.get(f"{served.root}/audit", params={"adapter": "support"}).text
    assert "No answer fits" in WEB.get(f"{served.root}/audit", params={"adapter": "code"}).text
    page = WEB.get(f"{served.root}/audit/nothing")
    assert page.status_code == 404
    assert "default-src 'none'" in WEB.get(f"{served.root}/audit").headers["content-security-policy"]


def test_without_an_audit_that_works_there_are_no_steered_answers(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = served.app.service.audit
    assert audit
    monkeypatch.setattr(audit, "_append", lambda rows: "The disk is full.")
    while audit.failure is None:
        time.sleep(0.02)
    assert post(served, "/v1/completions", {"model": "support", "prompt": "a"}, 503)["error"]["code"] == "no_audit"
    assert WEB.get(f"{served.root}/health").status_code == 503
    ask(served, model=BASE)
    monkeypatch.undo()
    while audit.failure is not None:
        time.sleep(0.02)
    ask(served)


def metrics(served: Served) -> dict[str, str]:
    lines = WEB.get(f"{served.root}/metrics").text.splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if line[0] != "#")


def test_metrics(served: Served) -> None:
    ask(served)
    ask(served, model=BASE, n=2)
    WEB.get(f"{served.root}/nothing")
    lines = metrics(served)
    assert lines['internalrl_http_requests_total{route="/v1/completions",status="200"}'] == "2.0"
    assert lines['internalrl_http_requests_total{route="none",status="404"}'] == "1.0"
    assert lines['internalrl_tokens_total{kind="completion",model="support@1"}'] == "12.0"
    assert lines[f'internalrl_tokens_total{{kind="completion",model="{BASE}"}}'] == "24.0"
    assert lines[f'internalrl_tokens_total{{kind="prompt",model="{BASE}"}}'] == "1.0"
    assert lines["internalrl_sequences_total"] == "3.0"
    assert lines["internalrl_slots_running"] == "0.0"
    assert lines["internalrl_adapters_live"] == "1.0"
    assert float(lines["internalrl_segments_total"]) >= 1
    assert lines["internalrl_audit_written_total"] == lines["internalrl_segments_total"]


def test_a_damaged_version_does_not_replace_one_that_works(served: Served, folder: Path) -> None:
    version = served.app.service.registry.add("support", folder / "more")
    file = version.folder / "adapter_model.safetensors"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert metrics(served)["internalrl_adapters_failed"] == "0.0"
    post(served, "/v1/admin/adapters/support/promote", {"version": 2})
    assert ask(served)["system_fingerprint"] == "support@1"
    found = metrics(served)
    assert (found["internalrl_adapters_failed"], found["internalrl_adapters_live"]) == ("1.0", "1.0")
    assert float(found["internalrl_registry_errors_total"]) >= 1


@pytest.mark.parametrize("of", ["registry", "keys", "audit"])
def test_a_database_that_is_lost_shows_in_the_metrics(served: Served, monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    audit = served.app.service.audit
    assert audit
    reads = {"registry": served.app.service.registry, "keys": served.app.service.keys, "audit": audit.store}
    name = f'internalrl_database_lost{{of="{of}"}}'
    assert metrics(served)[name] == "0.0"
    with monkeypatch.context() as lost:
        lost.setattr(reads[of]._database, "_reader", None)
        lost.setattr(reads[of]._database, "_writer", None)
        ask(served)  # what is live answers, and the audit has something to store
        while metrics(served)[name] == "0.0":
            time.sleep(0.05)
        others = {key: value for key, value in metrics(served).items() if key.startswith("internalrl_database_lost")}
        assert sum(map(float, others.values())) == 1
    while metrics(served)[name] == "1.0":
        time.sleep(0.05)


def test_limits_are_kept_counted_and_audited(folder: Path, tmp_path: Path) -> None:
    adapter, limits = shutil.copytree(folder / "support", tmp_path / "support"), tmp_path / "limits.yaml"
    by_sign = library([[-1.0, 0, 0], [1.0, 0, 0]], [100.0, 100.0], meaning_of(adapter))
    by_sign.renamed(1, "delete").renamed(2, "open").save(adapter / STRATEGIES_FILE)
    limits.write_text("strategies: {delete: deny, open: review}")
    options: dict[str, Any] = {"registry": tmp_path / "registry", "audit": AuditOptions(folder=tmp_path / "audit")}
    config = config_for(folder, adapter=(f"support={adapter}",), limits=(f"support={limits}",), **options)
    with serving(config, folder) as served:
        answer = ask(served, max_tokens=40, trace=True)
        segments = answer["choices"][0]["trace"]["segments"]
        counted = f"internalrl_violations_total {len(segments)}.0"
        assert counted in WEB.get(f"{served.root}/metrics").text.splitlines()
    assert {segment["violation"] for segment in segments} == {"denied delete: project", "review open"}
    assert all(segment["code"][0] > 0 and segment["strategy"] == "open" for segment in segments)
    with closing(AuditStore(tmp_path / "audit")) as store:
        found = store.find(Query(violation="denied", limit=100))
        assert {segment.request for segment in found} == {answer["id"]}
        assert len(found) == sum(segment["violation"].startswith("denied") for segment in segments)


def test_the_base_alone_can_be_served(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"audit": AuditOptions(enabled=False), "bounds": Bounds(prompt_tokens=5)}
    with serving(config_for(folder, adapter=(), registry=tmp_path, **options), folder) as alone:
        assert ask(alone, model=BASE)["choices"][0]["finish_reason"] in ("stop", "length")
        assert post(alone, "/v1/completions", {"model": "code", "prompt": "a"}, 404)
        assert post(alone, "/v1/completions", {"model": BASE, "prompt": "abcdef"}, 400)
        assert WEB.get(f"{alone.root}/audit").status_code == 404
