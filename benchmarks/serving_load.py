"""A server under load: is any answer lost, crossed or unrecorded, and what do promotion and audit cost?

    python benchmarks/serving_load.py [PART ...] [--minutes M] [--requests N] [--repeats R]

A real server, `internalrl serve` in a process of its own, with keys. Each part writes serving_PART.json:

load       64 clients at once: streams and whole answers, clients that leave, read slowly or send half a request, bodies
           too large or malformed, wrong keys. Every answer is compared with what the server gave when it was alone.
schema     requests that are generated from the server's OpenAPI description.
promotion  a second version is promoted and rolled back while 16 clients ask for the adapter.
kill       the server is killed (SIGKILL) in mid load; every answer that arrived is looked up in the audit.
audit      tokens/s with and without the audit, in turn.
segments   processor time that the audit spends on a segment, from the engine to the database.

Exits with 1 where a part does not pass.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap
from spread import spread

from internalrl.players.engine.requests import Request, SegmentRecord
from internalrl.run.folder import environment
from internalrl.serving.audit.audit import Audit
from internalrl.serving.audit.store import Query
from internalrl.serving.registry.registry import Registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support.generated import send_generated
from tests.support.load import Answered, Tally, asks, crowd, idle, mixed, recorded, streamed, told_of, whole
from tests.support.server_process import SLOTS, Server, save_models, server

STREAMS = 64
BASES = {
    "small": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6},
    "larger": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12},
}
"""Bases of the part `audit`, whose cost does not depend on the base; the bar is for the larger one, whose blocks are
those of `serving.py`."""

WARM = 0.2
"""Part of a load test after which memory should be flat."""
GROWTH = 0.01
"""Most that memory may grow from then on, by a line fitted to it, as a part of what it is."""


async def load(folder: Path, seconds: float) -> dict[str, Any]:
    """The mix of everything, for so long."""
    memory: list[tuple[float, float]] = []
    with server(folder) as running:
        async with running.client() as client:
            files = running.open_files()
            watching = asyncio.create_task(_watch(running, memory, seconds / 600))
            tally = await mixed(client, STREAMS, seconds)
            watching.cancel()
            free = await idle(client)
        await asyncio.sleep(1)  # its connections end
        files = running.open_files() - files
    then, mb = np.array([entry for entry in memory if entry[0] - memory[0][0] > WARM * seconds]).T
    slope, _ = np.polyfit(then - then[0], mb, 1)
    half = len(then) // 2
    late, _ = np.polyfit(then[half:] - then[half], mb[half:], 1)
    growth = float(slope * (then[-1] - then[0]) / np.median(mb))
    return {
        "seconds": seconds,
        "clients": STREAMS,
        "requests": dict(tally.done),
        "answers": sum(tally.done.values()),
        "mistakes": tally.kinds_of_mistakes(),
        "first_mistakes": tally.wrong[:5],
        "answer_seconds": spread(tally.seconds),
        "memory": {
            "mb": spread(mb, 1),
            "mb_per_minute": round(60 * float(slope), 3),
            "mb_per_minute_in_last_half": round(60 * float(late), 3),
            "growth": round(growth, 5),
            "of_seconds": round(float(then[-1] - then[0])),
        },
        "slots_free_afterwards": free,
        "files_left_open": max(files, 0),
        "passed": not tally.wrong and free and growth <= GROWTH,
    }


async def _watch(running: Server, memory: list[tuple[float, float]], pause: float) -> None:
    while True:
        memory.append((time.monotonic(), running.memory()))
        await asyncio.sleep(pause)


def schema(folder: Path, requests: int) -> dict[str, Any]:
    """Generated requests: no answer may be the server's failure, and all must be as the description says."""
    with server(folder, "--bounds.answer-tokens", "16") as running:
        statuses = send_generated(running.url, running.headers, requests)
    failures = sum(count for status, count in statuses.items() if status.startswith("5"))
    return {
        "requests": statuses.total(),
        "statuses": dict(sorted(statuses.items())),
        "server_errors": failures,
        "passed": statuses.total() >= requests and not failures,
    }


