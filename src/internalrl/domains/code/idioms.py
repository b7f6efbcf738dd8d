"""The idioms that programs are made of: each is one step on a list of integers `x`, written in several ways.

Every idiom is defined on every list of integers, the empty one included, leaves its result in `x`, and sets the
helpers that it reads itself; so any sequence of idioms runs. `{t}`, `{v}` and `{i}` stand for a helper (a temporary,
an element, an index), whose name is drawn anew each time an idiom is written.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import NamedTuple

HELPERS = {"{t}": ("y", "z"), "{v}": ("v", "n"), "{i}": ("i", "k")}
"""Placeholder -> the names it may take."""

INDENT = "    "

IDIOMS: dict[str, tuple[str, ...]] = {
    "reverse": (
        "x = x[::-1]",
        "{t} = list(x)\n{t}.reverse()\nx = {t}",
        "{t} = []\nfor {v} in x:\n    {t}.insert(0, {v})\nx = {t}",
    ),
    "total": (
        "x = x + [sum(x)]",
        "{t} = sum(x)\nx.append({t})",
        "{t} = 0\nfor {v} in x:\n    {t} += {v}\nx.append({t})",
    ),
    "accumulate": (
        "{t} = 0\nx = [{t} := {t} + {v} for {v} in x]",
        "x = [sum(x[:{i} + 1]) for {i} in range(len(x))]",
        "for {i} in range(1, len(x)):\n    x[{i}] += x[{i} - 1]",
    ),
    "index": (
        "x = [{v} + {i} for {i}, {v} in enumerate(x)]",
        "for {i} in range(len(x)):\n    x[{i}] += {i}",
        "{t} = []\nfor {v} in x:\n    {t}.append({v} + len({t}))\nx = {t}",
    ),
    "halve": (
        "x = [{v} if {v} % 2 else {v} // 2 for {v} in x]",
        "x = list(map(lambda {v}: {v} if {v} % 2 else {v} // 2, x))",
        "for {i} in range(len(x)):\n    if x[{i}] % 2 == 0:\n        x[{i}] //= 2",
    ),
    "sort": (
        "x = sorted(x)",
        "{t} = list(x)\n{t}.sort()\nx = {t}",
        "{t} = []\nwhile x:\n    {t}.append(x.pop(x.index(min(x))))\nx = {t}",
    ),
    "unique": (
        "x = list(dict.fromkeys(x))",
        "x = [{v} for {i}, {v} in enumerate(x) if {v} not in x[:{i}]]",
        "{t} = []\nfor {v} in x:\n    if {v} not in {t}:\n        {t}.append({v})\nx = {t}",
    ),
    "rotate": (
        "x = x[1:] + x[:1]",
        "if x:\n    x.append(x.pop(0))",
        "{t} = x[:1]\nx = x[1:] + {t}",
    ),
    "peak": (
        "x = [max(x[:{i} + 1]) for {i} in range(len(x))]",
        "{t} = min(x, default=0)\nx = [{t} := max({t}, {v}) for {v} in x]",
        "for {i} in range(1, len(x)):\n    x[{i}] = max(x[{i} - 1], x[{i}])",
    ),
    "mirror": (
        "x = x + x[::-1]",
        "{t} = x[::-1]\nx += {t}",
        "for {v} in x[::-1]:\n    x.append({v})",
    ),
    "mod": (
        "x = [{v} % 7 for {v} in x]",
        "for {i} in range(len(x)):\n    x[{i}] %= 7",
        "{t} = []\nfor {v} in x:\n    {t}.append({v} % 7)\nx = {t}",
    ),
    "fold": (
        "x = [{v} + {t} for {v}, {t} in zip(x, x[::-1])]",
        "{t} = list(x)\nx = [{v} + {t}.pop() for {v} in x]",
        "{t} = list(x)\nfor {i} in range(len(x)):\n    x[{i}] += {t}.pop()",
    ),
    "positive": (
        "x = [{v} for {v} in x if {v} > 0]",
        "x = list(filter(lambda {v}: {v} > 0, x))",
        "{t} = []\nfor {v} in x:\n    if {v} > 0:\n        {t}.append({v})\nx = {t}",
    ),
    "difference": (
        "x = [{v} - {t} for {t}, {v} in zip([0] + x, x)]",
        "{t} = [0] + x\nx = [{v} - {t}.pop(0) for {v} in x]",
        "for {i} in range(len(x) - 1, 0, -1):\n    x[{i}] -= x[{i} - 1]",
    ),
    "swap": (
        "x = x[:2][::-1] + x[2:]",
        "{t} = x[1:2]\nx = {t} + x[:1] + x[2:]",
        "if len(x) > 1:\n    x[0], x[1] = x[1], x[0]",
    ),
    "tail": (
        "x = x[1:]",
        "if x:\n    x.pop(0)",
        "{t} = x[1:]\nx = {t}",
    ),
}
"""Name -> its forms."""

DEFAULT = ("reverse", "total", "accumulate", "index", "halve", "sort", "unique", "rotate")
"""Eight idioms. The order matters: an idiom is never followed by one of the next three (`CodeConfig.withheld`), and in
this order few of the compositions that this withholds can be had in another way."""

LARGE = (
    "reverse", "unique", "accumulate", "peak", "total", "halve", "mirror", "mod", "fold", "positive", "difference",
    "sort", "swap", "tail", "index", "rotate",
)  # fmt: skip
"""Sixteen idioms, in an order chosen in the same way."""


class Variant(NamedTuple):
    """One way to write one idiom down: a form with names for its helpers."""

    idiom: str
    form: int
    text: str
    """Its lines as they stand in a function's body, up to the beginning of the next line's statement."""


@cache
def variants(idiom: str) -> tuple[tuple[Variant, ...], ...]:
    """All variants of an idiom, a tuple for each of its forms."""
    return tuple(
        tuple(Variant(idiom, number, text) for text in _named(form)) for number, form in enumerate(IDIOMS[idiom])
    )


def _named(form: str) -> list[str]:
    """A form's texts, one for each choice of names."""
    used = [placeholder for placeholder in HELPERS if placeholder in form]
    texts = []
    for names in product(*(HELPERS[placeholder] for placeholder in used)):
        text = form
        for placeholder, name in zip(used, names, strict=True):
            text = text.replace(placeholder, name)
        texts.append(text.replace("\n", "\n" + INDENT) + "\n" + INDENT)
    return texts
