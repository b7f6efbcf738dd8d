"""A pool of processes that really runs programs written by a model, and survives whatever they do.

    with Sandbox() as sandbox:
        outcomes = sandbox.run(["def f(x):\n    return x[::-1]\n"], inputs=[[1, 2], [3]])

A program is run to learn its outputs, nothing else. What they should be never enters the pool: the caller compares.
So a program that takes over its own process can change what it answers, and nothing more. worker.py has how
a program is confined, docs/code.md what that does and does not promise.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from internalrl.errors import InternalRLError

PROGRAM_BYTES, INPUT_BYTES = 64 * 1024, 32 * 1024
"""The longest program, and the most that all inputs may take, as JSON."""

TOGETHER = 16
"""Programs that share a child process if they are harmless; starting one costs more than running these."""

BUBBLEWRAP = ("--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc")
"""Options of bwrap: every namespace of its own, all files read-only."""

FOLDER = str(Path(__file__).parent)

WORKER = """
import json, sys, types
package = "internalrl.domains.code.sandbox"
while package:  # not the packages themselves: those import much more
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = [sys.argv[1]]
    package = package.rpartition(".")[0]
from internalrl.domains.code.sandbox.worker import main
main(int(sys.argv[2]), json.loads(sys.argv[3]))
"""
"""What a worker's interpreter runs; it gets `FOLDER`, its end of the socket, and its options."""

Status = Literal["ran", "syntax", "error", "timeout", "killed"]


@dataclass(frozen=True)
class Limits:
    """What one program may use. InternalRLError where a limit is not a positive number, or too large."""

    cpu_seconds: float = 0.5
    """Processor time; a busy machine does not change the verdict of a program that computes."""
    wall_seconds: float = 3.0
    """Time on the clock, against programs that sleep or wait; generous, since other processes may hold the cores."""
    memory_mb: float = 64.0
    """Address space beyond what the interpreter itself takes, in MiB."""
    output_bytes: int = 65536
    """Length of all outputs together, as JSON; at most 131072."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < math.inf:
                raise InternalRLError(f"The sandbox limit {name} is {value}; give a positive number.")
        if self.output_bytes > 131072:  # it has to fit into one packet
            raise InternalRLError(f"The sandbox limit output_bytes is {self.output_bytes}; give 131072 at most.")


@dataclass(frozen=True)
class Outcome:
    """What became of one program."""

    status: Status
    """`ran`: it answered every input; `syntax`: it does not parse; `error`: it raised, or answered with something other
    than plain data; `timeout`: out of processor time or time; `killed`: it ended, or was ended, without an answer."""
    outputs: tuple[Any, ...] = ()
    """If it `ran`, one per input: None, bool, int, finite float, str, or list or dict (with str keys) of those."""
    detail: str = ""
    """Otherwise why, in words of the program's own process."""


