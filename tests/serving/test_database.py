"""Databases: where the password comes from, and tables of an earlier version."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, Text, insert, select

from internalrl.errors import InternalRLError
from internalrl.serving.database import PASSWORD_FILE, Database
from internalrl.serving.registry.registry import Registry
from tests.support.postgres import Server

PASSWORD = "it's geheim: 5%/@"


@pytest.fixture(scope="module")
def guarded(postgres: Server) -> str:
    """URL of a database that asks for `PASSWORD`."""
    return postgres.guarded(PASSWORD.replace("'", "''"))


@pytest.fixture(autouse=True)
def no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGPASSWORD", "PGPASSFILE", PASSWORD_FILE):
        monkeypatch.delenv(name, raising=False)


def is_open(url: str, folder: Path) -> bool:
    with closing(Registry(folder, url)) as registry:
        return registry.revision() >= 0


@pytest.mark.parametrize("ending", ["", "\n", "\r\n", "\nmore"])
def test_a_password_in_a_file(guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    (tmp_path / "password").write_bytes(f"{PASSWORD}{ending}".encode())
    monkeypatch.setenv(PASSWORD_FILE, str(tmp_path / "password"))
    assert is_open(guarded, tmp_path)


def test_a_password_in_the_environment(guarded: str, tmp_path: Path) -> None:
    """libpq reads it when a process begins."""
    command = [
        sys.executable,
        "-m",
        "internalrl.cli",
        "keys",
        "list",
        "--registry",
        str(tmp_path),
        "--database",
        guarded,
    ]
    done = subprocess.run(command, env={**os.environ, "PGPASSWORD": PASSWORD}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_password_of_the_url_goes_first(guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "password").write_text(PASSWORD)
    monkeypatch.setenv(PASSWORD_FILE, str(tmp_path / "password"))
    with pytest.raises(InternalRLError, match="password authentication failed"):
        is_open(guarded.replace("@", ":another@"), tmp_path)


def test_a_missing_or_wrong_password(guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InternalRLError, match="no password supplied"):
        is_open(guarded, tmp_path)
    (tmp_path / "password").write_text("wrong-one")
    monkeypatch.setenv(PASSWORD_FILE, str(tmp_path / "password"))
    with pytest.raises(InternalRLError, match="password authentication failed") as told:
        is_open(guarded, tmp_path)
    assert "wrong-one" not in str(told.value)
    for file in (tmp_path, tmp_path / "nowhere", Path("/dev/zero")):
        monkeypatch.setenv(PASSWORD_FILE, str(file))
        with pytest.raises(InternalRLError, match=f"{PASSWORD_FILE} names, cannot be read"):
            is_open(guarded, tmp_path)


def test_tables_of_an_earlier_version(database: str | None, tmp_path: Path) -> None:
    """What they lack is added, once, and what is there stays."""
    earlier, later = MetaData(), MetaData()
    old = Table("things", earlier, Column("id", Integer, primary_key=True), Column("name", Text, nullable=False))
    new = Table(
        "things",
        later,
        Column("id", Integer, primary_key=True),
        Column("name", Text, nullable=False),
        Column("order", Text),  # a word of SQL
        Column("count", Integer),
    )
    with closing(Database(database, tmp_path / "a.db", earlier)) as opened, opened.writing() as connection:
        connection.execute(insert(old).values(id=1, name="first"))
    for _ in range(2):
        with closing(Database(database, tmp_path / "a.db", later)) as opened, opened.writing() as connection:
            rows = connection.execute(select(new).where(new.c.id == 1)).all()
            assert [tuple(row) for row in rows] == [(1, "first", None, None)]
    with closing(Database(database, tmp_path / "a.db", later)) as opened, opened.writing() as connection:
        connection.execute(insert(new).values(id=2, name="second", order="x", count=3))
    with closing(Database(database, tmp_path / "a.db", earlier)) as opened, opened.writing() as connection:
        connection.execute(insert(old).values(id=3, name="by the earlier version"))
