"""A server under load: is any answer lost, crossed or unrecorded, and what do promotion and audit cost?

    python benchmarks/serving_load.py [--minutes M] [--repeats R] [--output FILE]
    python benchmarks/serving_load.py --schema [--requests N]

A real server, `internalrl serve` in a process of its own, with keys, and 64 clients at once. Parts, in this order:

load       streams and whole answers, clients that leave, that read slowly, bodies too large or malformed, wrong keys.
           Every answer is compared with what the same server gave for the same request when it was alone.
promotion  a second version is promoted and rolled back while clients ask for the adapter.
kill       the server is killed (SIGKILL) in mid load; every answer that arrived is looked up in the audit.
audit      tokens/s with and without the audit, in turn.

`--schema` instead sends requests that are generated from the server's OpenAPI description. Exits with 1 where a check
fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from spread import spread

from internalrl.runlog import environment
from internalrl.serving.audit import Audit
from internalrl.serving.audit_store import Query
from internalrl.serving.registry import Registry
from internalrl.serving.security import SCOPES, Keys

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.served import byte_tokenizer, save_adapter, served_base

STREAMS, SLOTS = 64, 16
MODELS = ("code", "support", "tiny")
LARGER = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
"""Base of the part `audit`: one whose forward pass takes about as long as that of a small real model."""

_MIX = {"stream": 50, "whole": 20, "leave": 12, "slow": 6, "oversize": 3, "malformed": 3, "bad key": 3, "no model": 3}


@dataclass(frozen=True)
class Server:
    """A running server: its address, a key for everything, its process and its folder."""

    url: str
    key: str
    process: subprocess.Popen[bytes]
    folder: Path

    def client(self, **options: Any) -> httpx2.AsyncClient:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=STREAMS)
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx2.AsyncClient(
            base_url=self.url, headers=headers, verify=False, timeout=120, limits=limits, **options
        )

    def memory(self) -> float:
        """Resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


def save_models(folder: Path, **sizes: int) -> None:
    """A random base, its tokenizer, and three adapters."""
    base = served_base(**sizes)
    base.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(("code", "support", "other"), 1):
        save_adapter(base, folder / name, seed, policy=name == "code")


@contextmanager
def server(folder: Path, *options: str, state: str = "state") -> Iterator[Server]:
    """`internalrl serve` with the models of `folder`; its registry and audit are in `folder / state`."""
    registry = folder / state / "registry"
    keys = Keys(registry)
    _, key = keys.create("load", SCOPES)
    keys.close()
    command = [sys.executable, "-m", "internalrl.cli", "serve", str(folder / "base"), "--name", "tiny", "--port", "0"]
    command += ["--adapter", f"code={folder / 'code'}", "--adapter", f"support={folder / 'support'}"]
    command += ["--registry", str(registry), "--audit.folder", str(folder / state / "audit"), "--threads", "1"]
    command += ["--slots", str(SLOTS), "--queue", str(4 * STREAMS), "--bounds.body-bytes", "65536", *options]
    log = folder / f"{state}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not (found := re.search(r"Serving tiny at (\S+)/v1", log.read_text(encoding="utf-8"))):
            if process.poll() is not None:
                raise RuntimeError(f"the server did not start:\n{log.read_text(encoding='utf-8')}")
            time.sleep(0.05)
        yield Server(found[1], key, process, folder / state)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(60)
        sys.stderr.write("".join(f"server: {line}\n" for line in log.read_text(encoding="utf-8").splitlines()[1:]))


# -- clients --------------------------------------------------------------------------------------------------


