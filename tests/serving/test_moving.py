"""From SQLite files to PostgreSQL: everything is there, and goes on from where it was."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from internalrl import cli
from internalrl.base.fingerprint import base_fingerprint
from internalrl.serving.api.security import Keys
from internalrl.serving.audit.audit import Audit
from internalrl.serving.audit.store import AuditStore, Query
from internalrl.serving.registry.registry import Registry
from tests.support.auditing import answer
from tests.support.postgres import Server
from tests.support.served import save_adapter, served_base


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A registry with three versions, a split, feedback and keys, and an audit, part of which is in its journal."""
    base = served_base()
    with closing(Registry(tmp_path / "registry")) as registry:
        for seed in range(3):
            registry.add("support", save_adapter(base, tmp_path / str(seed), seed), {"success": seed / 4})
        registry.promote("support@1")
        registry.split("support", {1: 1, 2: 3})
        registry.answered({f"r{i}": f"support@{1 + i % 2}" for i in range(2500)})
        registry.feedback("r1", thumbs="up")
        registry.remove("support@3")
    with closing(Keys(tmp_path / "registry")) as keys:
        keys.create("desk", ["generate"], 60, None)
        keys.revoke(keys.create("gone")[0].id)
    with closing(Audit(tmp_path / "audit")) as audit:
        answer(audit, "r1", ["one ", "two\n\0"])
        [file] = (tmp_path / "audit" / "journal").glob("*.jsonl")
        left = file.read_bytes().replace(b'"r1"', b'"left"')
    (tmp_path / "audit" / "journal" / "1-1.jsonl").write_bytes(left)
    return tmp_path


def move(folder: Path, url: str, *words: str) -> int:
    where = ["--registry", str(folder / "registry"), "--audit", str(folder / "audit"), "--database", url]
    return cli.main(["adapters", "move", *where, "--json"])


def test_all_is_moved_and_goes_on(folder: Path, postgres: Server, capsys: pytest.CaptureFixture[str]) -> None:
    url, base = postgres.database(), base_fingerprint(served_base())
    assert move(folder, url) == 0
    copied = json.loads(capsys.readouterr().out)["copied"]
    assert (copied["registry_versions"], copied["registry_answers"], copied["audit_segments"]) == (3, 2500, 4)
    with closing(Registry(folder / "registry")) as before, closing(Registry(folder / "registry", url)) as after:
        assert after.versions() == before.versions()
        assert after.routing(base) == before.routing(base)
        assert after.compare("support") == before.compare("support")
        assert after.rollback("support")[0].version.key == "support@1"
        after.promote("support@2")  # the database's own numbers go on
        assert after.add("support", folder / "2").key == "support@4"
    with closing(Keys(folder / "registry")) as keys, closing(Keys(folder / "registry", url)) as moved:
        assert moved.list() == keys.list()
        moved.create("new")
    with closing(AuditStore(folder / "audit")) as store, closing(AuditStore(folder / "audit", url)) as moved_store:
        found = store.find(Query(limit=100))
        assert len(found) == 4
        assert moved_store.find(Query(limit=100)) == found
    with closing(Audit(folder / "audit", url)) as audit:
        answer(audit, "new", ["three"])
        audit.wait("new")
    with closing(AuditStore(folder / "audit", url)) as moved_store:
        assert len(moved_store.find(Query(limit=100))) == 5


def test_what_is_there_already_is_not_mixed(folder: Path, postgres: Server, capsys: pytest.CaptureFixture[str]) -> None:
    url = postgres.database()
    assert move(folder, url) == 0
    capsys.readouterr()
    assert move(folder, url) == 2
    assert "already; give an empty database" in capsys.readouterr().err
    assert cli.main(["adapters", "move", "--registry", str(folder / "registry")]) == 2
    assert "Say where to with --database" in capsys.readouterr().err
