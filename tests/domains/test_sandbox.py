"""The sandbox: safe programs give what they give elsewhere, and attempts to escape or to exhaust it are stopped."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from internalrl.domains.code.grammar import CodeConfig
from internalrl.domains.code.idioms import variants
from internalrl.domains.code.sandbox import sandbox as module
from internalrl.domains.code.sandbox.sandbox import PROGRAM_BYTES, Limits, Outcome, Sandbox
from internalrl.domains.code.sandbox.worker import harmless
from internalrl.errors import InternalRLError
from tests.support.attacks import ESCAPES, EXHAUSTION, FORGERIES, HARMFUL, SABOTAGE, SEARCH, program

LIMITS = Limits(cpu_seconds=0.25, wall_seconds=1.0, memory_mb=48)
GOOD = "def f(x):\n    return sorted(x)\n"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=1, limits=LIMITS) as sandbox:
        yield sandbox


def run_one(sandbox: Sandbox, source: str, *inputs: Any) -> Outcome:
    return sandbox.run([source], inputs or [[2, 1]])[0]


# -------------------------------------------------------------------------------------------------- safe programs

SAFE = {
    "comprehension": program("return [v * 2 for v in x if v > 0]"),
    "in place": program("x.sort()\nreturn x"),
    "recursion": program("return [] if not x else [x[0], *f(x[1:])]"),
    "closure": program("t = 0\ndef add(v):\n    nonlocal t\n    t += v\n    return t\nreturn [add(v) for v in x]"),
    "exception": program("try:\n    return x[99]\nexcept IndexError:\n    return None"),
    "state between calls": "seen = []\ndef f(x):\n    seen.extend(x)\n    return list(seen)\n",
    "imports": "import math, itertools, collections, re, functools, operator, heapq, bisect, string\n"
    + program("return [math.gcd(*x[:2]) if len(x) > 1 else 0, functools.reduce(operator.add, x, 0)]"),
    "class": "class C:\n    def __init__(self, v): self.v = v\n" + program("return sum(C(v).v for v in x)"),
    "generator": "def g(x):\n    yield from x\n" + program("return list(g(x))"),
    "set of str": program("return sorted({str(v) for v in x})"),
    "plain values": program("return {'a': [None, True, 1.5, 'é\\ud800', -3, 10**300], 'b': {}}"),
    "prints": program("print(x, flush=True)\nreturn len(x)"),
    "wide": program("return sum(range(10_000)) + len([0] * 500_000)"),
    "lambda": "f = lambda x: x[::-1]\n",
    "walrus": program("t = 0\nreturn [t := t + v for v in x]"),
    "deletes": program("del x[:1]\nreturn x"),
}  # fmt: skip
INPUTS = [[], [3], [2, -1, 2], list(range(9, 0, -1))]


def plainly(source: str) -> list[Any]:
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return [namespace["f"](json.loads(json.dumps(value))) for value in INPUTS]


@pytest.mark.parametrize("count", [1, len(SAFE)], ids=["alone", "together"])
def test_safe_programs_give_what_they_give_elsewhere(sandbox: Sandbox, count: int) -> None:
    sources = list(SAFE.values())
    outcomes = [
        o for begin in range(0, len(sources), count) for o in sandbox.run(sources[begin : begin + count], INPUTS)
    ]
    for name, source, outcome in zip(SAFE, sources, outcomes, strict=True):
        assert outcome == Outcome("ran", tuple(plainly(source))), name
        assert json.dumps(outcome.outputs) == json.dumps(plainly(source)), name


def test_many_programs_come_back_in_order() -> None:
    """Two workers, good and bad programs mixed, long ones between them."""
    sources, expected = [], []
    for number in range(300):
        kind = number % 7
        filler = f"# {'x' * (6000 if number % 50 == 0 else 0)}\n"
        body = "return x[" if kind == 3 else f"import re\nreturn {number}" if kind == 5 else f"return {number}"
        sources.append(filler + program(body if kind != 6 else "return x.nothing"))
        expected.append({3: "syntax", 6: "error"}.get(kind, number))
    with Sandbox(workers=2) as pool:
        outcomes = pool.run(sources, [[1]])
    assert [o.outputs[0] if o.status == "ran" else o.status for o in outcomes] == expected


def test_what_does_not_run_says_why(sandbox: Sandbox) -> None:
    cases = {
        "def f(x:": ("syntax", "SyntaxError"),
        "def f(x):\n    return '\0'\n": ("syntax", "null bytes"),
        "return 1": ("syntax", "outside function"),
        "x = 1": ("error", "KeyError: 'f'"),
        program("return x[9]"): ("error", "IndexError"),
        program("return (1, 2)"): ("error", "of type tuple"),
        program("return [1, {2}]"): ("error", "of type set"),
        program("return {1: 2}"): ("error", "key of type int"),
        program("return float('nan')"): ("error", "of type float"),
        program("return 10 ** 5000"): ("error", "over 1,000 digits"),
        program("x.append(x)\nreturn x"): ("error", "RecursionError"),
        program("return b''"): ("error", "of type bytes"),
    }
    for source, outcome in zip(cases, sandbox.run(list(cases), [[1]]), strict=True):
        status, why = cases[source]
        assert (outcome.status, outcome.outputs) == (status, ()), source
        assert why in outcome.detail, source


def test_every_call_gets_its_own_copy_of_the_input(sandbox: Sandbox) -> None:
    shared = [1, 2]
    assert run_one(sandbox, program("x.append(3)\nreturn x"), shared, shared).outputs == ([1, 2, 3], [1, 2, 3])
    assert shared == [1, 2]


# ------------------------------------------------------------------------------------------------ escape attempts


def attempt(body: str, folder: Path) -> str:
    """A program that gives "escaped" if `body` raises nothing, "stopped" if it raises anything."""
    names = f"SECRET, VICTIM, SCRATCH = {[str(folder / name) for name in ('secret', 'victim', 'scratch')]}\n"
    tried = (
        "try:\n"
        + textwrap.indent(body, "    ")
        + "\nexcept BaseException as e:\n    return 'stopped'\nreturn 'escaped'"
    )
    return names + program(tried)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder open to everyone, so that it is not the files' modes that stop an attempt."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "secret").write_text("hidden")
        (folder / "victim").write_text("precious")
        (folder / "scratch").mkdir()
        for path in (folder, *folder.iterdir()):
            path.chmod(0o777)
        yield folder


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_are_stopped(sandbox: Sandbox, name: str, folder: Path) -> None:
    outcome = run_one(sandbox, attempt(ESCAPES[name], folder))
    assert outcome == Outcome("ran", ("stopped",))
    assert (folder / "victim").read_text() == "precious"
    assert not list((folder / "scratch").iterdir())
    assert run_one(sandbox, GOOD).outputs == ([1, 2],)


UNCONFINED = """
import json, os, sys
for name, source in json.load(sys.stdin).items():
    if os.fork() == 0:
        os.setpgid(0, 0)
        namespace = {}
        exec(source, namespace)
        open(namespace["VICTIM"], "w")
        print(name, namespace["f"]([]), sep=": ", flush=True)
        os._exit(0)
    os.wait()
