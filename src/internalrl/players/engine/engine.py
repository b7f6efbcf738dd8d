"""The engine: steered sequences with different adapters, codes and temperatures, decoded together.

One background thread runs the base; whoever asks, a server, a test or a notebook, submits requests and reads streams.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from internalrl.base.fingerprint import base_fingerprint
from internalrl.base.residual import find_blocks
from internalrl.controller.adapter import Adapter, load_adapter
from internalrl.controller.choosers import Drawn, Given, row_seeds
from internalrl.controller.generate import chooser, per_segment
from internalrl.controller.steering import Share
from internalrl.errors import InternalRLError
from internalrl.players.engine.bases import check_base
from internalrl.players.engine.checks import check_request
from internalrl.players.engine.group import Group
from internalrl.players.engine.memory import SHARE, free_bytes
from internalrl.players.engine.pace import Pace
from internalrl.players.engine.requests import Finished, Request, SegmentRecord
from internalrl.players.engine.rules import Rules
from internalrl.players.engine.running import Running
from internalrl.players.engine.sampling import Chance
from internalrl.players.engine.sequence import Sequence
from internalrl.players.engine.stream import Stream, deliver
from internalrl.players.engine.trays import capacity
from internalrl.settings.ranges import Checked, Count, Natural, Positive
from internalrl.strategies.limits import Limits

__all__ = ["Busy", "Engine", "EngineConfig", "Stats", "Stream"]

log = logging.getLogger(__name__)


class Busy(InternalRLError):  # noqa: N818 (the client did nothing wrong)
    """All slots are taken and the queue is full; ask again later."""


@dataclass(frozen=True)
class EngineConfig(Checked):
    """Sizes of the engine."""

    slots: Count = 64
    """Sequences that are decoded together."""
    queue: Natural = 192
    """Requests that may wait for a slot; more are refused with `Busy`."""
    prefill: Count = 512
    """Most prompt tokens that are read in a forward pass; fewer while answers wait for it."""
    context: Count | None = None
    """Most tokens of a sequence, prompt and answer; by default, and at most, the base's context."""
    memory: Positive | None = None
    """GiB for keys and values; by default half of what is free when the engine starts."""


@dataclass(frozen=True)
class Stats:
    """What the engine is doing, and has done since it was started.

    Attributes:
        running, waiting: requests in a slot, and in the queue.
        memory: bytes of keys and values.
        requests, tokens, segments: finished requests, generated tokens, segments that ended.
        violations: segments to which the limits objected.
        errors: requests that ended with an error.
    """

    running: int = 0
    waiting: int = 0
    memory: int = 0
    requests: int = 0
    tokens: int = 0
    segments: int = 0
    violations: int = 0
    errors: int = 0


@dataclass
class _Served:
    """An adapter and its limits."""

    adapter: Adapter
    limits: Limits | None