class Sandbox:
    """`workers` processes, started at once; use it as a context manager, or `close` it. Not for several threads."""

    def __init__(self, workers: int = 2, limits: Limits | None = None) -> None:
        """InternalRLError where programs cannot be confined: the sandbox needs Linux with seccomp, x86-64 or arm64."""
        if workers < 1:
            raise InternalRLError(f"The sandbox was given {workers} workers; give 1 or more.")
        self.limits = limits or Limits()
        self._workers: list[_Worker] = []
        try:
            self._workers.append(_first_worker(self.limits))
            while len(self._workers) < workers:
                self._workers.append(_Worker(self.limits, self._workers[0].wrapper))
        except BaseException:
            self.close()
            raise
        self.isolation: tuple[str, ...] = self._workers[0].isolation
        """The measures in force here, in words, beside the limits on system calls and resources."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def run(self, programs: Sequence[str], inputs: Sequence[Any], function: str = "f") -> list[Outcome]:
        """Run each program, then call its `function` with each of `inputs`, in order; one outcome per program.

        A program is executed once, in a fresh namespace, and every call gets its own copy of the input. `inputs` are
        plain data, the same for all programs (tuples arrive as lists). Whatever a program does is an outcome;
        InternalRLError only for inputs that are not plain or too long, or where the pool cannot be restarted, which
        closes it.
        """
        if not self._workers:
            raise InternalRLError("This sandbox is closed; make a new one.")
        batch = _Batch(programs, inputs, function, self.limits)
        try:
            with selectors.DefaultSelector() as selector:
                for number, worker in enumerate(self._workers):
                    selector.register(worker.connection, selectors.EVENT_READ, number)
                while batch.waiting or any(worker.sent for worker in self._workers):
                    for worker in self._workers:
                        worker.fill(batch)
                    for key, _ in selector.select(timeout=1.0):
                        self._workers[key.data].collect(batch)
                    for number, worker in enumerate(self._workers):
                        if worker.lost:
                            selector.unregister(worker.connection)
                            self._workers[number] = worker.replace(batch)
                            selector.register(self._workers[number].connection, selectors.EVENT_READ, number)
        except BaseException:  # answers to what this call has sent must not meet the next one
            self.close()
            raise
        return batch.outcomes


class _Batch:
    """The programs of one `run`: groups that wait to be sent, and the outcomes so far."""

    def __init__(self, programs: Sequence[str], inputs: Sequence[Any], function: str, limits: Limits) -> None:
        try:
            text = json.dumps(list(inputs), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InternalRLError(
                f"The inputs are not plain data ({error}); use numbers, strings, lists and dicts."
            ) from None
        if len(text) > INPUT_BYTES:
            raise InternalRLError(f"The inputs take {len(text)} bytes; give fewer or shorter ones, to {INPUT_BYTES}.")
        self._task = {"function": function, "inputs": text}
        self._count, self._limits = len(inputs), limits
        self._sources = [json.dumps(program) for program in programs]
        self.outcomes = [Outcome("error", detail=f"it takes more than {PROGRAM_BYTES} bytes")] * len(programs)
        fitting = [index for index, source in enumerate(self._sources) if len(source) <= PROGRAM_BYTES]
        short = [index for index in fitting if len(self._sources[index]) <= PROGRAM_BYTES // TOGETHER]
        self.waiting = deque(tuple(short[begin : begin + TOGETHER]) for begin in range(0, len(short), TOGETHER))
        self.waiting.extend((index,) for index in sorted(set(fitting) - set(short)))

    def request(self, group: tuple[int, ...]) -> bytes:
        """The packet for a group; see worker.py."""
        sources = ", ".join(self._sources[index] for index in group)
        return f'{json.dumps(self._task)[:-1]}, "sources": [{sources}]}}'.encode()

    def answered(self, group: tuple[int, ...], packet: bytes) -> None:
        """Take a worker's packet. What follows its first byte is by the programs' own process: trust none of it."""
        kind, message = packet[:1], packet[1:]
        try:
            answers = json.loads(message, parse_constant=_refuse) if kind == b"M" else None
        except (ValueError, RecursionError):
            answers = None
        if not isinstance(answers, list) or len(answers) != len(group):
            limits = self._limits
            self.failed(group, {
                b"T": Outcome("timeout", detail=f"over {limits.cpu_seconds} s of processor or {limits.wall_seconds} s"),
                b"L": Outcome("killed", detail=f"its outputs take more than {limits.output_bytes} bytes"),
            }.get(kind, Outcome("killed", detail="it ended without an answer")))  # fmt: skip
            return
        for index, answer in zip(group, answers, strict=True):
            if answer is None and len(group) > 1:
                self.waiting.append((index,))
            else:
                self.outcomes[index] = _outcome(answer, self._count)

    def failed(self, group: tuple[int, ...], outcome: Outcome) -> None:
        """Their process came to nothing: `outcome`, if it was one program; several are tried again, each alone."""
        if len(group) == 1:
            self.outcomes[group[0]] = outcome
        else:
            self.waiting.extend((index,) for index in group)


def _outcome(answer: Any, count: int) -> Outcome:
    """The outcome of one program from what its own process says; `count` outputs are expected."""
    match answer:
        case {"outputs": list(outputs)} if len(outputs) == count:
            return Outcome("ran", outputs=tuple(outputs))
        case {"syntax": str(why)}:
            return Outcome("syntax", detail=why)
        case {"error": str(why)}:
            return Outcome("error", detail=why)
    return Outcome("killed", detail="its answer makes no sense")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


class _Worker:
    """One worker process, and the groups of programs it has not answered yet; it answers in order."""

    AHEAD = 4
    """Groups sent before the first is answered: enough for the worker never to wait for the caller."""
    PATIENCE = 30.0
    """Seconds without an answer, beyond the time a program may take, after which the worker itself is given up."""

    def __init__(self, limits: Limits, wrapper: tuple[str, ...] = ()) -> None:
        """Start it, with the command `wrapper` in front; InternalRLError if it cannot confine programs."""
        self.limits, self.wrapper = limits, wrapper
        self.sent: deque[tuple[int, ...]] = deque()
        self._heard, self._gone = 0.0, False
        self.connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        options = json.dumps({**asdict(limits), "request_bytes": 2 * PROGRAM_BYTES + INPUT_BYTES})
        with other:
            self._process = subprocess.Popen(
                [*wrapper, sys.executable, "-s", "-S", "-P", "-c", WORKER, FOLDER, str(other.fileno()), options],
                env={"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},  # a set of str has one order, always
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the caller
            )
        try:
            self.isolation = self._greeting()
        except BaseException:
            self.kill()
            raise

    def _greeting(self) -> tuple[str, ...]:
        """The worker's first message: how it is isolated."""
        self.connection.settimeout(self.PATIENCE)
        try:
            greeting = json.loads(self.connection.recv(4096) or b'{"error": "its worker process ended at once"}')
        except OSError as error:
            greeting = {"error": str(error)}
        self.connection.settimeout(None)
        if "error" in greeting:
            raise InternalRLError(
                f"Programs cannot be confined here ({greeting['error']}); the sandbox needs Linux with seccomp on "
                "x86-64 or arm64."
            )
        return (*(["bubblewrap"] if self.wrapper else []), *greeting["isolation"])

    def fill(self, batch: _Batch) -> None:
        """Send what the worker can take without making the caller wait."""
        while batch.waiting and len(self.sent) < self.AHEAD:
            try:
                self.connection.send(batch.request(batch.waiting[0]), socket.MSG_DONTWAIT)
            except OSError:  # full: later; broken: `collect` will see it, after the answers still on their way
                return
            if not self.sent:
                self._heard = time.monotonic()
            self.sent.append(batch.waiting.popleft())

    def collect(self, batch: _Batch) -> None:
        """Take one answer, which is there."""
        try:
            packet = self.connection.recv(self.limits.output_bytes + 2)
        except ConnectionError:  # told before what is still to be read
            return
        if packet:
            self._heard = time.monotonic()
            batch.answered(self.sent.popleft(), packet)
        else:
            self._gone = True

    @property
    def lost(self) -> bool:
        """Whether the process is gone, or stuck."""
        due = self._heard + self.limits.wall_seconds + self.PATIENCE
        return self._gone or (bool(self.sent) and time.monotonic() > due)

    def replace(self, batch: _Batch) -> _Worker:
        """A new worker; the programs after those that this one was at wait again."""
        self.kill()
        if self.sent:
            batch.failed(self.sent.popleft(), Outcome("killed", detail="its worker died"))
        batch.waiting.extendleft(reversed(self.sent))
        return _Worker(self.limits, self.wrapper)

    def kill(self) -> None:
        """End the process and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()


def _first_worker(limits: Limits) -> _Worker:
    """A worker inside bubblewrap, where that is installed and works; otherwise one without."""
    bubblewrap = shutil.which("bwrap")
    if bubblewrap:
        with contextlib.suppress(InternalRLError):
            return _Worker(limits, (bubblewrap, *BUBBLEWRAP))
    return _Worker(limits)
