"""Follows the registry: what is live there is loaded here, and no request meets a version that is not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from internalrl.base.fingerprint import base_fingerprint
from internalrl.errors import InternalRLError
from internalrl.players.engine.engine import Engine
from internalrl.serving.registry.registry import Registry
from internalrl.serving.registry.versions import Routing
from internalrl.strategies.limits import limits_of

log = logging.getLogger(__name__)

EVERY = 0.1
"""Seconds between two looks at the registry."""


class Live:
    """The routing that requests are answered by.

    A new version is loaded before the first request can name it. A version that is live no more is taken out of the
    engine when no new request can name it any longer; running requests finish on it.

    Args:
        limits: YAML files of what adapters may do, by the adapters' names; others keep to what they were trained with.
    """

    def __init__(self, engine: Engine, registry: Registry, limits: Mapping[str, Path] | None = None):
        self._engine, self._registry, self._limits = engine, registry, limits or {}
        self._fingerprint = base_fingerprint(engine.base)
        self._one_at_a_time = asyncio.Lock()
        self.routing = Routing(-1, {})

    async def keep_following(self) -> None:
        """Look at the registry until cancelled."""
        trouble = ""
        while True:
            try:
                await self.follow()
                trouble = ""
            except InternalRLError as error:  # what was live before goes on
                if str(error) != trouble:
                    log.error("the registry cannot be followed: %s", error)
                trouble = str(error)
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
        """The registry's routing, once all it needs is loaded; None where nothing has changed."""
        if self._registry.revision() == self.routing.revision:
            return None
        new = self._registry.routing(self._fingerprint)
        arms = dict(new.arms)
        for name, wanted in new.arms.items():
            try:
                for version in (arm.version for arm in wanted):
                    if version.key not in self._engine.adapters:
                        adapter = self._registry.load(self._engine.base, version)
                        limits = limits_of(version.folder, self._limits.get(name))
                        self._engine.add_adapter(version.key, adapter, limits)
            except InternalRLError as error:
                log.error("%s stays as it was: %s", name, error)
                arms[name] = self.routing.arms.get(name, ())
        return replace(new, arms={name: kept for name, kept in arms.items() if kept})
