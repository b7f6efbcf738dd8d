"""The registry: versions of adapters, which of them are live, and how they do.

    registry = Registry("runs/registry")                        # SQLite there; or url="postgresql://…"
    version = registry.add("support", "runs/support/adapter")   # copied, checked, never changed
    registry.promote("support@3")                               # live; `rollback` returns to the one before
    registry.split("support", {3: 90, 4: 10})                   # A/B

A version belongs to the base with its fingerprint, and what is live is decided for each base by itself: a server asks
for the `Routing` of its own. It polls `revision()`, loads what a new `routing()` asks for, exchanges the two, and
only then drops what it no longer needs, so that no request meets a version that is not there.

Every change is one transaction that begins by raising the revision, which also lets one writer in at a time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from internalrl.base.fingerprint import HALF, same_base
from internalrl.errors import InternalRLError
from internalrl.extras import extra
from internalrl.serving.database import Database
from internalrl.serving.registry.adapter_files import AdapterFiles
from internalrl.serving.registry.versions import NAME, Arm, Routing, Version, parse_key

with extra("serve"):
    from sqlalchemy import (
        JSON,
        Column,
        ColumnElement,
        Connection,
        Double,
        Integer,
        MetaData,
        Row,
        String,
        Table,
        Text,
        delete,
        func,
        insert,
        or_,
        select,
        update,
    )

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from internalrl.controller.adapter import Adapter
    from internalrl.serving.registry.outcomes import Comparison

FORGET_AFTER = 30 * 86_400
"""Seconds until an answer without feedback is forgotten."""

_schema = MetaData()
_revision = Table("registry_revision", _schema, Column("number", Integer, nullable=False))
_versions = Table(
    "registry_versions",
    _schema,
    Column("name", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("content_hash", String(64), nullable=False),
    Column("base_fingerprint", String(64), nullable=False),
    Column("provenance", JSON, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("added", Double, nullable=False),
    Column("removed", Double),  # a number is never used again: the audit names versions by it
)
_deployments = Table(
    "registry_deployments",
    _schema,
    Column("id", Integer, primary_key=True),
    Column("name", String(64), nullable=False),
    Column("base_fingerprint", String(64), nullable=False),
    Column("arms", JSON, nullable=False),  # [[number, share], ...]
    Column("since", Double, nullable=False),
    Column("undone", Double),
)
_answers = Table(
    "registry_answers",
    _schema,
    Column("request", Text, primary_key=True),
    Column("name", String(64), nullable=False, index=True),
    Column("number", Integer, nullable=False),
    Column("time", Double, nullable=False),
    Column("reward", Double),
)


_present = _versions.c.removed.is_(None)
_standing = _deployments.c.undone.is_(None)


def _on_base(fingerprint: str) -> ColumnElement[bool]:
    """`same_base`, in the database."""
    own = _deployments.c.base_fingerprint
    first, last = func.substr(own, 1, HALF), func.substr(own, HALF + 1)
    return or_(first == fingerprint[:HALF], last == fingerprint[HALF:])


class Registry:
    """Versions of adapters in `folder`, and a database about them: SQLite there, or the one at `url`.

    Threads and processes may use one registry together. All methods raise InternalRLError for what cannot be done.
    """

    def __init__(self, folder: str | Path, url: str | None = None):
        folder = Path(folder).absolute()
        self._files = AdapterFiles(folder / "adapters")
        self._database = Database(url, folder / "registry.db", _schema)
        with self._database.writing() as connection:
            if connection.scalar(select(_revision.c.number)) is None:
                connection.execute(insert(_revision).values(number=0))
            old = _answers.c.time < time.time() - FORGET_AFTER
            connection.execute(delete(_answers).where(old, _answers.c.reward.is_(None)))

    def add(self, name: str, source: str | Path, metrics: Mapping[str, Any] | None = None) -> Version:
        """Copy the adapter in the folder `source`, after checking it, as the next version of `name`.

        It is not live before it is promoted. What is there already is not added again: its version is returned.
        """
        if not NAME.fullmatch(name):
            raise InternalRLError(
                f"{name[:80]!r} is no name for an adapter; use up to 64 small letters, digits, '.', '_' and '-', "
                "and begin with a letter or digit."
            )
        try:
            metrics = json.loads(json.dumps(metrics or {}, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise InternalRLError(f"Metrics must be JSON with finite numbers ({error}).") from error
        with self._files.copied(Path(source)) as copied, self._change() as connection:
            mine = _versions.c.name == name
            same = select(_versions).where(mine, _versions.c.content_hash == copied.content_hash, _present)
            row = connection.execute(same).first()
            if row is None:
                number = (connection.scalar(select(func.max(_versions.c.number)).where(mine)) or 0) + 1
                connection.execute(
                    insert(_versions).values(
                        name=name,
                        number=number,
                        content_hash=copied.content_hash,
                        base_fingerprint=copied.config.base_fingerprint,
                        provenance=copied.config.provenance,
                        metrics=metrics,
                        added=time.time(),
                    )
                )
                row = connection.execute(same).one()
            self._files.put(copied)
        return self._to_version(row)

    def versions(self, name: str | None = None) -> list[Version]:
        """All versions, or those of one name, by name and number."""
        query = select(_versions).where(_present).order_by(_versions.c.name, _versions.c.number)
        with self._database.reading() as connection:
            rows = connection.execute(query if name is None else query.where(_versions.c.name == name)).all()
        return [self._to_version(row) for row in rows]

    def version(self, key: str) -> Version:
        """The version "name@number"."""
        with self._database.reading() as connection:
            return self._find(connection, *parse_key(key))

    def load(self, base: PreTrainedModel, version: Version) -> Adapter:
        """The adapter, for `base`, after checking that its files are those that were added."""
        return self._files.load(base, version.content_hash)

    def revision(self) -> int:
        """A number that every change of `versions` or `routing` raises; one small query."""
        with self._database.reading() as connection:
            return connection.scalar(select(_revision.c.number)) or 0

    def routing(self, base_fingerprint: str) -> Routing:
        """What is live on that base."""
        with self._database.reading() as connection:
            revision = connection.scalar(select(_revision.c.number)) or 0
            mine = _on_base(base_fingerprint)
            latest = select(func.max(_deployments.c.id)).where(mine, _standing).group_by(_deployments.c.name)
            arms, failed = {}, {}
            for row in connection.execute(select(_deployments).where(_deployments.c.id.in_(latest))).all():
                try:
                    arms[row.name] = self._arms(connection, row)
                except InternalRLError as error:  # of this name alone
                    failed[row.name] = str(error)
            return Routing(revision, arms, failed)

    def live(self, name: str) -> dict[str, tuple[Arm, ...]]:
        """What is live under a name: base fingerprint -> arms."""
        with self._database.reading() as connection:
            bases = select(_deployments.c.base_fingerprint).where(_deployments.c.name == name, _standing).distinct()
            rows = [self._current(connection, name, base) for base in connection.scalars(bases)]
            return {row.base_fingerprint: self._arms(connection, row) for row in rows if row}

    def promote(self, key: str) -> Version:
        """Let the version answer all requests for its name; a split ends."""
        name, number = parse_key(key)
        return self.split(name, {number: 1})[0].version

    def rollback(self, name: str) -> tuple[Arm, ...]:
        """Undo the last `promote` or `split` of `name`: what was live before is live again, and is returned."""
        with self._change() as connection:
            current = connection.execute(
                select(_deployments).where(_deployments.c.name == name, _standing).order_by(_deployments.c.id.desc())
            ).first()
            if current is None:
                raise InternalRLError(f"No version of {name!r} is live; there is nothing to roll back.")
            while True:  # past what holds a version that was removed
                undo = update(_deployments).where(_deployments.c.id == current.id)
                connection.execute(undo.values(undone=time.time()))
                current = self._current(connection, name, current.base_fingerprint)
                if current is None:
                    raise InternalRLError(f"Nothing was live before under {name!r}; promote another version instead.")
                numbers = {number for number, _ in current.arms}
                if numbers <= set(
                    connection.scalars(select(_versions.c.number).where(_versions.c.name == name, _present))
                ):
                    return self._arms(connection, current)

    def split(self, name: str, weights: Mapping[int, float]) -> tuple[Arm, ...]:
        """Divide the requests for `name` among versions: number -> weight, in any unit."""
        total = math.fsum(weights.values())
        if not weights or not all(weight > 0 for weight in weights.values()) or not math.isfinite(total):
            raise InternalRLError("Give every version of a split a weight above 0, such as 1=90 2=10.")
        with self._change() as connection:
            versions = [self._find(connection, name, number) for number in weights]
            base, arms = versions[0].base_fingerprint, [[number, weight / total] for number, weight in weights.items()]
            if not all(same_base(base, version.base_fingerprint) for version in versions):
                raise InternalRLError(f"These versions of {name!r} belong to several bases; split those of one.")
            current = self._current(connection, name, base)
            if current is None or current.arms != arms:  # or a rollback would lead from the same to the same
                values = {"name": name, "base_fingerprint": base, "arms": arms, "since": time.time()}
                connection.execute(insert(_deployments).values(**values))
                current = self._current(connection, name, base)
            assert current is not None
            return self._arms(connection, current)

    def remove(self, key: str) -> Version:
        """Forget a version and delete its files; one that is live is refused."""
        with self._change() as connection:
            version = self._find(connection, *parse_key(key))
            current = self._current(connection, version.name, version.base_fingerprint)
            if current and version.number in (number for number, _ in current.arms):
                raise InternalRLError(f"{key} is live; promote another version of it first.")
            this = (_versions.c.name == version.name, _versions.c.number == version.number)
            connection.execute(update(_versions).where(*this).values(removed=time.time()))
            others = select(func.count()).where(_versions.c.content_hash == version.content_hash, _present)
            if not connection.scalar(others):
                self._files.delete(version.content_hash)
        return version

    def answered(self, versions: Mapping[str, str]) -> None:
        """Remember which version answered which requests, id -> key, so that feedback can name a request alone.

        A write to the database, about a millisecond: call it beside the event loop, not on it.
        """
        rows = []
        for request_id, version_key in versions.items():
            name, number = parse_key(version_key)
            rows.append({"request": request_id, "name": name, "number": number, "time": time.time()})
        with self._database.writing() as connection:
            connection.execute(insert(_answers), rows)

    def feedback(
        self, request_id: str, *, reward: float | None = None, thumbs: Literal["up", "down"] | None = None
    ) -> str:
        """Store how good an answer was, in one of the two ways; a later word replaces an earlier one.

        Thumbs count as a reward of 1 or 0. Returns the key of the version that answered.
        """
        if (reward is None) == (thumbs is None):
            raise InternalRLError("Give either a reward or thumbs.")
        if reward is not None and not math.isfinite(reward):
            raise InternalRLError(f"The reward is {reward}; give a finite number.")
        if thumbs not in (None, "up", "down"):
            raise InternalRLError(f"Thumbs are 'up' or 'down', not {thumbs!r}.")
        value = float(thumbs == "up") if reward is None else float(reward)
        this = _answers.c.request == request_id
        with self._database.writing() as connection:
            if not connection.execute(update(_answers).where(this).values(reward=value)).rowcount:
                raise InternalRLError(f"No answer of an adapter has the id {request_id[:80]!r}.")
            row = connection.execute(select(_answers).where(this)).one()
        return f"{row.name}@{row.number}"

    def compare(self, name: str) -> Comparison:
        """How the versions of `name` do by their feedback; during a split, by that on answers since it began."""
        from internalrl.serving.registry.outcomes import compare

        last = select(_deployments).where(_deployments.c.name == name, _standing).order_by(_deployments.c.id.desc())
        rewards = select(_answers.c.number, _answers.c.reward).where(
            _answers.c.name == name, _answers.c.reward.is_not(None)
        )
        since = None
        with self._database.reading() as connection:
            if connection.scalar(select(func.count()).where(_versions.c.name == name)) == 0:
                raise InternalRLError(f"There is no adapter {name!r} in the registry; `adapters list` shows them.")
            current = connection.execute(last).first()
            arms: dict[int, list[float]] = {}
            if current and len(current.arms) > 1:
                since = current.since
                arms = {number: [] for number, _ in current.arms}
                rewards = rewards.where(_answers.c.time >= since, _answers.c.number.in_(arms))
            for number, reward in connection.execute(rewards.order_by(_answers.c.number)):
                arms.setdefault(number, []).append(reward)
        return compare({f"{name}@{number}": values for number, values in arms.items()}, since)

    def close(self) -> None:
        """Close the database's connections."""
        self._database.close()

    @contextmanager
    def _change(self) -> Iterator[Connection]:
        """A transaction that raises the revision, and thereby holds the only lock there is until it ends."""
        with self._database.writing() as connection:
            connection.execute(update(_revision).values(number=_revision.c.number + 1))
            yield connection

    def _find(self, connection: Connection, name: str, number: int) -> Version:
        this = (_versions.c.name == name, _versions.c.number == number, _present)
        row = connection.execute(select(_versions).where(*this)).first()
        if row is None:
            known = connection.scalars(select(_versions.c.number).where(_versions.c.name == name, _present))
            keys = ", ".join(f"{name}@{found}" for found in sorted(known)) or "no version of that name"
            raise InternalRLError(f"{name}@{number} is not in the registry; there is {keys}.")
        return self._to_version(row)

    def _current(self, connection: Connection, name: str, base: str) -> Row[Any] | None:
        mine = (_deployments.c.name == name, _on_base(base), _standing)
        return connection.execute(select(_deployments).where(*mine).order_by(_deployments.c.id.desc())).first()

    def _arms(self, connection: Connection, deployment: Row[Any]) -> tuple[Arm, ...]:
        return tuple(Arm(self._find(connection, deployment.name, number), share) for number, share in deployment.arms)

    def _to_version(self, row: Row[Any]) -> Version:
        return Version(
            row.name,
            row.number,
            row.content_hash,
            row.base_fingerprint,
            row.provenance,
            row.metrics,
            row.added,
            self._files.path(row.content_hash),
        )
