"""What follows the registry survives whatever happens, says so, and one bad part concerns nobody else."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from internalrl.serving.registry.live import Live
from internalrl.serving.registry.registry import Registry
from tests.support.served import save_adapter, served_base


class Slots:
    """As much of an engine as the follower of the registry needs; `bad` raises when a version is added."""

    def __init__(self, base: PreTrainedModel):
        self.base, self.adapters, self.bad = base, dict[str, Any](), dict[str, BaseException]()

    def add_adapter(self, key: str, adapter: Any, limits: Any = None) -> None:
        if key in self.bad:
            raise self.bad[key]
        self.adapters[key] = adapter

    def remove_adapter(self, key: str) -> None:
        del self.adapters[key]


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return served_base()


@pytest.fixture
def registry(tmp_path: Path, base: PreTrainedModel) -> Iterator[Registry]:
    """support@1 and @2, and other@1, of which support@1 is live."""
    with closing(Registry(tmp_path / "registry")) as registry:
        for seed, name in enumerate(("support", "support", "other")):
            registry.add(name, save_adapter(base, tmp_path / str(seed), seed))
        registry.promote("support@1")
        yield registry


@pytest.fixture
def slots(base: PreTrainedModel) -> Slots:
    return Slots(base)


def served(live: Live) -> dict[str, list[str]]:
    return {name: [arm.version.key for arm in arms] for name, arms in live.routing.arms.items()}


ERRORS = (RuntimeError("Storage size calculation overflowed"), MemoryError(), KeyError("x"), OSError(5, "I/O error"))


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_version_that_cannot_be_loaded_concerns_its_name_alone(
    registry: Registry, slots: Slots, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    live = Live(slots, registry)  # type: ignore[arg-type]
    asyncio.run(live.follow())
    slots.bad = {"support@2": error}
    registry.promote("support@2")
    registry.promote("other@1")
    asyncio.run(live.follow())
    assert served(live) == {"support": ["support@1"], "other": ["other@1"]}
    assert set(slots.adapters) == {"support@1", "other@1"}
    assert list(live.routing.failed) == ["support"]
    assert "support stays as it was" in caplog.text
    registry.rollback("support")
    asyncio.run(live.follow())
    assert not live.routing.failed
    assert live.errors == 1


def test_a_restart_beside_a_version_that_cannot_be_loaded(registry: Registry, slots: Slots) -> None:
    slots.bad = {"support@1": MemoryError()}
    registry.promote("other@1")
    live = Live(slots, registry)  # type: ignore[arg-type]
    asyncio.run(live.follow())
    assert served(live) == {"other": ["other@1"]}


def test_what_failed_is_tried_again_by_itself(registry: Registry, slots: Slots) -> None:
    slots.bad = {"support@1": OSError(5, "I/O error")}
    live = Live(slots, registry, retry=0)  # type: ignore[arg-type]
    patient = Live(slots, registry, retry=60)  # type: ignore[arg-type]
    for follower in (live, patient):
        asyncio.run(follower.follow())
    slots.bad = {}
    for follower in (live, patient):
        asyncio.run(follower.follow())
    assert served(live) == {"support": ["support@1"]}
    assert not live.routing.failed
    assert patient.routing.failed


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_no_error_ends_the_following(
    registry: Registry, slots: Slots, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    broken = True

    class Failing(Registry):
        def __init__(self) -> None: ...

        def __getattribute__(self, name: str) -> Any:
            if broken:
                raise error
            return getattr(registry, name)

    live = Live(slots, Failing())  # type: ignore[arg-type]

    async def scene() -> None:
        nonlocal broken
        following = asyncio.create_task(live.keep_following())
        while live.errors < 3:
            await asyncio.sleep(0.01)
        assert live.lost
        broken = False
        while live.lost:
            await asyncio.sleep(0.01)
        assert served(live) == {"support": ["support@1"]}
        assert not following.done()
        following.cancel()

    with caplog.at_level(logging.ERROR):
        asyncio.run(scene())
    assert caplog.text.count("the registry cannot be followed") == 1, "once, however long it lasts"


def test_a_row_that_was_tampered_with_concerns_its_name_alone(registry: Registry, slots: Slots, tmp_path: Path) -> None:
    registry.promote("other@1")
    with closing(sqlite3.connect(tmp_path / "registry" / "registry.db")) as database, database:
        database.execute("UPDATE registry_versions SET content_hash = '../../etc' WHERE name = 'support'")
    live = Live(slots, registry)  # type: ignore[arg-type]
    asyncio.run(live.follow())
    assert served(live) == {"other": ["other@1"]}
    assert "tampered" in live.routing.failed["support"]


def test_no_adapter_takes_the_name_of_the_base(registry: Registry, slots: Slots) -> None:
    for name in ("support", "support@1"):
        live = Live(slots, registry, base_name=name)  # type: ignore[arg-type]
        asyncio.run(live.follow())
        assert not live.routing.arms
        assert "what the base is called" in live.routing.failed["support"]
