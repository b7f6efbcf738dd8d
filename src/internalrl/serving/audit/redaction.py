"""What of a text may be written down: redaction of an answer's segments before anything of them reaches a disk."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from internalrl.run.files import PARTIAL, write_errors

MARK = "[redacted]"
"""Stands for what a regular expression found."""


def replace_matches(texts: Sequence[str], patterns: Sequence[re.Pattern[str]]) -> list[str]:
    """An answer's segments with what `patterns` find in the whole answer replaced by a mark.

    The mark stands in the segment in which a match begins. Matches that overlap become one.
    """
    answer = "".join(texts)
    hidden = bytearray(len(answer))  # 1 for a hidden character, 2 for the first one of a match
    for pattern in patterns:
        for match in pattern.finditer(answer):
            begin, end = match.span()
            if begin < end:
                first = hidden[begin] or 2
                hidden[begin:end] = b"\1" * (end - begin)
                hidden[begin] = first
    for i in range(1, len(hidden)):
        if hidden[i] == 2 and hidden[i - 1]:
            hidden[i] = 1
    shown, start = [], 0
    for text in texts:
        flags = hidden[start : start + len(text)]
        shown.append("".join(MARK if flag == 2 else "" if flag else c for c, flag in zip(text, flags, strict=True)))
        start += len(text)
    return shown


class Redaction:
    """Turns the texts of one answer's segments, in order, into what is written of them."""

    def __init__(self, texts: Literal["keep", "hash", "drop"], patterns: Sequence[str], folder: Path):
        self.texts = texts
        self.patterns = [re.compile(pattern) for pattern in patterns] if texts != "drop" else []
        self._key = _key(folder / "hash.key") if texts == "hash" else b""

    def __call__(self, texts: Sequence[str]) -> list[str | None]:
        """What is written; None for a text that is dropped."""
        if self.texts == "drop":
            return [None] * len(texts)
        if self.patterns:
            texts = replace_matches(texts, self.patterns)
        return [self.hash(text) for text in texts] if self.texts == "hash" else [*texts]

    def hash(self, text: str) -> str:
        """A hash that equals another one where the texts are equal. Segments are so short that one without a key
        could be undone by trying."""
        return "hmac:" + hmac.new(self._key, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def _key(file: Path) -> bytes:
    """The key in `file`, which is made if it is missing."""
    if not file.exists():
        with write_errors(file):
            handle, new = tempfile.mkstemp(dir=file.parent, prefix=PARTIAL)
            with os.fdopen(handle, "wb") as stream:
                stream.write(os.urandom(32))
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.link(new, file)
            os.unlink(new)
    return file.read_bytes()
