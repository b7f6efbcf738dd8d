"""What an operator reads: addresses that can be followed, and what to do when a server's disk is full."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from sqlalchemy import Column, MetaData, Table, Text, insert

from internalrl.errors import InternalRLError
from internalrl.serving.audit.journal import Journal
from internalrl.serving.database import Database
from internalrl.serving.main import url
from internalrl.serving.registry.registry import Registry
from tests.support.served import save_adapter, served_base


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "::", "2001:db8::7", "0.0.0.0"])
def test_addresses_can_be_followed(host: str) -> None:
    parts = urlsplit(url(host, 8000))
    assert (parts.hostname, parts.port) == (host, 8000)


def no_space(*arguments: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def into_the_journal(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "write", no_space)
    Journal(folder).append(b"line\n")


def into_the_registry(folder: Path, patch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(served_base(), folder / "adapter")
    with closing(Registry(folder / "registry")) as registry:
        patch.setattr(os, "fsync", no_space)
        registry.add("support", adapter)


def into_a_database(folder: Path, patch: pytest.MonkeyPatch) -> None:
    schema = MetaData()
    table = Table("table", schema, Column("text", Text))
    with closing(Database(None, folder / "a.db", schema)) as database, database.writing() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 4")  # SQLite says of it what it says of a full disk
        for _ in range(100):
            connection.execute(insert(table).values(text="x" * 1000))


@pytest.mark.parametrize("write", [into_the_journal, into_the_registry, into_a_database])
def test_a_full_disk_while_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, pytest.MonkeyPatch], None]
) -> None:
    with (
        monkeypatch.context() as patch,
        pytest.raises(InternalRLError, match=r"disk is full; free some space\.$") as told,
    ):
        write(tmp_path, patch)
    assert "--resume" not in str(told.value)