"""


def test_the_attempts_are_real(folder: Path) -> None:
    """Outside the sandbox each of them works, so it is the sandbox that stops them."""
    real = {name: attempt(body, folder) for name, body in ESCAPES.items() if name != "become another program"}
    command = [sys.executable, "-c", UNCONFINED]
    ran = subprocess.run(command, input=json.dumps(real), capture_output=True, text=True, timeout=60, check=True)
    escaped = {line.split(": ")[0] for line in ran.stdout.splitlines() if line.endswith(": escaped")}
    refused_in_containers = {
        "leave the namespace",
        "open a netlink socket",
        "look into the parent",
        "import from a file",
    }
    assert set(real) - escaped <= refused_in_containers


# --------------------------------------------------------------------------------------------------- exhaustion


@pytest.mark.parametrize("name", EXHAUSTION)
def test_exhaustion_is_stopped(sandbox: Sandbox, name: str) -> None:
    """In the company of good programs, which do not suffer."""
    source, status = EXHAUSTION[name]
    before, bad, after = sandbox.run([GOOD, source, GOOD], [[2, 1]])
    assert before.outputs == after.outputs == ([1, 2],)
    assert bad.status == status or (status is None and bad.status != "ran")


# ------------------------------------------------------------------------------------------------------ forgery


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_answers_count_for_nothing(sandbox: Sandbox, name: str) -> None:
    assert run_one(sandbox, FORGERIES[name]).status in ("killed", "error", "timeout")
    assert run_one(sandbox, GOOD).outputs == ([1, 2],)


@pytest.mark.parametrize("name", SABOTAGE)
def test_no_program_changes_the_verdict_on_another(sandbox: Sandbox, name: str) -> None:
    for _ in range(2):  # one that runs beside it, and one after it in the same worker
        assert sandbox.run([SABOTAGE[name], GOOD, GOOD], [[2, 1]])[1:] == [Outcome("ran", ([1, 2],))] * 2


def test_a_program_finds_nothing_but_its_own(sandbox: Sandbox) -> None:
    """Neither what the caller expects, nor other programs and what they answered."""
    expected = "expected-output"  # in this process's memory, where the search would find it
    assert run_one(sandbox, program("return x * 50 + ['earlier-answer']")).outputs[0][-1] == "earlier-answer"
    own, other = sandbox.run([program(SEARCH) + "# own-marker\n", GOOD + "# other-program\n"], [[2, 1]])
    assert other.status == "ran"
    assert own.outputs == ([False, False, False, True],), expected


# ---------------------------------------------------------------------------------------------- sharing a child


@pytest.mark.parametrize("source", [s for s in HARMFUL if not s.startswith("type ") or sys.version_info >= (3, 12)])
def test_what_could_do_harm_does_not_share_a_child(source: str) -> None:
    assert not harmless(ast.parse(source))


def test_programs_of_the_corpus_share_a_child() -> None:
    written = [v.text for idiom in CodeConfig.large().idioms for form in variants(idiom) for v in form]
    assert all(harmless(ast.parse(f"def f(x):\n    {text}return x\n")) for text in written)


# --------------------------------------------------------------------------------------------------- the pool


def group_of(sandbox: Sandbox) -> int:
    """Process group of a pool's only worker."""
    return sandbox._workers[0]._process.pid


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stuck"])
def test_a_lost_worker_is_replaced(sign: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program it was at scores as killed; the others get their verdict from the next worker."""
    with Sandbox(workers=1, limits=Limits(wall_seconds=3)) as pool:
        monkeypatch.setattr(pool._workers[0], "PATIENCE", 0.5)  # of this one alone: the next may start slowly
        first = group_of(pool)
        threading.Timer(0.3, lambda: os.killpg(first, sign)).start()
        slow = "import time\n" + program("time.sleep(2.8)")
        outcomes = pool.run([slow, *[f"import re\n{GOOD}"] * 9], [[2, 1]])
        assert group_of(pool) != first
    assert [o.status for o in outcomes] == ["killed"] + ["ran"] * 9
    assert outcomes[0].detail == "its worker died"


def test_a_worker_that_died_while_idle_is_replaced() -> None:
    with Sandbox(workers=1) as pool:
        os.killpg(group_of(pool), signal.SIGKILL)
        assert pool.run([GOOD] * 40, [[2, 1]])[-1].outputs == ([1, 2],)


def running(group: int) -> bool:
    """Whether a process group has a process; one that has ended and waits to be reaped is none."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            state, _, its_group = file.read_text().rpartition(") ")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