async def promotion(folder: Path, repeats: int) -> dict[str, Any]:
    """Promote and roll back from another process, as `internalrl adapters` does, while clients ask."""
    first: dict[str, list[float]] = {"promote": [], "rollback": []}
    answers: list[tuple[float, float, str]] = []
    texts: dict[str, set[str]] = {}
    tally, over = Tally(), False
    ask = asks(1, 16)[0].with_options(model="support", max_tokens=16)
    with server(folder) as running:
        registry = Registry(running.folder / "registry")
        second = registry.add("support", folder / "other").key
        async with running.client() as client:

            async def work(_: random.Random) -> None:
                began = time.monotonic()
                got = await whole(client, ask)
                answers.append((began, time.monotonic(), got.version))
                texts.setdefault(got.version, set()).add(got.texts[0])

            clients = asyncio.create_task(crowd(SLOTS, lambda: over, work, tally))
            await asyncio.sleep(1)
            changes: dict[str, Callable[[], Any]] = {
                "promote": lambda: registry.promote(second),
                "rollback": lambda: registry.rollback("support"),
            }
            for change, version in [("promote", second), ("rollback", "support@1")] * repeats:
                began = time.monotonic()
                await asyncio.to_thread(changes[change])
                while not (ends := [end for start, end, key in answers if key == version and start > began]):
                    await asyncio.sleep(0.002)
                first[change].append(min(ends) - began)
                await asyncio.sleep(0.5)
            over = True
            await clients
        registry.close()
    return {
        "clients": SLOTS,
        "changes": 2 * repeats,
        "answers": len(answers),
        "failed": len(tally.wrong),
        "first_failed": tally.wrong[:5],
        "texts_by_version": {version: len(found) for version, found in texts.items()},
        "answer_seconds": spread([end - start for start, end, _ in answers]),
        "first_answer_seconds": {change: spread(times) for change, times in first.items()},
        "passed": not tally.wrong
        and all(len(found) == 1 for found in texts.values())
        and max(map(max, first.values())) <= 1.0,
    }


async def kill(folder: Path, repeats: int) -> dict[str, Any]:
    """SIGKILL in mid load. What arrived whole must be in the audit, segment by segment."""
    arrived, segments, missing = [], 0, 0
    for repeat in range(repeats):
        state = f"kill-{repeat}"
        answers = await _killed(folder, state, seconds=3 + repeat / 3)
        audit = Audit(folder / state / "audit")  # as a server does when it starts again
        for answer in answers:
            for index, told in answer.segments.items():
                request = answer.id if index == 0 else f"{answer.id}-{index}"
                found = {recorded(segment) for segment in audit.store.find(Query(request=request, limit=1000))}
                missing += sum(told_of(segment) not in found for segment in told)
                segments += len(told)
        audit.close()
        arrived.append(len(answers))
    return {
        "kills": repeats,
        "clients": STREAMS,
        "answers": arrived,
        "segments": segments,
        "segments_missing": missing,
        "passed": not missing and min(arrived) > 0,
    }


async def _killed(folder: Path, state: str, seconds: float) -> list[Answered]:
    """All steered answers that came whole before the server was killed."""
    answers: list[Answered] = []
    wanted = [ask.with_options(trace=True) for ask in asks(24, 48) if ask.body["model"] != "tiny"]

    async def work(draw: random.Random) -> None:
        way = draw.choice((whole, streamed))
        got = await way(client, draw.choice(wanted))
        if got.complete:
            answers.append(got)

    with server(folder, state=state) as running:
        async with running.client() as client:
            over = lambda: running.process.poll() is not None  # noqa: E731
            clients = asyncio.create_task(crowd(STREAMS, over, work, Tally()))
            await asyncio.sleep(seconds)
            running.process.kill()
            await clients
    return answers


async def audit(folder: Path, repeats: int) -> dict[str, Any]:
    """The same work for a server with the audit and for one without, in turn of order."""
    found = {name: await _audited(folder / name, sizes, repeats) for name, sizes in BASES.items()}
    return {"repeats": repeats, "streams": SLOTS, **found, "passed": found["larger"]["overhead"]["median"] <= 0.02}


