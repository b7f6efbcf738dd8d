"""Results as people read them: whatever somebody may copy, such as a key or an id, stands in one piece.

On a terminal a list of rows is a table where it fits, and otherwise a paragraph for each row. Everywhere else, in a
file or a pipe, every row is a line, however long. Machines get the same results as JSON.
"""

from __future__ import annotations

import errno
import os
import select
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

GAP = "  "
LONGEST_NAME = 16
"""Names up to this length have their values in one column: a key of 60 characters stands beside them."""
PIPE_CLOSED = 141
"""What a shell reports of a program whose reader has left."""


def print_results(title: str, results: Mapping[str, Any]) -> None:
    """Print the results of a command: single values by name, then every list of rows, with its columns' names.

    Columns that are empty in all rows are left out.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lists = {key: value for key, value in results.items() if _is_list_of_rows(value)}
    parts: list[list[str]] = []
    if single := {key: _cell(value) for key, value in _flat({k: v for k, v in results.items() if k not in lists})}:
        lines = _values(single, width)
        parts.append(lines if width is None else [title, *lines])
    for key, rows in lists.items():
        cells = [{name: _cell(value) for name, value in _flat(row)} for row in rows]
        names = dict.fromkeys(name for row in cells for name in row)
        filled = [name for name in names if any(row.get(name, "-") != "-" for row in cells)]
        lines = _table(filled, cells)
        if width is not None and max(map(_width, lines)) > width:
            lines = _paragraphs(filled, cells, width)
        parts.append(lines if width is None else [f"{key}:", *lines])
    text = "\n\n".join("\n".join(part) for part in parts)
    known = sys.stdout.encoding or "utf-8"
    print(text.encode(known, "backslashreplace").decode(known))


@contextmanager
def printing() -> Iterator[None]:
    """End the program in order where what is printed inside cannot be: SystemExit, without a traceback.

    Where the reader has left, as `head` does, that is what there is to say, with the exit code that shells know; where
    the disk is full, a sentence.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise
        _print_no_more()
        raise SystemExit(PIPE_CLOSED) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _print_no_more()
        print("internalrl: The disk is full, and results could not be printed; free some space.", file=sys.stderr)
        raise SystemExit(2) from None


def _reader_left() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _print_no_more() -> None:
    """What is still in the buffer must go somewhere when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_list_of_rows(value: Any) -> bool:
    """Whether a value of a summary is a table: rows with the same names."""
    rows = value if isinstance(value, list) else []
    return bool(rows) and all(isinstance(row, Mapping) and row.keys() == rows[0].keys() for row in rows)


def _values(values: Mapping[str, str], width: int | None) -> list[str]:
    """A line for each value, its name before it; on a terminal long texts are wrapped between words."""
    indent = min(max(map(_width, values)), LONGEST_NAME) + len(GAP)
    lines = []
    for name, text in values.items():
        name += " " * max(indent - _width(name), len(GAP))
        lines += [name + text] if width is None else _wrapped(name, text, width, indent)
    return lines


def _table(names: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Columns that are as wide as their widest cell."""
    table = [list(names), *([row.get(name, "-") for name in names] for row in rows)]
    widths = [max(map(_width, column)) for column in zip(*table, strict=True)]
    return [
        GAP.join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _paragraphs(names: Sequence[str], rows: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """Each row's values with their names, one after the other."""
    lines: list[str] = []
    for row in rows:
        lines += [""] if lines else []
        filled = ""
        for name in names:
            if (text := row.get(name, "-")) == "-":
                continue
            if filled and _width(f"{filled}{GAP}{name}: {text}") <= width:
                filled += f"{GAP}{name}: {text}"
                continue
            lines += [filled] if filled else []
            *whole, filled = _wrapped(f"{name}: ", text, width, len(GAP))
            lines += whole
        lines += [filled] if filled else []
    return lines


def _wrapped(name: str, text: str, width: int, indent: int) -> list[str]:
    """A name and a text in lines of at most `width`, unless a word is longer: nothing is cut."""
    first, *words = text.split(" ")
    lines = [name + first]
    for word in words:
        if _width(lines[-1]) + 1 + _width(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(" " * indent + word)
    return lines


def _width(text: str) -> int:
    """Columns on a terminal."""
    from rich.cells import cell_len

    return cell_len(text)


def _cell(value: Any) -> str:
    """A value in one line; characters that would do something are shown as their escapes."""
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_cell, value)) + "]"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by name, those of nested mappings as outer.inner."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