def gone(group: int) -> bool:
    """Whether a process group has no process any more, or soon has none."""
    deadline = time.monotonic() + 30
    while running(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not running(group)


def test_closing_ends_every_process() -> None:
    with Sandbox(workers=1) as pool:
        group = group_of(pool)
        assert running(group)
    assert gone(group)
    with pytest.raises(InternalRLError, match="closed; make a new one"):
        pool.run([GOOD], [[1]])


def test_workers_end_with_their_caller() -> None:
    """Also when it is killed and can close nothing."""
    script = "from internalrl.domains.code.sandbox.sandbox import Sandbox\npool = Sandbox(workers=1)\n"
    script += "print(pool._workers[0]._process.pid, flush=True)\nimport os; os.kill(os.getpid(), 9)\n"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert gone(int(ran.stdout))


def test_an_interrupted_run_leaves_no_stale_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with Sandbox(workers=1) as pool:
        monkeypatch.setattr(module._Worker, "collect", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pool.run([GOOD], [[1]])
        with pytest.raises(InternalRLError, match="closed"):
            pool.run([GOOD], [[1]])


@pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")
def test_bubblewrap_is_used_where_it_works() -> None:
    with Sandbox(workers=1) as pool:
        assert pool.run([GOOD], [[2, 1]])[0].outputs == ([1, 2],)
        assert "bubblewrap" in pool.isolation


def test_bubblewrap_that_does_not_work_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with Sandbox(workers=1) as pool:
        assert "bubblewrap" not in pool.isolation
        assert pool.run([GOOD], [[2, 1]])[0].outputs == ([1, 2],)


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"cpu_seconds": 0}, "cpu_seconds is 0; give a positive number"),
        ({"wall_seconds": float("nan")}, "wall_seconds is nan; give a positive"),
        ({"memory_mb": -1}, "memory_mb is -1; give a positive"),
        ({"output_bytes": 10**6}, "output_bytes is 1000000; give 131072 at most"),
    ],
)
def test_impossible_limits_are_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(InternalRLError, match=message):
        Limits(**limits)


