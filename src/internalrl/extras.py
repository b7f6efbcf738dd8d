"""Packages that are installed with an extra, and the sentence to say where they are not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from internalrl.errors import InternalRLError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of packages that the extra `name` brings: InternalRLError where they cannot be imported."""
    try:
        yield
    except ImportError as error:
        raise InternalRLError(f"This needs more packages ({error}); pip install 'internalrl[{name}]'.") from error


def require(name: str, *packages: str) -> None:
    """InternalRLError where one of the packages that the extra `name` brings is missing; imports none of them."""
    with extra(name):
        for package in packages:
            if find_spec(package) is None:
                raise ModuleNotFoundError(f"No module named {package!r}")
