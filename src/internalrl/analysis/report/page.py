"""What a report is made of, as data: a page has sections, a section figures and other parts. Templates draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from internalrl.pages import templates

Entry = tuple[str, str, str]
"""Of a key: a glyph, its colour, what it stands for."""
Number = tuple[str | None, str, str]
"""A result as it is written, None if it was not measured, its name, and what it means."""
Piece = tuple[str, str, str]
"""A stretch of text, the colour behind it, and what it says of itself when it is pointed at."""
Passage = tuple[str, Sequence[Piece], str]
"""How a text begins, its pieces, and a caption, which may be empty."""


@dataclass(frozen=True)
class Figure:
    """A drawing (SVG) under its title and key, above the sentence that says what is seen."""

    title: str
    key: Sequence[Entry]
    drawing: Markup
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Part:
    """What else stands in a section; each class has a template, which gets one of them as `part`."""

    @property
    def template(self) -> str:
        return f"{type(self).__name__.lower()}.html.j2"


@dataclass(frozen=True)
class Headline(Part):
    """The results that count."""

    numbers: Sequence[Number]


@dataclass(frozen=True)
class Table(Part):
    """Rows, each of which begins with its name; `folded` under these words, if there are any."""

    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()
    folded: str = ""


@dataclass(frozen=True)
class Passages(Part):
    """Texts of the same origin."""

    title: str
    text: str
    passages: Sequence[Passage]


@dataclass(frozen=True)
class Section:
    """Its name is that of its link; without figures and parts there is nothing to show."""

    name: str
    title: str
    text: str = ""
    figures: Sequence[Figure | None] = ()
    key: Sequence[Entry] = ()
    parts: Sequence[Part] = ()

    @property
    def drawn(self) -> list[Figure]:
        """Those figures that there was something for."""
        return [figure for figure in self.figures if figure]

    def __bool__(self) -> bool:
        return bool(self.drawn or self.parts)


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page in one file that needs nothing else, not even a network."""
    page = templates(__package__).get_template("report.html.j2")
    return page.render(title=title, lead=lead, sections=sections)