def test_a_pool_of_nobody_is_refused() -> None:
    with pytest.raises(InternalRLError, match="0 workers; give 1 or more"):
        Sandbox(workers=0)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [([{1}], "not plain data"), ([float("inf")], "not plain data"), (["x" * 40_000], "bytes; give fewer")],
)
def test_inputs_that_cannot_be_sent_are_refused(sandbox: Sandbox, inputs: list[Any], message: str) -> None:
    with pytest.raises(InternalRLError, match=message):
        sandbox.run([GOOD], inputs)
    assert run_one(sandbox, GOOD).outputs == ([1, 2],)


def test_the_longest_request_gets_through(sandbox: Sandbox) -> None:
    inputs = ['"\\' * 8_000]  # every character is escaped twice on the way
    long = f"# {'x' * (PROGRAM_BYTES - 50)}\n" + program("return len(x)")
    assert sandbox.run([long], inputs) == [Outcome("ran", (16_000,))]
    large = Limits(output_bytes=131072)
    with Sandbox(workers=1, limits=large) as pool:
        assert pool.run([program("return 'a' * 131000")], [1])[0].outputs == ("a" * 131000,)


def test_where_programs_cannot_be_confined_none_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = module.WORKER.replace("main(", "import os; os.uname = lambda: type('U', (), {'machine': 'vax'}); main(")
    monkeypatch.setattr(module, "WORKER", refusing)
    with pytest.raises(InternalRLError, match="no list of system calls for the processor architecture vax"):
        Sandbox()
    monkeypatch.setattr(module, "WORKER", "raise SystemExit")
    with pytest.raises(InternalRLError, match="ended at once"):
        Sandbox()
