"""Tokens become text one by one: characters of several bytes, stop texts across tokens."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"
"""What stands for bytes that are no character, or none yet."""
INCOMPLETE = 3
"""Most bytes of an incomplete character; some tokenizers show each as one `BROKEN`."""
CONTEXT, WINDOW = 6, 24
"""At least and at most so many tokens are decoded again with each new one: their text depends on their neighbours."""


class Detokenizer:
    """Gives the text that each token adds; joined, it is the answer as the tokenizer decodes it whole.

    Special tokens have no text. Bytes that might begin a character wait for the rest of it.

    Args:
        prompt: what the answer continues: its first word may begin with a space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._window, self._text = self._end_of(prompt)
        self._given = len(_complete(self._text))

    def add(self, token: int) -> str:
        """The text that is complete with `token`."""
        known = self._text[: self._given]
        self._window.append(token)
        self._text = self._decode(self._window)
        if not self._text.startswith(known):  # some tokenizers take a character back when a broken one follows
            self._window, self._given = [token], 0
            self._text = self._decode(self._window)
        end = max(len(_complete(self._text)), self._given)
        new, self._given = self._text[self._given : end], end
        if len(self._window) > WINDOW:
            self._shorten()
        return new

    def rest(self) -> str:
        """What is left at the end: bytes that became no character."""
        return self._text[self._given :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _end_of(self, tokens: Sequence[int]) -> tuple[list[int], str]:
        """The last few tokens, if possible from the beginning of a character on, and their text."""
        for length in range(CONTEXT, CONTEXT + INCOMPLETE + 1):
            text = self._decode(tokens[-length:])
            if not text.startswith(BROKEN):
                break
        return list(tokens[-length:]), text

    def _shorten(self) -> None:
        waiting = self.rest()
        window, text = self._end_of(self._window)
        if text.endswith(waiting):
            self._window, self._text, self._given = window, text, len(text) - len(waiting)


def _complete(text: str) -> str:
    """Without what might be the beginning of a character."""
    end = len(text)
    while end and text[end - 1] == BROKEN and len(text) - end < INCOMPLETE:
        end -= 1
    return text[:end]


class Stops:
    """Holds back text while it might begin one of the `stops`, and ends at the first of them."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = stops, ""
        self.found = False

    def add(self, text: str) -> str:
        """What may be given of the text so far; all of it but the stop text if there is one, see `found`."""
        if not self._stops or not text:
            return text
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What is still held back."""
        return self._held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`, and are not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
