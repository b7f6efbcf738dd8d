"""Texts spliced from the segments of others: a context that the base has never seen, around a segment that it knows.

The corpus shows only some transitions between segments. A code then need only tell apart what the base believes
possible. Spliced at learned switches, the corpus shows all transitions, and a code has to say what comes next. The
pieces are cut where the metacontroller switches, not where the truth would have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

TRIES = 4  # texts made for each one that is wanted, at most


@dataclass(frozen=True)
class Cut:
    """A text cut into segments: its `tokens` and the positions of the tokens that segments open after.

    The first of these `switches` is the last prompt token.
    """

    tokens: list[int]
    switches: list[int]

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.switches[0] + 1]

    @property
    def segments(self) -> list[list[int]]:
        """The completion's tokens, segment by segment."""
        ends = [*(position + 1 for position in self.switches), len(self.tokens)]
        return [self.tokens[begin:end] for begin, end in pairwise(ends)]


def splice(
    texts: Sequence[Cut],
    count: int,
    rng: np.random.Generator,
    accept: Callable[[list[list[int]]], list[bool]],
    longest: int | None = None,
) -> list[Cut]:
    """At most `count` new texts: each has the prompt and the number of segments of one of `texts`, chosen at random.

    Its last segment, which ends the text, was the last of some text, and its others were not; each is drawn from all
    of these alike. Fewer texts come back where too many are refused.

    Args:
        accept: of texts as tokens, which of them are worth having.
        longest: the most tokens of a text; those beyond are refused.
    """
    parts = [text.segments for text in texts]
    inner, last = [s for p in parts for s in p[:-1]], [p[-1] for p in parts]
    found: list[Cut] = []
    for _ in range(TRIES):
        if len(found) >= count:
            break
        made = []
        for row in rng.integers(len(texts), size=count).tolist():
            chosen = [inner[i] for i in rng.integers(len(inner), size=len(parts[row]) - 1)] if inner else []
            made.append(_join(texts[row].prompt, [*chosen, last[rng.integers(len(last))]]))
        made = [text for text in made if longest is None or len(text.tokens) <= longest]
        found += [text for text, good in zip(made, accept([text.tokens for text in made]), strict=True) if good]
    return found[:count]


def _join(prompt: list[int], segments: list[list[int]]) -> Cut:
    tokens, switches = list(prompt), []
    for segment in segments:
        switches.append(len(tokens) - 1)
        tokens += segment
    return Cut(tokens, switches)
