"""A database through SQLAlchemy: SQLite in a file, or PostgreSQL by URL; one sentence for what fails.

The password of PostgreSQL need not stand in the URL, where every user of the machine can read it among the processes:
it can be in a file that the environment variable INTERNALRL_DATABASE_PASSWORD_FILE names, or where psycopg looks for it
by itself, in PGPASSWORD and ~/.pgpass.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internalrl.errors import InternalRLError
from internalrl.extras import extra
from internalrl.run.files import read_file, write_errors

with extra("serve"):
    from sqlalchemy import Connection, Engine, MetaData, create_engine, event, inspect, make_url, text
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

PASSWORD_FILE = "INTERNALRL_DATABASE_PASSWORD_FILE"
"""Environment variable that names a file whose first line is the password."""

_PATIENCE = 30.0
"""Seconds that a writer of SQLite waits for another one."""


class Database:
    """Tables of `schema` at `url`, made where they are missing; without a URL, an SQLite file.

    Threads and processes may share it. Raises InternalRLError, then and later, when it cannot be reached.
    """

    def __init__(self, url: str | None, file: Path, schema: MetaData):
        address = make_url(f"sqlite:///{file}") if url is None else _parse(url)
        self.shown = address.render_as_string(hide_password=True)
        self.postgres = address.get_backend_name() == "postgresql"
        if not self.postgres:
            if address.get_backend_name() != "sqlite" or not address.database or address.database == ":memory:":
                raise InternalRLError(f"{self.shown} is no database for this; give sqlite:///FILE or postgresql://….")
            with write_errors(address.database):
                Path(address.database).parent.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"pool_pre_ping": True, "connect_args": {"connect_timeout": 5}}
        if not self.postgres:
            options = {"connect_args": {"timeout": _PATIENCE, "isolation_level": None}}
        with extra("postgres"):
            engine = create_engine(address, **options)
        self._reader: Engine = engine
        if self.postgres:
            self._reader = engine.execution_options(isolation_level="REPEATABLE READ")
        else:
            event.listen(engine, "connect", _prepare)
            event.listen(engine, "begin", _begin)
        self._writer = engine.execution_options(writes=True)
        with self.writing() as connection:
            if self.postgres:  # two processes that create a table at once would meet an error
                connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('internalrl schema'))"))
            schema.create_all(connection)
            _add_columns(connection, schema)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state throughout."""
        with self._sentences(), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction, committed at the end of the block and undone by an exception; the only writer of SQLite."""
        with self._sentences(), self._writer.begin() as connection:
            yield connection

    def close(self) -> None:
        """Close the connections."""
        self._writer.dispose()

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).strip().split("\n")[0].rstrip(".")
            advice = "free some space" if _is_full(error) else "check that it can be reached"
            raise InternalRLError(f"Database {self.shown} failed: {reason}; {advice}.") from error


def _add_columns(connection: Connection, schema: MetaData) -> None:
    """Add the columns that a table of an earlier version lacks; they hold nothing yet."""
    found = inspect(connection)
    for table in schema.sorted_tables:
        present = {column["name"] for column in found.get_columns(table.name)}
        for column in table.columns:
            if column.name not in present:
                kind = column.type.compile(connection.dialect)
                name = connection.dialect.identifier_preparer.quote(column.name)
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {name} {kind}")


def _parse(url: str) -> Any:
    try:
        address = make_url(url)
        if address.drivername in ("postgres", "postgresql"):
            address = address.set(drivername="postgresql+psycopg")
        with extra("postgres"):
            address.get_dialect()
        if address.get_backend_name() == "postgresql" and address.password is None:
            address = address.set(password=_password())
    except (ArgumentError, SQLAlchemyError) as error:
        raise InternalRLError("That is no database URL; give sqlite:///FILE or postgresql://USER@HOST/NAME.") from error
    return address


def _password() -> str | None:
    """The password in the file that the environment names."""
    file = os.environ.get(PASSWORD_FILE)
    if not file:
        return None
    try:
        return read_file(file, 4096).decode().partition("\n")[0].strip("\r")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InternalRLError(f"{file}, which {PASSWORD_FILE} names, cannot be read ({why}).") from error


def _is_full(error: SQLAlchemyError) -> bool:
    """Whether the database's disk is full: the codes of SQLite and of PostgreSQL."""
    cause = getattr(error, "orig", None)
    return getattr(cause, "sqlite_errorname", None) == "SQLITE_FULL" or getattr(cause, "sqlstate", None) == "53100"


def _prepare(connection: Any, _: Any) -> None:
    """Readers beside a writer. Changing to that mode does not wait for other processes by itself."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA cache_size=-512")  # KiB for each connection; the system caches the file as well


def _begin(connection: Connection) -> None:
    # The driver is told not to begin transactions: it would take the lock late, and fail instead of waiting.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
