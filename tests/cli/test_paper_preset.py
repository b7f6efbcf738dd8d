"""`--preset paper` from the command line through all three stages: the paper's sizes, for a few steps and episodes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from internalrl import cli
from internalrl.base import pretrain
from internalrl.discovery import grid
from internalrl.run.folder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:The (switch|codes)")

FEW = 4


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of this size take minutes to be measured on thousands of episodes."""
    held_out, pass_rates = grid.held_out, grid.pass_rates
    monkeypatch.setattr(pretrain, "evaluate", partial(pretrain.evaluate, episodes=FEW))
    monkeypatch.setattr(grid, "held_out", lambda config, size, seed, *stream: held_out(config, FEW, seed, *stream))
    monkeypatch.setattr(grid, "pass_rates", lambda steered, config, size, seed: pass_rates(steered, config, FEW, seed))


def run(stage: str, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config that the run was stored with, and the rates its last step was made with, by optimiser."""
    assert cli.main([stage, "--preset", "paper", "--run", stage, *options]) == 0
    folder = RunFolder.open(stage)
    optimizers = folder.load_checkpoint(stage)[1]["optimizers"]
    rates = {name: [group["lr"] for group in state["param_groups"]] for name, state in optimizers.items()}
    config: dict[str, Any] = json.loads((folder.path / "config.json").read_text())["config"]
    return config, rates


@pytest.mark.usefixtures("few")
def test_three_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, rates = run("pretrain", "--steps", "2", "--batch-size", "2")
    assert config["base"].items() >= {"encoder": "one-hot", "layers": 6, "width": 256, "heads": 4, "mlp": 512}.items()
    assert rates == {"adamw": [pytest.approx(3e-4 * 2 / pretrain.WARMUP_STEPS)]}
    base = json.loads(Path("pretrain/base/config.json").read_text())
    assert base["backbone"].items() >= {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}.items()

    config, rates = run("discover", "--base", "pretrain", "--switch-steps", "3", "--batch-size", "2", "--batches", "2")
    assert config["metacontroller"].items() >= {"n_z": 8, "n_h": 32, "n_s": 32, "rank": 16}.items()
    assert (config["switch"], config["kl"], config["kl_coef"]) == ("soft", "every-step", 0.17)
    assert rates == {"adamw": [1e-3, 1e-3]}
    lines = RunFolder.open("discover").metrics()
    assert {line["stage"] for line in lines} == {"discover"}  # no consolidation
    assert [line["step"] for line in lines] == [0, 2]

    config, rates = run("reinforce", "--discovered", "discover", "--episodes", "4", "--batch-size", "2")
    assert (config["policy_hidden"], config["initial_std"], rates) == (256, 1.0, {"adam": [3e-5]})
    assert (config["task"], config["epochs"]) == ("0-1-2-3-4-5-6-7-0-1-2-3", 6)
    assert cli.main(["evaluate", "reinforce", "--episodes", str(FEW)]) == 0
