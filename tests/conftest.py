"""Every test starts from the same random numbers, whichever ran before it; databases; small steered models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from internalrl.controller.steered import SteeredModel
from tests.support import postgres as private
from tests.support.tiny import BATCH, STEPS, tiny_steered, walks


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def postgres() -> Iterator[private.Server]:
    if private.PROGRAMS is None:
        pytest.skip("no PostgreSQL server on this machine")
    with private.server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> str | None:
    """URL of a new database; None is SQLite in the folder of whatever takes it."""
    return None if request.param == "sqlite" else request.getfixturevalue("postgres").database()


@pytest.fixture(params=("one-hot", "planner"))
def steered(request: pytest.FixtureRequest) -> SteeredModel:
    """A steered model with each of the grid's encoders."""
    return tiny_steered(request.param)


@pytest.fixture
def observations() -> Tensor:
    """What `steered` observes."""
    return walks(BATCH, STEPS)
