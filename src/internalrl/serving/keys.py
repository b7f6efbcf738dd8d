"""`internalrl keys`: who may use the API. A running server learns of every change within a second."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, subcommand

from internalrl.settings.ranges import Checked, Count

if TYPE_CHECKING:
    from internalrl.serving.api.security import Key


@dataclass(frozen=True, kw_only=True)
class Where(Checked):
    """Options of every action."""

    registry: Path = Path("runs/registry")
    """Folder of the registry, whose database holds the keys."""
    database: str | None = None
    """URL of a database instead of the file in that folder: postgresql://USER@HOST/NAME."""


@dataclass(frozen=True, kw_only=True)
class Create(Where):
    """Make a key; it is printed once and kept nowhere."""

    name: Positional[str]
    """Whom it is for."""
    scopes: tuple[Literal["generate", "feedback", "metrics", "audit", "admin"], ...] = ("generate", "feedback")
    """What it may be used for."""
    requests_per_minute: Count | None = None
    """Most requests in a minute."""
    tokens_per_minute: Count | None = None
    """Most tokens in a minute, those of prompts and answers together."""


@dataclass(frozen=True, kw_only=True)
class List(Where):
    """Show all keys, without their secrets."""


@dataclass(frozen=True, kw_only=True)
class Revoke(Where):
    """Refuse a key from now on."""

    id: Positional[str]
    """Of the key, as `list` shows it: the part between the two dashes."""


KeysConfig = (
    Annotated[Create, subcommand("create")]
    | Annotated[List, subcommand("list")]
    | Annotated[Revoke, subcommand("revoke")]
)


def main(config: Create | List | Revoke) -> dict[str, Any]:
    """Do one of the actions."""
    from internalrl.serving.api.security import Keys

    keys = Keys(config.registry, config.database)
    try:
        if isinstance(config, List):
            return {"keys": [_row(key) for key in keys.list()]}
        if isinstance(config, Revoke):
            return _row(keys.revoke(config.id))
        key, text = keys.create(config.name, config.scopes, config.requests_per_minute, config.tokens_per_minute)
        return {"key": text, **_row(key)}
    finally:
        keys.close()


def _row(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": " ".join(sorted(key.scopes)),
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "created": _time(key.created),
        "revoked": key.revoked and _time(key.revoked),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds")
