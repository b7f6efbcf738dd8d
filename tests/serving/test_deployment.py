"""The commands of deploy/ serve behind its proxy, and those of docs/deploy.md save and restore what they know."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from internalrl.base.fingerprint import base_fingerprint
from internalrl.serving.api.security import SCOPES, Keys
from internalrl.serving.audit.journal import Journal
from internalrl.serving.audit.store import AuditStore, Query
from internalrl.serving.database import PASSWORD_FILE
from internalrl.serving.main import AuditOptions, ServeConfig
from internalrl.serving.registry.registry import Registry
from tests.support import nginx
from tests.support.deploy import DEPLOY, parsed, words_of_the_composition, words_of_the_unit
from tests.support.live_server import config_for, save_models, serving
from tests.support.postgres import PROGRAMS, Server
from tests.support.served import served_base

PASSWORD = "only in a file"


@dataclass(frozen=True)
class Service:
    """Two servers on one PostgreSQL behind nginx.

    Attributes:
        url: of nginx; direct: of the two servers.
        database: URL, without the password, which is in the file `password`.
        folder: holds base/, adapters, registry/ and the servers' audits.
    """

    url: str
    direct: list[str]
    key: str
    database: str
    password: Path
    folder: Path

    def client(self, key: str | None = None) -> httpx2.Client:
        return client_with(key or self.key)


def client_with(key: str) -> httpx2.Client:
    return httpx2.Client(verify=False, timeout=60, headers={"Authorization": f"Bearer {key}"})


def placed(words: Sequence[str], folder: Path, audit: str, database: str) -> ServeConfig:
    """A command of deploy/, with places and a port that a test may use."""
    places = {"/models/base": folder / "base", "/state/registry": folder / "registry", "/state/audit": folder / audit}
    places |= {"registry": folder / "registry", "audit-%i": folder / audit}
    here = [str(places.get(word, database if "postgresql:" in word else word)) for word in words]
    config = parsed([here[0], str(folder / "base"), *here[2:]])
    return dataclasses.replace(config, host="127.0.0.1", port=0, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and adapters."""
    return save_models(tmp_path_factory.mktemp("deployed"))


@pytest.fixture(scope="module")
def service(folder: Path, postgres: Server) -> Iterator[Service]:
    """The words of the systemd unit and of the composition, with other places, behind the proxy of both."""
    if nginx.PROGRAM is None:
        pytest.skip("no nginx on this machine")
    password, database = folder / "database-password", postgres.guarded(PASSWORD)
    password.write_text(f"{PASSWORD}\n")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv(PASSWORD_FILE, str(password))
        with closing(Registry(folder / "registry", database)) as registry:
            registry.add("support", folder / "support")
            registry.add("support", folder / "more")
            registry.promote("support@1")
        with closing(Keys(folder / "registry", database)) as keys:
            key = keys.create("all", SCOPES)[1]
        configs = (
            placed(words_of_the_unit(), folder, "audit-1", database),
            placed(words_of_the_composition(), folder, "audit-2", database),
        )
        servers = [stack.enter_context(serving(config, folder)) for config in configs]
        url = stack.enter_context(nginx.proxy(folder / "nginx", [server.port for server in servers]))
        yield Service(url, [server.root for server in servers], key, database, password, folder)


