"""The parts of benchmarks/serving_load.py in a few seconds: a real server in a process, and many clients at once."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from internalrl.serving.audit.audit import Audit
from internalrl.serving.audit.store import Query
from internalrl.serving.registry.registry import Registry
from tests.support.generated import send_generated
from tests.support.load import MIX, Tally, Told, asks, crowd, idle, mixed, recorded, streamed, told_of, whole
from tests.support.server_process import Server, save_models, server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Server]:
    with server(folder, "--bounds.answer-tokens", "32") as running:
        yield running


def test_a_mixed_crowd_gets_the_right_answers(running: Server) -> None:
    async def main() -> tuple[Tally, bool]:
        async with running.client() as client:
            return await mixed(client, 24, 4, most=32), await idle(client)

    tally, free = asyncio.run(main())
    assert not tally.wrong
    assert free
    assert set(tally.done) == set(MIX), "the crowd did everything"


def test_generated_requests_are_no_failure_of_the_server(running: Server) -> None:
    statuses = send_generated(running.url, running.headers, 60)
    assert statuses.total() >= 60
    assert {status[0] for status in statuses} == {"2", "4"}


def test_promotion_and_rollback_lose_no_request(running: Server, folder: Path) -> None:
    ask = asks(1, 16)[0].with_options(model="support", max_tokens=8)
    versions: list[str] = []
    over, tally = threading.Event(), Tally()

    def change() -> None:
        """As `internalrl adapters` does, from another process; returns when both changes were seen."""
        with closing(Registry(running.folder / "registry")) as registry:
            second = registry.add("support", folder / "other").key
            registry.promote(second)
            seen(second)
            registry.rollback("support")
            seen("support@1")

    def seen(version: str) -> None:
        begin, deadline = len(versions), time.monotonic() + 60
        while version not in versions[begin:]:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    async def main() -> None:
        async with running.client() as client:

            async def work(_: random.Random) -> None:
                versions.append((await whole(client, ask)).version)

            clients = asyncio.create_task(crowd(8, over.is_set, work, tally))
            try:
                await asyncio.to_thread(change)
            finally:
                over.set()
            await clients

    asyncio.run(main())
    assert not tally.wrong
    assert set(versions) == {"support@1", "support@2"}


def test_a_killed_server_has_recorded_what_it_answered(folder: Path) -> None:
    wanted = [ask.with_options(trace=True) for ask in asks(12, 16) if ask.body["model"] != "tiny"]
    told: dict[str, list[Told]] = {}
    with server(folder, state="killed") as running:

        async def main() -> None:
            async with running.client() as client:

                async def work(draw: random.Random) -> None:
                    got = await draw.choice((whole, streamed))(client, draw.choice(wanted))
                    for index, segments in got.segments.items() if got.complete else ():
                        request = f"{got.id}-{index}" if index else got.id
                        told[request] = [told_of(segment) for segment in segments]
                    if len(told) > 40:
                        running.process.kill()

                await crowd(24, lambda: len(told) > 40, work, Tally())

        asyncio.run(main())
        running.process.wait(60)
    with closing(Audit(running.folder / "audit")) as audit:
        for request, segments in told.items():
            found = audit.store.find(Query(request=request, limit=1000))
            assert [recorded(segment) for segment in found] == segments
