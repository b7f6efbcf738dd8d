"""One request on its way through the engine: its tokens, text and segments become events."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from internalrl.errors import InternalRLError
from internalrl.players.engine.group import Group, Opening
from internalrl.players.engine.memory import is_shortage
from internalrl.players.engine.requests import FAILED, NO_MEMORY, Event, Finished, Request, SegmentRecord, Token
from internalrl.players.engine.rules import Rule
from internalrl.players.engine.sampling import Chance
from internalrl.players.engine.stream import Stream
from internalrl.players.engine.text import Detokenizer, Stops
from internalrl.players.engine.trays import Row
from internalrl.strategies.limits import Limits

Reason = Literal["stop", "length", "cancelled", "error"]

log = logging.getLogger(__name__)


@dataclass
class _Open:
    """A segment that has not ended."""

    start: int
    opening: Opening
    log_probability: float = 0.0


class Sequence:
    """A request that the engine has accepted.

    Args:
        most: tokens that it may generate.
        ends: end-of-sequence tokens.
        group: of one row, which steers it; None for the bare base.
        chance: of its tokens.
        rule: changes the logits; None leaves them as they are.
        on_segment: told of every segment that has ended.

    Attributes:
        row: what the base has read of it, while it has a slot.
        numbers: of the tokens that it was given; the base has not read the last.
        events: not yet delivered.
        finished: whether it has ended.
    """

    def __init__(
        self,
        stream: Stream,
        most: int,
        ends: Collection[int],
        tokenizer: PreTrainedTokenizerBase,
        group: Group | None,
        limits: Limits | None,
        chance: Chance,
        rule: Rule | None,
        on_segment: Callable[[Request, SegmentRecord], None],
    ):
        self.stream, self.request = stream, stream.request
        self.most, self.ends, self.group, self.limits = most, ends, group, limits
        self.chance, self.rule, self.on_segment = chance, rule, on_segment
        self.row: Row | None = None
        self.numbers: list[int] = []
        self.finished = False
        self.events: list[Event] = []
        self.pieces: list[str] = []
        self.segments: list[SegmentRecord] = []
        self._length = 0
        self._open: _Open | None = None
        self._detokenizer = Detokenizer(tokenizer, self.request.prompt)
        self._stops = Stops(self.request.stop)

    @property
    def count(self) -> int:
        """Tokens that it was given."""
        return len(self.numbers)

    @property
    def tokens(self) -> int:
        """Most that prompt and answer may come to."""
        return len(self.request.prompt) + self.most

    def open(self, opening: Opening) -> None:
        """A segment begins with the next token; the one before has ended. The limits may end the answer with it."""
        if opening.error is not None:
            raise opening.error
        objection = self._close()
        if objection is not None and self.limits is not None and self.limits.on_outcome == "stop":
            self.finish("stop")
        else:
            self._open = _Open(self.count, opening)

    def take(self, number: int, logprob: float, top: tuple[tuple[int, float], ...]) -> None:
        """The next token; the sequence may end with it."""
        if not math.isfinite(logprob):
            raise InternalRLError("The base's output is not finite; codes that are smaller may help.")
        self.numbers.append(number)
        if self._open is not None:
            self._open.log_probability += logprob
        piece = self._detokenizer.add(number)
        start, self._length = self._length, self._length + len(piece)
        self.pieces.append(piece)
        text = self._stops.add(piece)
        told = self.request.logprobs is not None
        self.events.append(Token(number, text, start, logprob if told else None, top))
        if self._stops.found or number in self.ends:
            self.finish("stop")
        elif self.count >= self.most:
            self.finish("length")

    def fail(self, error: Exception) -> None:
        """End it because of `error`. Only a sentence that is meant for users is told to them; the log has the rest."""
        if is_shortage(error):
            log.warning("Request %s was ended: %s", self.request.id, error)
            self.finish("error", NO_MEMORY)
        elif isinstance(error, InternalRLError):
            self.finish("error", str(error))
        else:
            log.error("Request %s failed.", self.request.id, exc_info=error)
            self.finish("error", FAILED)

    def finish(self, reason: Reason, error: str | None = None) -> None:
        """End it: the last segment is told, then the last event."""
        if self.finished:
            return
        self.finished = True
        rest = ""
        if self.pieces and not self._stops.found:
            rest = self._detokenizer.rest()
            self.pieces[-1] += rest
            rest = self._stops.add(rest) + self._stops.rest()
        try:
            self._close()
        except Exception as failure:
            log.error("The last segment of request %s was lost.", self.request.id, exc_info=failure)
            reason, error = "error", FAILED
        self.events.append(Finished(reason, rest, tuple(self.segments), error))

    def _close(self) -> str | None:
        """Tell of the open segment, if there is one. Returns what the limits object to in the text so far."""
        ended, self._open = self._open, None
        if ended is None or ended.start == self.count:
            return None
        objection = None if self.limits is None else self.limits.objection("".join(self.pieces))
        opening = ended.opening
        violations = [text for text in (opening.violation, objection) if text]
        record = SegmentRecord(
            index=len(self.segments),
            start=ended.start,
            stop=self.count,
            code=opening.code,
            switch_probability=0.5 + 0.5 * math.tanh(opening.logit / 2),
            log_probability=ended.log_probability,
            text="".join(self.pieces[ended.start :]),
            strategy=opening.strategy,
            violation="; ".join(violations) or None,
        )
        self.segments.append(record)
        self.on_segment(self.request, record)
        return objection
