"""The sequences in their slots: prompts are read, and answers grow by a token per forward pass of the base.

A pass is whole or did not happen: what it changes is taken over when its tokens are drawn. So one that fails, for
memory above all, can be tried again without the sequence that it failed for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from internalrl.controller.steering import open_taps
from internalrl.players.engine.group import Group
from internalrl.players.engine.memory import is_shortage
from internalrl.players.engine.packed import PackedBase, Pass
from internalrl.players.engine.sampling import Sampler
from internalrl.players.engine.separate import SeparateBase
from internalrl.players.engine.sequence import Sequence
from internalrl.players.engine.trays import Row, Shape, Trays

log = logging.getLogger(__name__)

FEW = 16
"""Tokens of a prompt that are read after a pass failed."""


@dataclass
class _Steered:
    """A group and its members."""

    group: Group
    members: list[Sequence]


@dataclass
class _Piece:
    """Tokens that a sequence reads in a pass, behind what is in its row."""

    sequence: Sequence
    row: Row
    tokens: list[int]

    @property
    def answered(self) -> bool:
        """Whether a token follows: the prompt is read."""
        return self.row.length + len(self.tokens) >= len(self.sequence.request.prompt)


class Running:
    """Sequences that are decoded together. What fails in one of them ends that one alone.

    Attributes:
        sequences: that get a token in every pass.
        reading: whose prompts are not read yet, the first first.
    """

    def __init__(self, way: PackedBase | SeparateBase, shape: Shape, slots: int, context: int | None):
        self.sequences: list[Sequence] = []
        self.reading: list[Sequence] = []
        self._way, self._device = way, shape.device
        self._trays = Trays(shape, slots, context)
        self._steered: dict[object, _Steered] = {}
        self._sampler: Sampler | None = None
        self._sampled: list[Sequence] = []  # by this sampler, in this order

    def __len__(self) -> int:
        """Slots that are taken."""
        return len(self.sequences) + len(self.reading)

    @property
    def tokens(self) -> int:
        """Tokens for whose keys and values there is memory."""
        return self._trays.tokens

    def add(self, sequence: Sequence) -> None:
        """Give a sequence a slot, and room for its prompt."""
        try:
            sequence.row = self._trays.row(len(sequence.request.prompt) + 1)
        except Exception as error:
            sequence.fail(error)
        else:
            self.reading.append(sequence)

    def step(self, most: int) -> int:
        """One more token for every sequence, and up to `most` of the prompts. Returns how many of these were read."""
        following, parts = self._following(), self._parts(self.reading, most)
        try:
            self._read([*following, *parts])
        except Exception as error:
            if not is_shortage(error) and not parts:
                raise
            log.warning("A pass failed, and is repeated in parts: %s", error)
            self._follow()
            parts = self._parts(self.reading[:1], FEW)
            try:
                self._read(parts)
            except Exception as worse:
                parts[0].sequence.fail(worse)
        return sum(len(part.tokens) for part in parts)

    def _follow(self) -> None:
        """One more token for every sequence that there is memory for."""
        while self.sequences:
            try:
                return self._read(self._following())
            except Exception as error:
                if not is_shortage(error):
                    raise
                max(self.sequences, key=lambda sequence: sequence.tokens).fail(error)
        return None

    def drop_finished(self) -> None:
        """Free the slots of sequences that have finished."""
        for sequence in [*self.sequences, *self.reading]:
            if sequence.finished and sequence.row is not None:
                self._trays.free(sequence.row)
                sequence.row = None
        self.sequences = [sequence for sequence in self.sequences if not sequence.finished]
        self.reading = [sequence for sequence in self.reading if not sequence.finished]
        for kind, steered in list(self._steered.items()):
            left = [at for at, sequence in enumerate(steered.members) if not sequence.finished]
            if not left:
                del self._steered[kind]
            elif len(left) < len(steered.members):
                steered.group.select(left)
                steered.members = [steered.members[at] for at in left]

    # -- a pass -------------------------------------------------------------------------------------------

    def _following(self) -> list[_Piece]:
        """The last tokens of all sequences. One for which there is no room is ended."""
        for sequence in self.sequences:
            row = _row(sequence)
            _guarded(sequence, self._trays.make_room, row, row.length + 1)
        self.drop_finished()
        return [_Piece(sequence, _row(sequence), [sequence.numbers[-1]]) for sequence in self.sequences]

    def _parts(self, sequences: Collection[Sequence], most: int) -> list[_Piece]:
        """The next tokens of prompts, `most` of them all together."""
        pieces = []
        for sequence in sequences:
            row = _row(sequence)
            tokens = sequence.request.prompt[row.length : row.length + most]
            most -= len(tokens)
            if tokens:
                pieces.append(_Piece(sequence, row, list(tokens)))
        return pieces

    def _read(self, pieces: list[_Piece]) -> None:
        """Read all of them, in one pass where the base can do that; each that ends in an answer gets a token."""
        for some in [pieces] if self._way.joint else [[piece] for piece in pieces]:
            if some:
                self._pass(some)

    def _pass(self, pieces: list[_Piece]) -> None:
        """If it raises, nothing has happened."""
        read = Pass([(piece.row, piece.tokens) for piece in pieces], self._device)
        columns = {piece.sequence: own for piece, own in zip(pieces, read.columns, strict=True)}
        groups = [(some, prompt) for some, prompt in self._groups(pieces) if some.members[0] in columns]
        answered = [at for at, piece in enumerate(pieces) if piece.answered]
        sequences = [pieces[at].sequence for at in answered]
        try:
            parts = [
                some.group.part(_numbers([columns[member] for member in some.members], self._device), prompt)
                for some, prompt in groups
            ]
            with open_taps(self._way.base, *parts):
                logits = self._way(read, answered)
            drawn = self._sampler_of(sequences)(logits, _ruled(sequences, logits)) if sequences else None
        except BaseException:
            for some, _ in groups:
                some.group.undo()
            raise
        read.keep()
        for some, _ in groups:
            for opening in some.group.finish():
                member = some.members[opening.row]
                _guarded(member, member.open, opening)
        if drawn is not None:
            for sequence, *token in zip(sequences, drawn.numbers, drawn.logprobs, drawn.tops, strict=True):
                if not sequence.finished:
                    _guarded(sequence, sequence.take, *token)
                if not sequence.finished and sequence in self.reading:
                    self._join(sequence)

    def _groups(self, pieces: list[_Piece]) -> list[tuple[_Steered, int]]:
        """Who is steered together, and how many columns of theirs are of a prompt that is only read."""
        alone = [
            (_Steered(group, [piece.sequence]), len(piece.sequence.request.prompt) - 1 - piece.row.length)
            for piece in pieces
            if (group := piece.sequence.group) is not None
        ]
        return [*((steered, 0) for steered in self._steered.values()), *alone]

    def _join(self, sequence: Sequence) -> None:
        """The prompt was read: from now on it gets a token in every pass."""
        self.reading.remove(sequence)
        self.sequences.append(sequence)
        group, sequence.group = sequence.group, None
        if group is None:
            return
        kind = group.kind if self._way.joint else sequence
        if kind in self._steered:
            self._steered[kind].group.join(group)
            self._steered[kind].members.append(sequence)
        else:
            self._steered[kind] = _Steered(group, [sequence])

    def _sampler_of(self, sequences: list[Sequence]) -> Sampler:
        if self._sampler is None or sequences != self._sampled:
            requests = [sequence.request for sequence in sequences]
            self._sampler = Sampler(requests, [sequence.chance for sequence in sequences], self._device)
            self._sampled = sequences
        return self._sampler


def _row(sequence: Sequence) -> Row:
    assert sequence.row is not None
    return sequence.row


def _ruled(sequences: list[Sequence], logits: Tensor) -> Tensor | None:
    """`logits` (B, V) by the sequences' rules; None where there are none."""
    if all(sequence.rule is None for sequence in sequences):
        return None
    rows = []
    for sequence, row in zip(sequences, logits.float().split(1), strict=True):
        assert sequence.rule is not None  # all are of one base
        tokens = torch.tensor([[*sequence.request.prompt, *sequence.numbers]], device=row.device)
        rows.append(sequence.rule(tokens, row))
    return torch.cat(rows)


def _numbers(columns: list[slice], device: torch.device) -> Tensor:
    return torch.tensor([number for own in columns for number in range(own.start, own.stop)], device=device)


def _guarded(sequence: Sequence, do: Callable[..., None], *args: Any) -> None:
    try:
        do(*args)
    except Exception as error:
        sequence.fail(error)
