"""Versions of adapters, and which of them answers a request."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internalrl.errors import InternalRLError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""What an adapter may be called."""


@dataclass(frozen=True)
class Version:
    """An adapter as it was added.

    Attributes:
        number: of the version among those of its name, from 1.
        content_hash: SHA-256 of its files: the config, the tensors and, where there are, strategies and limits.
        base_fingerprint: of the base it was trained on.
        provenance: how it was trained, from adapter_config.json; metrics: what whoever added it measured.
        added: seconds since 1970.
        folder: the registry's copy.
    """

    name: str
    number: int
    content_hash: str
    base_fingerprint: str
    provenance: Mapping[str, Any]
    metrics: Mapping[str, Any]
    added: float
    folder: Path

    @property
    def key(self) -> str:
        """ "name@number"."""
        return f"{self.name}@{self.number}"


@dataclass(frozen=True)
class Arm:
    """A version and its share of the traffic, in (0, 1]."""

    version: Version
    share: float


@dataclass(frozen=True)
class Routing:
    """What is live on one base, at one revision: name -> arms, whose shares sum to 1. It never changes.

    `failed` says, by name, what keeps the versions that should answer from answering.
    """

    revision: int
    arms: Mapping[str, tuple[Arm, ...]]
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def versions(self) -> Mapping[str, Version]:
        """All live versions, by key: those that a server must have loaded."""
        return {arm.version.key: arm.version for arms in self.arms.values() for arm in arms}

    def resolve(self, model: str, sticky_key: str | None = None) -> Version:
        """The version that answers a request for `model`, a name ("support") or a live version ("support@3").

        Of several arms the sticky key chooses, always the same while the arms and shares are; without one, chance
        does. Raises InternalRLError when nothing of that name is live.
        """
        if model in self.versions:
            return self.versions[model]
        if model not in self.arms:
            raise InternalRLError(f"No adapter {model!r} is live; live are: {', '.join(sorted(self.arms)) or 'none'}.")
        arms = self.arms[model]
        point = random.random() if sticky_key is None else _point(model, sticky_key)
        for arm in arms:
            point -= arm.share
            if point < 0:
                return arm.version
        return arms[-1].version


def parse_key(key: str) -> tuple[str, int]:
    """ "support@3" -> ("support", 3)."""
    name, _, number = key.rpartition("@")
    if not NAME.fullmatch(name) or not re.fullmatch("[1-9][0-9]{0,8}", number):
        raise InternalRLError(f"{key[:80]!r} names no version; write NAME@NUMBER, such as support@3.")
    return name, int(number)


def require_other_name(version: Version, base_name: str) -> None:
    """InternalRLError if a request for the version, or for its name, would be one for the base."""
    if base_name in (version.name, version.key):
        raise InternalRLError(
            f"{base_name!r} is what the base is called, and {version.key} would be too; start the server with another "
            "--name, or add the adapter under another name."
        )


def _point(name: str, sticky_key: str) -> float:
    """Where in [0, 1) a key falls."""
    digest = hashlib.sha256(f"{name}\0{sticky_key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
