"""Keys of the API: who may do what, and how much of it.

A key is shown once, when it is made. Stored is a salted hash of its secret part, in the registry's database.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from sqlalchemy import JSON, Column, Float, Integer, LargeBinary, MetaData, String, Table, insert, select, update

from internalrl.errors import InternalRLError
from internalrl.serving.database import Database

Scope = Literal["generate", "feedback", "metrics", "audit", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_PREFIX = "irl"

_schema = MetaData()
_keys = Table(
    "api_keys",
    _schema,
    Column("id", String(16), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("salt", LargeBinary(16), nullable=False),
    Column("hash", LargeBinary(32), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", Integer),
    Column("created", Float, nullable=False),
    Column("revoked", Float),
)


@dataclass(frozen=True)
class Key:
    """A key as it is stored.

    Attributes:
        id: the part of the key that is no secret; name: whom it was made for.
        requests_per_minute, tokens_per_minute: None is no limit. Tokens are those of prompts and answers.
        created, revoked: seconds since 1970.
    """

    id: str
    name: str
    scopes: frozenset[Scope]
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    created: float = 0.0
    revoked: float | None = None


LOCAL = Key("local", "whoever is on this machine", frozenset(SCOPES))
"""Who asks where no key was ever made."""


class Keys:
    """The keys in the registry's database: SQLite in `folder`, or the one at `url`."""

    def __init__(self, folder: str | Path, url: str | None = None):
        self.folder = Path(folder).absolute()
        self._database = Database(url, self.folder / "registry.db", _schema)
        self._known: Mapping[str, tuple[Key, bytes, bytes]] = MappingProxyType({})
        self.refresh()

    def create(
        self,
        name: str,
        scopes: Sequence[Scope] = ("generate", "feedback"),
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> tuple[Key, str]:
        """A new key, and the text that a client sends; it is kept nowhere."""
        if unknown := set(scopes) - set(SCOPES):
            raise InternalRLError(f"{sorted(unknown)[0]!r} is no scope; known are {', '.join(SCOPES)}.")
        id_, secret, salt = secrets.token_hex(6), secrets.token_urlsafe(32), secrets.token_bytes(16)
        key = Key(id_, name, frozenset(scopes), requests_per_minute, tokens_per_minute, time.time())
        with self._database.writing() as connection:
            values = {**vars(key), "scopes": sorted(key.scopes), "salt": salt, "hash": _hash(secret, salt)}
            connection.execute(insert(_keys).values(values))
        return key, f"{_PREFIX}-{id_}-{secret}"

    def list(self) -> list[Key]:
        """All keys, the oldest first, also those that were revoked."""
        self.refresh()
        return sorted((key for key, _, _ in self._known.values()), key=lambda key: key.created)

    def revoke(self, id_: str) -> Key:
        """Refuse the key from now on; a server learns of it within a second."""
        with self._database.writing() as connection:
            change = update(_keys).where(_keys.c.id == id_, _keys.c.revoked.is_(None)).values(revoked=time.time())
            if not connection.execute(change).rowcount:
                raise InternalRLError("No valid key has this id; `internalrl keys list` shows them.")
        self.refresh()
        return self._known[id_][0]

    def refresh(self) -> None:
        """Read the keys from the database; `find` uses what was read last."""
        with self._database.reading() as connection:
            rows = connection.execute(select(_keys)).mappings().all()
        known = {}
        for row in rows:
            values = {name: value for name, value in row.items() if name not in ("salt", "hash", "scopes")}
            known[row["id"]] = Key(scopes=frozenset(row["scopes"]), **values), row["salt"], row["hash"]
        self._known = MappingProxyType(known)

    @property
    def needed(self) -> bool:
        """Whether any key was ever made: from then on every request needs one."""
        return bool(self._known)

    def find(self, text: str) -> Key | None:
        """The valid key that a client sent."""
        prefix, _, rest = text.partition("-")
        id_, _, secret = rest.partition("-")
        key, salt, expected = self._known.get(id_, (None, b"", b""))
        right = hmac.compare_digest(_hash(secret, salt), expected)  # takes as long for an unknown id
        return key if prefix == _PREFIX and key and right and key.revoked is None else None

    def close(self) -> None:
        """Close the database."""
        self._database.close()


def _hash(secret: str, salt: bytes) -> bytes:
    # The secret has 256 random bits: nobody guesses it, and a slow hash would only slow down the server.
    return hashlib.sha256(salt + secret.encode("utf-8", "surrogatepass")).digest()


class Quotas:
    """What is left of each key's limits: each refills steadily and holds at most a minute's worth.

    They are counted in this process, and full when it starts. Times are in seconds of a monotonic clock.
    """

    def __init__(self) -> None:
        self._left: dict[tuple[str, str], tuple[float, float]] = {}

    def take(self, key: Key, what: Literal["requests", "tokens"], amount: int, now: float) -> float:
        """Take `amount` if that much is left; returns 0, or the seconds until it will be (infinity: never)."""
        wait = self.wait(key, what, amount, now)
        if not wait and (limit := self._limit(key, what)) is not None:
            self._left[key.id, what] = self._at(key, what, limit, now) - amount, now
        return wait

    def wait(self, key: Key, what: Literal["requests", "tokens"], amount: int, now: float) -> float:
        """Seconds until so much is left: 0 if it is, infinity if it never will be."""
        if (limit := self._limit(key, what)) is None:
            return 0.0
        if amount > limit:
            return float("inf")
        return max(0.0, (amount - self._at(key, what, limit, now)) * 60 / limit)

    def reserve(self, key: Key, prompt: int, answer: int, now: float, firm: bool) -> tuple[int, float]:
        """Take the tokens of a request; returns how many, and the seconds to wait if there are too few.

        What is used in the end is charged by `give_back`, be it more or less.

        Args:
            answer: most tokens that the answer may have.
            firm: whether they were asked for. If not, half of what is left will do: an answer hardly ever has as many
                as it may, and its key can ask for another one meanwhile.
        """
        amount, limit = prompt + answer, self._limit(key, "tokens")
        if limit is not None and not firm:
            amount = min(amount, max(prompt + 1, int(self._at(key, "tokens", limit, now) / 2)))
        return amount, self.take(key, "tokens", amount, now)

    def give_back(self, key: Key, amount: int, now: float) -> None:
        """Return tokens that were taken and not used; a negative number takes some that were used."""
        if (limit := self._limit(key, "tokens")) is not None:
            self._left[key.id, "tokens"] = min(limit, self._at(key, "tokens", limit, now) + amount), now

    def _limit(self, key: Key, what: str) -> int | None:
        return key.requests_per_minute if what == "requests" else key.tokens_per_minute

    def _at(self, key: Key, what: str, limit: int, now: float) -> float:
        left, then = self._left.get((key.id, what), (float(limit), now))
        return min(limit, left + (now - then) * limit / 60)
