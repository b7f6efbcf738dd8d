"""Keys and values of the running sequences, in memory that is as long as they are.

A row lies in a tray: a block of memory for several rows of one capacity, 64 tokens or 128 or 256 …. A row that outgrows
its tray is copied into one of the next size, and a row that leaves is replaced by the last one of its size, so that
what is not needed is given back:

    64    | a b c d e f g h | i j · · · · · · |
    128   | k l · · |
    2048  | m |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SMALLEST = 64
"""Tokens of the smallest row."""
TRAY = 2048
"""Tokens of a tray, all rows together, unless a single row is longer."""


@dataclass(frozen=True)
class Shape:
    """Of the keys and values that a base keeps of one token: (`blocks`, `heads`, `key` or `value`)."""

    blocks: int
    heads: int
    key: int
    value: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Of a token."""
        return self.blocks * self.heads * (self.key + self.value) * self.dtype.itemsize


def capacity(length: int, context: int | None) -> int:
    """Tokens of the row that has room for `length`, where none is longer than `context`."""
    size = max(SMALLEST, 1 << (length - 1).bit_length())
    return size if context is None else max(length, min(size, context))


class Row:
    """What one sequence has read: `length` tokens, at `place` in its `tray`."""

    def __init__(self, tray: Tray, place: int):
        self.tray, self.place, self.length = tray, place, 0


class Tray:
    """Keys and values (blocks, rows, heads, capacity, size). The first `used` columns of all rows are finite."""

    def __init__(self, shape: Shape, rows: int, capacity: int):
        size = shape.blocks, rows, shape.heads, capacity
        self.keys = torch.empty(*size, shape.key, dtype=shape.dtype, device=shape.device)
        self.values = torch.empty(*size, shape.value, dtype=shape.dtype, device=shape.device)
        self.capacity, self.room = capacity, rows
        self.rows: list[Row] = []
        self.used = 0

    def use(self, columns: int) -> None:
        """Make sure that the first `columns` are finite: what is masked must be, as 0 · nan is no 0."""
        if columns > self.used:
            # memory that was never touched is no memory yet
            end = min(self.capacity, -(-columns // SMALLEST) * SMALLEST)
            self.keys[..., self.used : end, :] = 0
            self.values[..., self.used : end, :] = 0
            self.used = end

    def place(self, row: Row, place: int) -> None:
        """Copy the content of `row` to a place of this tray."""
        self.use(row.length)
        for mine, theirs in ((self.keys, row.tray.keys), (self.values, row.tray.values)):
            mine[:, place, :, : row.length] = theirs[:, row.place, :, : row.length]
            mine[:, place, :, row.length : self.used] = 0
        row.tray, row.place = self, place


class Trays:
    """All rows of a base.

    Args:
        most: rows at a time; none of the trays has more.
        context: tokens of the longest row.
    """

    def __init__(self, shape: Shape, most: int, context: int | None = None):
        self.shape, self.most, self.context = shape, most, context
        self._trays: dict[int, list[Tray]] = {}

    @property
    def tokens(self) -> int:
        """Tokens for which there is memory."""
        return sum(tray.room * tray.capacity for trays in list(self._trays.values()) for tray in list(trays))

    def row(self, length: int) -> Row:
        """A new row with room for `length` tokens."""
        tray = self._with_room(length)
        row = Row(tray, len(tray.rows))
        self._put(row, tray)
        return row

    def make_room(self, row: Row, length: int) -> None:
        """Make sure that `row` has room for `length` tokens; where that fails, nothing has changed."""
        if length > row.tray.capacity:
            tray, old, place = self._with_room(length), row.tray, row.place
            self._put(row, tray)
            self._fill(old, place)

    def free(self, row: Row) -> None:
        """Give the memory of a row back."""
        self._fill(row.tray, row.place)

    def _with_room(self, length: int) -> Tray:
        """A tray for rows of this length with a place behind its last row; it may be a new one."""
        size = capacity(length, self.context)
        trays = self._trays.get(size)
        if trays and len(trays[-1].rows) < trays[-1].room:
            return trays[-1]
        return Tray(self.shape, max(1, min(self.most, TRAY // size)), size)

    def _put(self, row: Row, tray: Tray) -> None:
        tray.place(row, len(tray.rows))
        if not tray.rows:
            self._trays.setdefault(tray.capacity, []).append(tray)
        tray.rows.append(row)

    def _fill(self, tray: Tray, place: int) -> None:
        """Move the last row of this capacity to a place that became free."""
        trays = self._trays[tray.capacity]
        end = trays[-1]
        last = end.rows.pop()
        if not (end is tray and len(end.rows) == place):
            tray.place(last, place)
            tray.rows[place] = last
        if not end.rows:
            trays.pop()
