"""Web pages from templates: whatever is put into one is escaped, and a name that is not there is an error."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def templates(package: str, **options: Any) -> Environment:
    """The templates in the folder templates/ of `package`; `options` of Jinja2's Environment."""
    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
