"""Follows the registry: what is live there is loaded here, and no request meets a version that is not."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from internalrl.base.fingerprint import base_fingerprint
from internalrl.errors import InternalRLError
from internalrl.players.engine.engine import Engine
from internalrl.serving.registry.registry import Registry
from internalrl.serving.registry.versions import Routing, Version, require_other_name
from internalrl.strategies.limits import limits_of

log = logging.getLogger(__name__)

EVERY = 0.1
"""Seconds between two looks at the registry."""


class Live:
    """The routing that requests are answered by.

    A new version is loaded before the first request can name it. A version that is live no more is taken out of the
    engine when no new request can name it any longer; running requests finish on it. One that cannot be loaded,
    whatever the reason, leaves what was live under its name in place; `routing.failed` says why.

    Args:
        limits: YAML files of what adapters may do, by the adapters' names; others keep to what they were trained with.
        base_name: what requests call the base; no adapter can have this name.
        retry: seconds until a version that could not be loaded is tried again.

    Attributes:
        lost: why the registry cannot be followed at the moment, or None.
        errors: how often it could not be, or a version could not be loaded.
    """

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        limits: Mapping[str, Path] | None = None,
        base_name: str = "",
        retry: float = 10.0,
    ):
        self._engine, self._registry, self._limits = engine, registry, limits or {}
        self._base_name, self._retry = base_name, retry
        self._fingerprint = base_fingerprint(engine.base)
        self._one_at_a_time = asyncio.Lock()
        self._again = 0.0
        self.routing = Routing(-1, {})
        self.lost: str | None = None
        self.errors = 0

    async def keep_following(self) -> None:
        """Look at the registry until cancelled; no error ends that."""
        while True:
            try:
                await self.follow()
                self.lost = None
            except Exception as error:  # what was live before goes on
                said = self._told(error)
                if said != self.lost:
                    log.error("the registry cannot be followed: %s", said, exc_info=_unexpected(error))
                self.lost = said
            await asyncio.sleep(EVERY)

    async def follow(self) -> None:
        """Serve what the registry says now. Must run on the loop that submits requests."""
        async with self._one_at_a_time:
            new = await asyncio.to_thread(self._prepare)
            if new is None:
                return
            # From here on nothing is awaited: whoever resolved a version has submitted its request, or resolves anew.
            self.routing = new
            for key in set(self._engine.adapters) - set(new.versions):
                self._engine.remove_adapter(key)

    def _prepare(self) -> Routing | None:
        """The registry's routing, once all it needs is loaded; None where there is nothing to do."""
        retry = self.routing.failed and time.monotonic() >= self._again
        if self._registry.revision() == self.routing.revision and not retry:
            return None
        new = self._registry.routing(self._fingerprint)
        failed = dict(new.failed)
        for name, arms in new.arms.items():
            try:
                self._load(name, [arm.version for arm in arms])
            except Exception as error:
                failed[name] = self._told(error)
                if failed[name] != self.routing.failed.get(name):
                    log.error("%s stays as it was: %s", name, failed[name], exc_info=_unexpected(error))
        self._again = time.monotonic() + self._retry
        kept = {name: self.routing.arms[name] for name in failed if name in self.routing.arms}
        loaded = {name: arms for name, arms in new.arms.items() if name not in failed}
        return Routing(new.revision, {**loaded, **kept}, failed)

    def _load(self, name: str, versions: Sequence[Version]) -> None:
        for version in versions:
            require_other_name(version, self._base_name)
            if version.key not in self._engine.adapters:
                adapter = self._registry.load(self._engine.base, version)
                self._engine.add_adapter(version.key, adapter, limits_of(version.folder, self._limits.get(name)))

    def _told(self, error: Exception) -> str:
        """What there is to say of an error, which is counted."""
        self.errors += 1
        return f"{type(error).__name__}: {error}" if _unexpected(error) else str(error)


def _unexpected(error: Exception) -> bool:
    return not isinstance(error, InternalRLError)