def ask(client: httpx2.Client, url: str, **options: Any) -> Any:
    body = {"model": "support", "prompt": "a", "max_tokens": 8, "seed": 1, **options}
    answer = client.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_answers_through_the_proxy(service: Service) -> None:
    with service.client() as client:
        assert ask(client, service.url)["choices"] == ask(client, service.direct[0])["choices"]
        assert client.get(f"{service.url}/health").status_code == 200
    with service.client("irl-wrong") as client:
        refused = client.get(f"{service.url}/v1/models")
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def test_streams_come_through_as_they_are_written(service: Service) -> None:
    body = {"model": "support", "prompt": "a", "max_tokens": 200, "seed": 3, "stream": True}
    with service.client() as client, client.stream("POST", f"{service.url}/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        parts = list(answer.iter_raw())
    events = b"".join(parts).count(b"data: ")
    assert events > 100
    assert len(parts) > events / 10, "not held back until there is much"


def test_whoever_leaves_frees_a_slot_behind_the_proxy(service: Service) -> None:
    body = {"model": "support", "prompt": "a", "max_tokens": 450, "seed": 3, "stream": True}
    with service.client() as client:
        with client.stream("POST", f"{service.url}/v1/completions", json=body) as answer:
            next(answer.iter_raw())
        began = time.monotonic()
        while sum(running(client, url) for url in service.direct):
            assert time.monotonic() - began < 120
            time.sleep(0.02)


def running(client: httpx2.Client, url: str) -> float:
    [found] = re.findall(r"^internalrl_slots_running (.*)$", client.get(f"{url}/metrics").text, re.MULTILINE)
    return float(found)


def test_many_clients_at_once_behind_one_proxy(service: Service) -> None:
    with service.client() as client, ThreadPoolExecutor(32) as pool:
        seeds = [seed % 4 for seed in range(64)]
        answers = list(pool.map(lambda seed: ask(client, service.url, seed=seed)["choices"], seeds))
        expected = [ask(client, service.direct[0], seed=seed)["choices"] for seed in range(4)]
    assert answers == [expected[seed] for seed in seeds]


def test_a_body_that_is_too_large_is_refused_in_the_servers_words(service: Service) -> None:
    with service.client() as client:
        refused = client.post(f"{service.url}/v1/completions", content=b"x" * (2**20 + 1))
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")


def test_servers_share_what_is_live_keys_feedback_and_audit(service: Service) -> None:
    first, second = service.direct
    with service.client() as client:
        answer = ask(client, first)
        said = client.post(f"{second}/v1/feedback", json={"request_id": answer["id"], "thumbs": "up"})
        assert said.json() == {"object": "feedback", "request_id": answer["id"], "version": "support@1"}
        until(lambda: client.get(f"{second}/audit/{answer['id']}").status_code == 200)
        assert client.post(f"{first}/v1/admin/adapters/support/promote", json={"version": 2}).status_code == 200
        until(lambda: ask(client, second)["system_fingerprint"] == "support@2")
        assert client.post(f"{second}/v1/admin/adapters/support/rollback").status_code == 200
        until(lambda: ask(client, first)["system_fingerprint"] == "support@1")
    with closing(Keys(service.folder / "registry", service.database)) as keys:
        key = keys.create("late", SCOPES)[1]
    with service.client(key) as client:
        for url in service.direct:
            until(lambda url=url: client.get(f"{url}/v1/models").status_code == 200)  # type: ignore[misc]


def until(condition: Any) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 120
        time.sleep(0.05)


# ------------------------------------------------------------------------------------ the page


def run_block(section: str, number: int, **variables: object) -> None:
    """Run a block of commands of docs/deploy.md, in the order of those in its section."""
    text = (DEPLOY.parent / "docs" / "deploy.md").read_text(encoding="utf-8")
    body = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    block = re.findall(r"^```bash\n(.*?)^```", body, re.MULTILINE | re.DOTALL)[number]
    assert PROGRAMS
    path = f"{Path(sys.executable).parent}:{PROGRAMS}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PGPASSWORD": PASSWORD, **{k: str(v) for k, v in variables.items()}}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def known(registry: Path, audit: Path, database: str | None) -> list[object]:
    """All that registry and audit tell, and that the adapters can be loaded."""
    base = served_base()
    with closing(Registry(registry, database)) as opened:
        found: list[object] = [[replaced(v) for v in opened.versions()], opened.compare("support")]
        found += [{k: [a.version.key for a in v] for k, v in opened.routing(base_fingerprint(base)).arms.items()}]
        for version in opened.versions():
            opened.load(base, version)
    with closing(Keys(registry, database)) as keys:
        found.append(keys.list())
    with closing(AuditStore(audit, database)) as store:
        for lines in Journal(audit / "journal").take():  # of servers that are no more
            store.insert(lines)
        found.append(store.find(Query(limit=1000)))
    return found


def replaced(version: Any) -> object:
    return version.key, version.content_hash, version.metrics


def test_backup_and_restore_of_postgresql_while_servers_run(
    service: Service, postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD_FILE, str(service.password))
    registry, audit = service.folder / "registry", service.folder / "audit-1"
    with service.client() as client:
        ask(client, service.direct[0])  # segments of it may be in the journal, in the database, or in both
    backup, new = tmp_path / "backup", postgres.database()
    backup.mkdir()
    run_block("Backup", 0, REGISTRY=registry, AUDIT=audit, BACKUP=backup, DATABASE=service.database)
    places = {"REGISTRY": tmp_path / "registry", "AUDIT": tmp_path / "audit"}
    run_block("Restore", 0, BACKUP=backup, DATABASE=new, **places)
    restored = known(places["REGISTRY"], places["AUDIT"], new)
    assert restored[-1]
    until(lambda: known(registry, audit, service.database) == restored)  # the servers move their journals, too


def test_backup_restore_and_migration_of_sqlite(folder: Path, postgres: Server, tmp_path: Path) -> None:
    registry, audit, backup = tmp_path / "old", tmp_path / "old-audit", tmp_path / "backup"
    backup.mkdir()
    with closing(Keys(registry)) as keys:
        key = keys.create("all", SCOPES)[1]
    options: dict[str, Any] = {"registry": registry, "audit": AuditOptions(folder=audit)}
    config = config_for(folder, adapter=(f"support={folder / 'support'}",), **options)
    with serving(config, folder) as alone, client_with(key) as client:
        ask(client, alone.root)
        run_block("Backup", 1, REGISTRY=registry, AUDIT=audit, BACKUP=backup)
    before = known(registry, audit, None)
    assert before[-1]
    places = {"REGISTRY": tmp_path / "registry", "AUDIT": tmp_path / "audit"}
    run_block("Restore", 1, BACKUP=backup, **places)
    assert known(places["REGISTRY"], places["AUDIT"], None) == before
    new = postgres.database()
    run_block("Migration", 0, DATABASE=new, **places)
    assert known(places["REGISTRY"], places["AUDIT"], new) == before
