"""The audit's database: a row per segment, which can be asked for by request, adapter, strategy, violation and time."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from internalrl.extras import extra
from internalrl.serving.database import Database
from internalrl.settings.ranges import Checked, Range

with extra("serve"):
    from sqlalchemy import (
        BigInteger,
        Column,
        ColumnElement,
        Double,
        Index,
        Integer,
        MetaData,
        Table,
        Text,
        delete,
        func,
        select,
    )
    from sqlalchemy.dialects import postgresql

_log = logging.getLogger(__name__)

_schema = MetaData()
_segments = Table(
    "audit_segments",
    _schema,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("request", Text, nullable=False),
    Column("index", Integer, nullable=False),
    Column("adapter", Text, nullable=False),
    Column("start", Integer, nullable=False),
    Column("stop", Integer, nullable=False),
    Column("code", Text, nullable=False),  # a list in JSON
    Column("switch_probability", Double),
    Column("log_probability", Double),
    Column("strategy", Text),
    Column("violation", Text),
    Column("text", Text),
    Column("time", Double, nullable=False, index=True),
    Index("audit_segments_key", "request", "index", unique=True),
)
_COLUMNS = [column.name for column in _segments.columns if column.name != "id"]
Row = tuple[str | int | float | None, ...]
"""Values of all columns but the id, in their order."""
_WINDOW = 20_000
"""The newest segments among which `requests` looks for answers."""


@dataclass(frozen=True)
class Segment:
    """A row: a segment of an answer, as in `requests.SegmentRecord`.

    `adapter` is the key of its version, `time` when the segment ended, in seconds since 1970. `text` is None where
    texts are not kept; numbers that were not finite are None.
    """

    request: str
    index: int
    adapter: str
    start: int
    stop: int
    code: tuple[float | None, ...]
    switch_probability: float | None
    log_probability: float | None
    strategy: str | None
    violation: str | None
    text: str | None
    time: float


@dataclass(frozen=True)
class Query(Checked):
    """Which segments to find: those that every option agrees with."""

    request: str | None = None
    """Id of the request."""
    adapter: str | None = None
    """Version of an adapter, such as support@3, or all of a name, such as support."""
    strategy: str | None = None
    """Nearest named strategy."""
    violation: str | None = None
    """Text that the violation contains; an empty one finds every violation."""
    since: float | None = None
    """Not before this time, in seconds since 1970."""
    until: float | None = None
    """Before this time, in seconds since 1970."""
    limit: Annotated[int, Range(1, 100_000)] = 50
    """Most segments, the newest ones."""

    def conditions(self) -> list[ColumnElement[bool]]:
        """The query in SQL."""
        c, found = _segments.c, []
        if self.request is not None:
            found.append(c.request == self.request)
        if self.adapter is not None:
            either = c.adapter.startswith(f"{self.adapter}@", autoescape=True)
            found.append((c.adapter == self.adapter) | either)
        if self.strategy is not None:
            found.append(c.strategy == self.strategy)
        if self.violation is not None:
            found.append(c.violation.is_not(None) & c.violation.icontains(self.violation, autoescape=True))
        if self.since is not None:
            found.append(c.time >= self.since)
        if self.until is not None:
            found.append(c.time < self.until)
        return found


class AuditStore:
    """Segments in SQLite in `folder`, or in the database at `url`; all methods raise InternalRLError when it fails."""

    def __init__(self, folder: Path, url: str | None = None):
        self._database = Database(url, folder / "audit.db", _schema)
        # The database takes the JSON apart itself: inserting row by row, this thread would contend with the engine's.
        columns = ", ".join(f'"{name}"' for name in _COLUMNS)
        if self._database.postgres:
            types = [_segments.c[name].type.compile(postgresql.dialect()) for name in _COLUMNS]
            values = [f"(segment.value->>{k})::{kind}" for k, kind in enumerate(types)]
            source = "json_array_elements(%s::json) AS line, json_array_elements(line.value) AS segment"
        else:
            values = [f"json_extract(segment.value, '$[{k}]')" for k in range(len(_COLUMNS))]
            source = "json_each(?) AS line, json_each(line.value) AS segment"
        self._insert = (
            f"INSERT INTO {_segments.name} ({columns}) SELECT {', '.join(values)} FROM {source} WHERE true "
            'ON CONFLICT ("request", "index") DO NOTHING'
        )

    def insert(self, lines: bytes) -> int:
        """Store the rows in lines that `to_line` made, unless they are known; returns how many rows there were."""
        whole, count = [], 0
        for line in lines.splitlines():
            try:
                text = line.decode("ascii")
                found = json.loads(text, parse_constant=_refused)
            except ValueError:
                found = None
            if isinstance(found, list) and all(isinstance(row, list) and len(row) == len(_COLUMNS) for row in found):
                whole.append(text)
                count += len(found)
            else:  # a power failure may leave anything
                _log.warning("the audit's journal held a line that is no list of segments; it was left out")
        if count:
            with self._database.writing() as connection:
                connection.exec_driver_sql(self._insert, (f"[{','.join(whole)}]",))
        return count

    def find(self, query: Query) -> list[Segment]:
        """The newest segments that fit; those of one request in their order."""
        order = [_segments.c.index] if query.request is not None else [_segments.c.id.desc()]
        statement = select(_segments).where(*query.conditions()).order_by(*order).limit(query.limit)
        with self._database.reading() as connection:
            return [_segment(row._mapping) for row in connection.execute(statement)]

    def requests(self, query: Query) -> list[list[Segment]]:
        """The newest answers, at most `query.limit`, with a segment that fits: all their segments in order."""
        newest = select(_segments.c.request, _segments.c.id).where(*query.conditions())
        window = newest.order_by(_segments.c.id.desc()).limit(_WINDOW).subquery()
        last = func.max(window.c.id)
        ids = select(window.c.request).group_by(window.c.request).order_by(last.desc()).limit(query.limit)
        with self._database.reading() as connection:
            answers: dict[str, list[Segment]] = {request: [] for request in connection.scalars(ids)}
            statement = select(_segments).where(_segments.c.request.in_(answers)).order_by(_segments.c.index)
            for row in connection.execute(statement):
                answers[row.request].append(_segment(row._mapping))
        return list(answers.values())

    def prune(self, days: float | None, most: int | None) -> None:
        """Delete segments older than `days`, and all but the newest `most`."""
        with self._database.writing() as connection:
            if days is not None:
                connection.execute(delete(_segments).where(_segments.c.time < time.time() - days * 86_400))
            if most is not None:
                beyond = select(_segments.c.id).order_by(_segments.c.id.desc()).offset(most).limit(1).scalar_subquery()
                connection.execute(delete(_segments).where(_segments.c.id <= beyond))

    def close(self) -> None:
        """Close the database's connections."""
        self._database.close()


def to_line(rows: Sequence[Row]) -> bytes:
    """Rows as a line of the journal."""
    return json.dumps(rows).encode() + b"\n"


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _segment(row: Any) -> Segment:
    values = {name: row[name] for name in _COLUMNS}
    return Segment(**{**values, "code": tuple(json.loads(values["code"]))})