def asks(count: int, most: int) -> list[dict[str, Any]]:
    """Different requests, each with a seed."""
    draw = random.Random(0)
    return [
        {
            "model": MODELS[i % len(MODELS)],
            "prompt": "".join(draw.choices("abcdefgh ", k=draw.randint(1, 40))),
            "seed": i,
            "max_tokens": draw.randint(most // 4, most),
        }
        for i in range(count)
    ]


async def whole(client: httpx2.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """The answer in one piece."""
    answer = await client.post("/v1/completions", json=body)
    if answer.status_code != 200:
        raise Unexpected(f"{answer.status_code}: {answer.text[:200]}")
    found: dict[str, Any] = answer.json()
    return found


async def streamed(
    client: httpx2.AsyncClient, body: dict[str, Any], *, leave_after: int = 10**9, pause: float = 0.0
) -> tuple[str, str, bool]:
    """Id and text of a streamed answer, and whether it came to its end."""
    text, id_, done, chunks = "", "", False, 0
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            await answer.aread()
            raise Unexpected(f"{answer.status_code}: {answer.text[:200]}")
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise Unexpected(line)
                id_ = chunk["id"]
                text += chunk["choices"][0]["text"]
                chunks += 1
                if chunks > leave_after:
                    break
                await asyncio.sleep(pause)
    return id_, text, done


class Unexpected(Exception):  # noqa: N818 (it is counted)
    """An answer that should have been another."""


@dataclass
class Tally:
    """What happened."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0


async def one_request(
    client: httpx2.AsyncClient, kind: str, body: dict[str, Any], expected: str, draw: random.Random, tally: Tally
) -> None:
    """Do one thing of the mix, and see whether the answer is the right one."""
    began = time.perf_counter()
    json_type = {"Content-Type": "application/json"}
    if kind in ("stream", "slow"):
        _, text, done = await streamed(client, body, pause=0.05 * (kind == "slow"))
        if not done or text != expected:
            raise Unexpected(f"{'crossed' if done else 'lost'}: {text!r} instead of {expected!r}")
    elif kind == "leave":
        _, text, _ = await streamed(client, body, leave_after=draw.randint(0, 8))
        if not expected.startswith(text):
            raise Unexpected(f"crossed: {text!r} instead of {expected!r}")
    elif kind == "whole":
        text = (await whole(client, body))["choices"][0]["text"]
        if text != expected:
            raise Unexpected(f"crossed: {text!r} instead of {expected!r}")
    else:
        send: dict[str, Any] = {"json": body}
        if kind == "oversize":
            big = json.dumps({**body, "user": "x" * draw.randint(70_000, 500_000)}).encode()
            pieces = (big[i : i + 9000] for i in range(0, len(big), 9000))
            send = {"content": _later(pieces) if draw.random() < 0.5 else big, "headers": json_type}
        elif kind == "malformed":
            junk = draw.choice((b"", b"{", b"\xff\xfe", b"[1, 2", json.dumps({**body, "n": "two"}).encode()))
            send = {"content": junk, "headers": json_type}
        elif kind == "bad key":
            send["headers"] = {"Authorization": f"Bearer irl-{draw.getrandbits(48):012x}-{draw.getrandbits(99)}"}
        else:
            send["json"] = {**body, "model": "nobody"}
        right = {"oversize": 413, "malformed": 400, "bad key": 401, "no model": 404}[kind]
        answer = await client.post("/v1/completions", **send)
        if answer.status_code != right or set(answer.json()["error"]) != {"message", "type", "param", "code"}:
            raise Unexpected(f"{kind}: {answer.status_code} {answer.text[:200]}")
    if kind in ("stream", "whole"):
        tally.seconds.append(time.perf_counter() - began)
        tally.tokens += body["max_tokens"]
    tally.done[kind] += 1


async def _later(pieces: Iterator[bytes]) -> Any:
    for piece in pieces:
        yield piece


async def crowd(clients: int, until: Callable[[], bool], work: Callable[[random.Random], Awaitable[None]]) -> list[str]:
    """So many clients at once, each doing `work` again and again; returns what went wrong."""
    wrong: list[str] = []

    async def one(number: int) -> None:
        draw = random.Random(number)
        while not until():
            try:
                await work(draw)
            except Unexpected as error:
                wrong.append(str(error))
            except Exception as error:  # a connection that broke is an answer that was lost
                wrong.append(f"lost: {type(error).__name__}: {error}")

    await asyncio.gather(*(one(number) for number in range(clients)))
    return wrong


# -- the parts ------------------------------------------------------------------------------------------------


async def load(folder: Path, seconds: float) -> dict[str, Any]:
    """The mix of everything, for so long."""
    bodies, tally = asks(24, 48), Tally()
    with server(folder) as running:
        async with running.client() as client:
            expected = [(await whole(client, body))["choices"][0]["text"] for body in bodies]
            if expected != [(await whole(client, body))["choices"][0]["text"] for body in bodies]:
                tally.wrong.append("the server alone answers one request in two ways")
            kinds, weights = list(_MIX), list(_MIX.values())
            memory: list[float] = []
            end = time.monotonic() + seconds

            async def work(draw: random.Random) -> None:
                i, kind = draw.randrange(len(bodies)), draw.choices(kinds, weights)[0]
                await one_request(client, kind, bodies[i], expected[i], draw, tally)

            async def watch() -> None:
                while time.monotonic() < end:
                    memory.append(running.memory())
                    await asyncio.sleep(min(1.0, seconds / 50))

            watching = asyncio.create_task(watch())
            tally.wrong += await crowd(STREAMS, lambda: time.monotonic() > end, work)
            await watching
            free = await _idle(client)
    quarter = max(1, len(memory) // 4)
    return {
        "seconds": seconds,
        "clients": STREAMS,
        "requests": dict(tally.done),
        "wrong": len(tally.wrong),
        "first_wrong": tally.wrong[:5],
        "answer_seconds": spread(tally.seconds),
        "answers_per_second": round(len(tally.seconds) / seconds, 1),
        "memory_mb": {"second_quarter": spread(memory[quarter : 2 * quarter], 1), "last": spread(memory[-quarter:], 1)},
        "slots_free_afterwards": free,
        "passed": not tally.wrong and free,
    }


async def _idle(client: httpx2.AsyncClient) -> bool:
    """Whether all slots are free soon after the last client has left."""
    for _ in range(100):
        metrics = (await client.get("/metrics")).text
        if "internalrl_slots_running 0.0" in metrics and "internalrl_queue_waiting 0.0" in metrics:
            return True
        await asyncio.sleep(0.1)
    return False


async def promotion(folder: Path, repeats: int) -> dict[str, Any]:
    """Promote and roll back from another process, as `internalrl adapters` does, while clients ask."""
    first: dict[str, list[float]] = {"promote": [], "rollback": []}
    answers: list[tuple[float, str]] = []
    with server(folder, state="promotion") as running:
        registry = Registry(running.folder / "registry")
        second = registry.add("support", folder / "other").key
        stop = False
        async with running.client() as client:
            body = {"model": "support", "prompt": "a", "seed": 1, "max_tokens": 16}
            texts: dict[str, set[str]] = {}

            async def work(draw: random.Random) -> None:
                answer = await whole(client, body)
                answers.append((time.monotonic(), answer["system_fingerprint"]))
                texts.setdefault(answer["system_fingerprint"], set()).add(answer["choices"][0]["text"])

            clients = asyncio.create_task(crowd(SLOTS, lambda: stop, work))
            for change, key in [("promote", second), ("rollback", "support@1")] * repeats:
                await asyncio.sleep(0.5)
                began = time.monotonic()
                change_it = (
                    (lambda: registry.promote(second))
                    if change == "promote"
                    else (lambda: registry.rollback("support"))
                )
                await asyncio.to_thread(change_it)
                while not (times := [then for then, version in answers if version == key and then > began]):
                    await asyncio.sleep(0.002)
                first[change].append(times[0] - began)
            stop = True
            wrong = await clients
        registry.close()
    crossed = {version: len(found) for version, found in texts.items() if len(found) > 1}
    slowest = max(max(times) for times in first.values())
    return {
        "changes": 2 * repeats,
        "answers": len(answers),
        "failed": len(wrong),
        "first_failed": wrong[:5],
        "crossed": crossed,
        "first_answer_seconds": {change: spread(times) for change, times in first.items()},
        "passed": not wrong and not crossed and slowest <= 1.0,
    }


async def kill(folder: Path, repeats: int) -> dict[str, Any]:
    """SIGKILL in mid load. What arrived whole must be in the audit, segment by segment."""
    arrived, missing = [], 0
    for repeat in range(repeats):
        state = f"kill-{repeat}"
        answers = await _killed(folder, state, seconds=2 + repeat / 3)
        audit = Audit(folder / state / "audit")  # as a server does when it starts again
        for request, segments in answers.items():
            found = {segment.index: segment for segment in audit.store.find(Query(request=request, limit=1000))}
            for segment in segments:
                stored = found.get(segment["index"])
                missing += stored is None or (stored.text, stored.stop) != (segment["text"], segment["stop"])
        audit.close()
        arrived.append(len(answers))
    return {
        "kills": repeats,
        "answers": arrived,
        "segments_missing": missing,
        "passed": not missing and min(arrived) > 0,
    }


async def _killed(folder: Path, state: str, seconds: float) -> dict[str, list[dict[str, Any]]]:
    """Segments of all answers that came whole before the server was killed."""
    answers: dict[str, list[dict[str, Any]]] = {}
    bodies = asks(24, 48)

    async def work(draw: random.Random) -> None:
        answer = await whole(client, {**draw.choice(bodies), "trace": True})
        answers[answer["id"]] = answer["choices"][0]["trace"]["segments"]

    with server(folder, state=state) as running:
        async with running.client() as client:
            clients = asyncio.create_task(crowd(STREAMS, lambda: running.process.poll() is not None, work))
            await asyncio.sleep(seconds)
            running.process.kill()
            await clients
    return answers


async def audit(folder: Path, repeats: int) -> dict[str, Any]:
    """The same work for a server with the audit and for one without, in turn of order."""
    models = folder / "larger"
    save_models(models, **LARGER)
    bodies = [{**body, "model": "code", "max_tokens": 64} for body in asks(2 * SLOTS, 64)]
    rates: dict[str, list[float]] = {"with": [], "without": []}
    with server(models, state="with") as one, server(models, "--audit.no-enabled", state="without") as other:
        async with one.client() as with_audit, other.client() as without:
            contestants = {"with": with_audit, "without": without}
            for repeat in range(repeats + 1):
                for name in sorted(contestants, reverse=bool(repeat % 2)):
                    began = time.perf_counter()
                    answers = await asyncio.gather(*(whole(contestants[name], body) for body in bodies))
                    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
                    if repeat:  # the first one warms up
                        rates[name].append(tokens / (time.perf_counter() - began))
    lost = 1 - np.array(rates["with"]) / np.array(rates["without"])
    return {
        "repeats": repeats,
        "base": LARGER,
        "tokens_per_second": {name: spread(values, 1) for name, values in rates.items()},
        "overhead": spread(lost),
        "passed": float(np.median(lost)) <= 0.02,
    }


def schema(folder: Path, requests: int) -> dict[str, Any]:
    """Generated requests: no answer may be the server's failure, and all must be as the description says."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    statuses: Counter[str] = Counter()
    with server(folder, "--bounds.answer-tokens", "16", state="schema") as running:
        headers = {"Authorization": f"Bearer {running.key}"}
        described = schemathesis.openapi.from_url(f"{running.url}/openapi.json", headers=headers)
        operations = [result.ok() for result in described.get_all_operations()]
        checks = [not_a_server_error, response_schema_conformance, status_code_conformance]
        for operation in operations:
            # Half of the requests fit the description, the other half do not.
            for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
                count = requests // (2 * len(operations)) + 1

                @given(case=operation.as_strategy(generation_mode=mode))
                @settings(
                    max_examples=count,
                    database=None,
                    deadline=None,
                    derandomize=True,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                def generated(case: Any) -> None:
                    answer = case.call(headers=headers, timeout=60)
                    statuses[str(answer.status_code)] += 1
                    case.validate_response(answer, checks=checks)

                with suppress(StopIteration):
                    generated()
    return {
        "requests": statuses.total(),
        "operations": len(operations),
        "statuses": dict(sorted(statuses.items())),
        "passed": True,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="of the part `load`")
    parser.add_argument("--repeats", type=int, default=5, help="of promotions, and of rounds with and without audit")
    parser.add_argument("--schema", action="store_true", help="send generated requests instead")
    parser.add_argument("--requests", type=int, default=1000, help="generated requests")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_models(folder)
        if args.schema:
            parts = {"schema": schema(folder, args.requests)}
        else:
            parts = {
                "load": asyncio.run(load(folder, 60 * args.minutes)),
                "promotion": asyncio.run(promotion(folder, args.repeats)),
                "kill": asyncio.run(kill(folder, max(1, args.repeats // 2))),
                "audit": asyncio.run(audit(folder, args.repeats)),
            }
    print(json.dumps(parts, indent=2))
    output = args.output or results / ("serving_schema.json" if args.schema else "serving_load.json")
    result = {"command": " ".join(["python", *sys.argv]), **parts, **environment()}
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(part["passed"] for part in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
