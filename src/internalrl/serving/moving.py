"""Moving from SQLite files to PostgreSQL: all that is known of versions, keys, answers and segments."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from internalrl.errors import InternalRLError
from internalrl.extras import extra
from internalrl.serving.database import Database

with extra("serve"):
    from sqlalchemy import Connection, Integer, MetaData, delete, func, insert, select, text

AT_ONCE = 1000
"""Rows that are written together."""


def move(registry: Path, audit: Path | None, url: str) -> dict[str, int]:
    """Copy the SQLite file of a registry, and that of an audit, into the database at `url`; returns rows by table.

    The files stay as they are, and so do the adapters in the registry's folder. InternalRLError where the database
    holds something already, or cannot be reached; nothing is then written.
    """
    from internalrl.serving.api.security import Keys
    from internalrl.serving.audit.journal import Journal
    from internalrl.serving.audit.store import AuditStore
    from internalrl.serving.registry.registry import Registry

    kinds: list[tuple[Any, Path]] = [(Registry, registry), (Keys, registry), *([(AuditStore, audit)] if audit else [])]
    for kind, folder in kinds:
        kind(folder).close()  # opening one makes its tables, of the present version
        kind(folder, url).close()
    if audit:
        with closing(AuditStore(audit)) as store:
            for lines in Journal(audit / "journal").take():  # what a killed server has left
                store.insert(lines)
    files = [registry / "registry.db", *([audit / "audit.db"] if audit else [])]
    copied: dict[str, int] = {}
    with ExitStack() as stack:
        target = stack.enter_context(closing(Database(url, registry, MetaData())))
        connection = stack.enter_context(target.writing())
        for file in files:
            with closing(Database(None, file, MetaData())) as source, source.reading() as rows:
                copied |= _copy(rows, connection, target)
    return copied


def _copy(source: Connection, target: Connection, database: Database) -> dict[str, int]:
    schema = MetaData()
    schema.reflect(source)
    copied = {}
    for table in schema.sorted_tables:
        if table.name == "registry_revision":  # every registry has one
            target.execute(delete(table))
        elif target.scalar(select(func.count()).select_from(table)):
            raise InternalRLError(f"{database.shown} has rows in {table.name} already; give an empty database.")
        copied[table.name] = 0
        for rows in source.execute(select(table)).mappings().partitions(AT_ONCE):
            target.execute(insert(table), [dict(row) for row in rows])
            copied[table.name] += len(rows)
        for column in table.primary_key if database.postgres else ():
            if isinstance(column.type, Integer):  # the next row of the database's own must not meet one of these
                sequence = target.scalar(select(func.pg_get_serial_sequence(table.name, column.name)))
                last = target.scalar(select(func.max(column)))
                if sequence and last:
                    target.execute(text("SELECT setval(:sequence, :last)"), {"sequence": sequence, "last": last})
    return copied