class Engine:
    """Decodes what is submitted, all of it together; results do not depend on what else is running.

    Every method may be called from any thread. While the engine lives, nobody else may run `base`.

    Args:
        base: a causal language model with a plain key-value cache, on its device; it is not changed.
        tokenizer: belongs to the base.
        on_segment: called from the engine's thread with the request and each segment that has ended, for all of them
            before the request's Finished event is delivered. It must be quick.

    Raises:
        InternalRLError: rows of this base's cache cannot come and go (sliding windows, recurrent states), or its
            generation_config asks for what the engine does not do.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EngineConfig | None = None,
        on_segment: Callable[[Request, SegmentRecord], None] | None = None,
    ):
        self.base, self.tokenizer, self.config = base.requires_grad_(False).eval(), tokenizer, config or EngineConfig()
        text = base.config.get_text_config(decoder=True)
        contexts = self.config.context, getattr(text, "max_position_embeddings", None)
        self.context: int | None = min((length for length in contexts if length is not None), default=None)
        self._vocabulary: int = text.vocab_size
        self._ends = {*_numbers(base.generation_config.eos_token_id), *_numbers(tokenizer.eos_token_id)}
        self._way, self._shape = check_base(base, self.context)
        memory = SHARE * free_bytes(base.device) if self.config.memory is None else self.config.memory * 2**30
        self._memory = int(memory / self._shape.bytes)  # in tokens
        self._rules = Rules(base)
        base_fingerprint(base)  # it is remembered, and adapters are quick to load
        self._on_segment = on_segment
        self._adapters: dict[str, _Served] = {}
        self._waiting: deque[Sequence] = deque()
        self._live: list[Sequence] = []  # out of the queue, and not finished
        self._pace = Pace(self.config.prefill)
        self._running = self._none_running()
        self._open = 0  # accepted requests that have not finished
        self._closed = False
        self._counts = dict.fromkeys(("requests", "tokens", "segments", "violations", "errors"), 0)
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- adapters -----------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """Keys of the adapters that requests can name."""
        return tuple(self._adapters)

    def add_adapter(self, key: str, adapter: Adapter | str | Path, limits: Limits | None = None) -> None:
        """Serve one more adapter of the base: the adapter itself, or its folder. The base is not copied.

        Args:
            limits: consulted at every segment that opens; see `metacontroller.limits.Limits`.

        Raises:
            InternalRLError: the key is taken, or the adapter does not belong to this base.
        """
        if key in self._adapters:
            raise InternalRLError(f"There is an adapter {key!r} already; remove it first, or choose another key.")
        if not isinstance(adapter, Adapter):
            adapter = load_adapter(self.base, adapter)
        elif adapter.tap.blocks is not find_blocks(self.base):
            raise InternalRLError(f"Adapter {key!r} was made on another model than the engine's base.")
        adapter.requires_grad_(False).eval().to(self.base.device)
        with self._change:
            self._adapters = {**self._adapters, key: _Served(adapter, limits)}

    def remove_adapter(self, key: str) -> None:
        """Refuse new requests for the adapter from now on; those that were accepted finish on it."""
        with self._change:
            self._served(key)
            self._adapters = {name: served for name, served in self._adapters.items() if name != key}

    def _served(self, key: str) -> _Served:
        served = self._adapters.get(key)
        if served is None:
            raise InternalRLError(f"There is no adapter {key!r}; known are {', '.join(self._adapters) or 'none'}.")
        return served

    # -- requests -----------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Queue a request; its events come through the stream.

        Raises:
            InternalRLError: it asks for what cannot be served, told in one sentence.
            Busy: all slots are taken and the queue is full.
        """
        request = self._rules.complete(request)
        check_request(request, self._vocabulary, self.context)
        if request.seed is None:
            request = replace(request, seed=secrets.randbits(62))
        assert request.seed is not None
        # The code's seed is what `generate` makes of such a generator; the second number is of the tokens.
        source = torch.Generator().manual_seed(request.seed)
        [code_seed], [token_seed] = row_seeds([source], 1), row_seeds([source], 1)
        group, limits = None, None
        if request.adapter is not None:
            served = self._served(request.adapter)
            if request.steering != "off":
                group, limits = _group(served, request, code_seed), served.limits
        room = request.max_tokens if self.context is None else self.context - len(request.prompt)
        most = min(request.max_tokens, room)
        sequence = Sequence(
            Stream(request),
            most,
            self._ends,
            self.tokenizer,
            group,
            limits,
            Chance(token_seed),
            self._rules.rule(request.prompt, most),
            self._segment_ended,
        )
        if self._size(sequence) > self._memory:
            raise InternalRLError(
                f"Prompt and answer may come to {sequence.tokens} tokens, but there is memory for {self._memory}; ask "
                "for fewer."
            )
        with self._change:
            if self._closed:
                raise InternalRLError("The engine is closed; start another one.")
            if self._open >= self.config.slots + self.config.queue:
                raise Busy(
                    f"All {self.config.slots} slots are taken and {self.config.queue} requests are waiting; "
                    "try again later."
                )
            self._open += 1
            self._waiting.append(sequence)
            self._change.notify()
        return sequence.stream

    def stats(self) -> Stats:
        """Counters; no lock is taken."""
        waiting = len(self._waiting)
        memory = self._running.tokens * self._shape.bytes
        return Stats(running=max(self._open - waiting, 0), waiting=waiting, memory=memory, **self._counts)

    def close(self) -> None:
        """Stop: running and waiting requests end as cancelled. Also at the end of a `with` block."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the engine's thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.no_grad():
            while self._wait():
                try:
                    self._drop_cancelled()
                    self._admit()
                    self._step()
                except Exception as error:
                    log.error("A step of the engine failed; the requests in its slots end.", exc_info=error)
                    for sequence in self._live:
                        sequence.fail(error)
                    self._running = self._none_running()
                self._deliver()
        self._live.extend(self._waiting)
        self._waiting.clear()
        for sequence in self._live:
            sequence.finish("cancelled")
        self._deliver()

    def _wait(self) -> bool:
        """Sleep while there is nothing to do. False once the engine is closed."""
        with self._change:
            while not (self._closed or self._waiting or self._live):
                self._change.wait()
            return not self._closed

    def _drop_cancelled(self) -> None:
        with self._change:
            leaving = [sequence for sequence in self._waiting if sequence.stream.cancelled]
            for sequence in leaving:
                self._waiting.remove(sequence)
        self._live.extend(leaving)
        for sequence in self._live:
            if sequence.stream.cancelled:
                sequence.finish("cancelled")
        self._running.drop_finished()

    def _admit(self) -> None:
        """Give slots to those who have waited longest, as far as slots and memory go."""
        taken = sum(self._size(sequence) for sequence in self._live)
        while self._waiting and len(self._running) < self.config.slots:
            with self._change:
                if taken + self._size(self._waiting[0]) > self._memory:
                    return
                sequence = self._waiting.popleft()
            self._live.append(sequence)
            taken += self._size(sequence)
            self._running.add(sequence)

    def _step(self) -> None:
        running, began = len(self._running.sequences), time.perf_counter()
        read = self._running.step(self._pace.tokens(running))
        self._pace.passed(time.perf_counter() - began, running, read)
        self._running.drop_finished()

    def _size(self, sequence: Sequence) -> int:
        """Tokens that it may need memory for: what was admitted is never ended for want of it."""
        return capacity(sequence.tokens, self.context)

    def _none_running(self) -> Running:
        return Running(self._way, self._shape, self.config.slots, self.context)

    def _deliver(self) -> None:
        """Hand over the events of this turn; who has finished is forgotten."""
        events = [(sequence.stream, sequence.events) for sequence in self._live if sequence.events]
        ended = [new[-1] for _, new in events if isinstance(new[-1], Finished)]
        self._counts["tokens"] += sum(len(new) for _, new in events) - len(ended)
        self._counts["requests"] += len(ended)
        self._counts["errors"] += sum(end.reason == "error" for end in ended)
        for sequence in self._live:
            sequence.events = []
        self._live = [sequence for sequence in self._live if not sequence.finished]
        with self._change:  # before the news: who learns of an end finds the place free
            self._open -= len(ended)
        deliver(events)

    def _segment_ended(self, request: Request, record: SegmentRecord) -> None:
        self._counts["segments"] += 1
        self._counts["violations"] += record.violation is not None
        if self._on_segment is not None:
            self._on_segment(request, record)


def _numbers(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def _group(served: _Served, request: Request, seed: int) -> Group:
    """Steers the request as `SteeredModel.generate` would."""
    try:
        codes = None if request.codes is None else torch.tensor([request.codes], dtype=torch.float)
    except ValueError as error:
        raise InternalRLError("The codes differ in their size; give as many numbers for every segment.") from error
    share = Share(served.adapter, None)
    choose = chooser(share, request.steering, per_segment(codes, 1), request.code_temperature, [seed])
    assert isinstance(choose, Drawn | Given)
    return Group(served.adapter, choose, served.limits)