async def _audited(models: Path, sizes: dict[str, int], repeats: int) -> dict[str, Any]:
    save_models(models, **sizes)
    work = [ask.with_options(model="code", max_tokens=64, n=1) for ask in asks(2 * SLOTS, 64)]
    rates: dict[str, list[float]] = {"with": [], "without": []}
    costs: dict[str, list[float]] = {"with": [], "without": []}
    segments = tokens = 0
    with server(models, state="with") as one, server(models, "--audit.no-enabled", state="without") as other:
        async with one.client() as with_audit, other.client() as without:
            contestants = {"with": (one, with_audit), "without": (other, without)}
            for repeat in range(repeats + 1):
                for name in sorted(contestants, reverse=bool(repeat % 2)):
                    running, client = contestants[name]
                    began, cpu = time.perf_counter(), running.cpu_seconds()
                    answers = await asyncio.gather(*(whole(client, ask) for ask in work))
                    tokens = sum(answer.tokens for answer in answers)
                    if repeat:  # the first one warms up
                        rates[name].append(tokens / (time.perf_counter() - began))
                        costs[name].append(1000 * (running.cpu_seconds() - cpu) / tokens)
            segments = await _segments(with_audit) // (repeats + 1)
    lost = 1 - np.array(rates["with"]) / np.array(rates["without"])
    cost = np.array(costs["with"]) / np.array(costs["without"]) - 1
    return {
        "base": sizes,
        "segments_per_token": round(segments / tokens, 4),
        "tokens_per_second": {name: spread(values, 1) for name, values in rates.items()},
        "overhead": spread(lost),
        "overhead_interval": _interval(lost),
        "cpu_ms_per_token": {name: spread(values) for name, values in costs.items()},
        "cpu_overhead": spread(cost),
        "cpu_overhead_interval": _interval(cost),
    }


def segments(folder: Path, repeats: int, answers: int = 500, each: int = 28) -> dict[str, Any]:
    """Microseconds per segment of answers that have so many segments each."""
    record = SegmentRecord(0, 0, 2, tuple(np.random.default_rng(0).normal(size=8)), 0.3, -2.5, "ab")
    costs = []
    for repeat in range(repeats):
        log, began = Audit(folder / str(repeat)), time.process_time()
        for request in [Request((1,), "code@1") for _ in range(answers)]:
            for index in range(each):
                log.segment(request, replace(record, index=index))
            log.wait(request.id)
        log.close()
        costs.append(1e6 * (time.process_time() - began) / (answers * each))
    return {"repeats": repeats, "segments": answers * each, "microseconds_per_segment": spread(costs)}


async def _segments(client: httpx2.AsyncClient) -> int:
    """How many segments a server has recorded."""
    text = (await client.get("/metrics")).text
    return int(float(re.findall(r"^internalrl_audit_written_total (\S+)", text, re.MULTILINE)[0]))


def _interval(values: NDArray[np.float64]) -> list[float]:
    """95 % bootstrap interval of the median."""
    found = bootstrap((values,), np.median, method="percentile", random_state=0)
    return [round(float(limit), 4) for limit in found.confidence_interval]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = ("load", "schema", "promotion", "kill", "audit", "segments")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(names)}; by default all")
    parser.add_argument("--minutes", type=float, default=10, help="of the part `load`")
    parser.add_argument("--requests", type=int, default=1000, help="of the part `schema`")
    parser.add_argument("--repeats", type=int, default=20, help="promotions, and rounds with and without audit")
    parser.add_argument("--kills", type=int, default=5, help="of the part `kill`")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(names):
        parser.error(f"there is no part {min(unknown)!r}; choose from {', '.join(names)}")

    measure: dict[str, Callable[[Path], dict[str, Any]]] = {
        "load": lambda folder: asyncio.run(load(folder, 60 * args.minutes)),
        "schema": lambda folder: schema(folder, args.requests),
        "promotion": lambda folder: asyncio.run(promotion(folder, args.repeats)),
        "kill": lambda folder: asyncio.run(kill(folder, args.kills)),
        "audit": lambda folder: asyncio.run(audit(folder, args.repeats)),
        "segments": lambda folder: segments(folder, args.repeats),
    }
    passed = True
    for name in args.parts or names:
        with tempfile.TemporaryDirectory() as temporary:
            save_models(Path(temporary))
            result = measure[name](Path(temporary))
        passed = passed and result.get("passed", True)  # `segments` has no bar
        print(json.dumps({name: result}, indent=2), flush=True)
        text = json.dumps({"command": " ".join(["python", *sys.argv]), **result, **environment()}, indent=2)
        (args.results / f"serving_{name}.json").write_text(text + "\n", encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
