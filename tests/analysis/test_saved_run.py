"""A saved base and adapter play as they did where they were saved, with any release that the package admits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from internalrl.analysis.evaluate import measure
from internalrl.controller.steered import SteeredModel
from internalrl.settings.stages import EvaluateConfig

FOLDER = Path(__file__).parents[1] / "support" / "small_run"
"""A base of two blocks after 500 steps of pretraining; a metacontroller that switches at times and hardly steers."""
TASK, SUCCESS = "4-5-2-3-0-1", 0.242
"""One of the three orders that the base has seen. It takes a memory of what was visited: without it, success is 0."""

pytestmark = pytest.mark.versions


def test_success_is_what_it_was() -> None:
    steered = SteeredModel.from_pretrained(FOLDER / "base", FOLDER / "adapter")
    config = EvaluateConfig(episodes=2048, controller="policy", forget=False)
    found = measure(steered, steered.base.config.grid, TASK, config, temperature=1.0, seed=0)
    low, high = found["success_95"]
    assert low < SUCCESS < high
    assert found["segments_per_episode"] > 2


def test_saving_again_keeps_every_bit(tmp_path: Path) -> None:
    steered = SteeredModel.from_pretrained(FOLDER / "base", FOLDER / "adapter")
    steered.base.save_pretrained(tmp_path / "base")
    steered.save_pretrained(tmp_path / "adapter")
    again = SteeredModel.from_pretrained(tmp_path / "base", tmp_path / "adapter")
    tensors = again.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in steered.state_dict().items())
