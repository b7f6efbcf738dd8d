"""A steered model with each encoder, and what it observes."""

from __future__ import annotations

import pytest
from torch import Tensor

from internalrl.metacontroller.steered import SteeredModel
from tests.tiny import BATCH, STEPS, tiny_steered, walks


@pytest.fixture(params=("one-hot", "planner"))
def steered(request: pytest.FixtureRequest) -> SteeredModel:
    return tiny_steered(request.param)


@pytest.fixture
def observations() -> Tensor:
    return walks(BATCH, STEPS)
