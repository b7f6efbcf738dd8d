"""What `make versions` installs: the oldest releases are those that pyproject.toml names."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tools.versions import lowest

ROOT = Path(__file__).parents[1]


def test_oldest_releases_are_the_lower_bounds() -> None:
    assert lowest(["torch>=2.9", "psycopg[binary]>=3.2,<4", "uvicorn!=0.31,>=0.30"]) == [
        "torch==2.9", "psycopg==3.2", "uvicorn==0.30",
    ]  # fmt: skip


@pytest.mark.parametrize("requirement", ["torch", "torch<3", "torch==2.9", "torch>=2,>=2.9"])
def test_a_requirement_without_a_lower_bound_is_told(requirement: str) -> None:
    with pytest.raises(ValueError, match="lower bounds; name the one oldest release that works"):
        lowest([requirement])


def test_every_requirement_has_a_lower_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for name, more in project["optional-dependencies"].items() if name != "dev" for text in more]
    assert len(lowest([*project["dependencies"], *extras])) > 20
