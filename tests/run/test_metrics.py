"""Metrics reach the run's folder and, if wanted, a tracker; a resumed run counts no step twice."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from internalrl.errors import InternalRLError
from internalrl.run.folder import RunFolder
from internalrl.run.metrics import TrackerName, progress

CONFIG = {"rate": 0.1, "sizes": (1, 2)}


def test_rewind_touches_one_stage(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, CONFIG, seed=0)
    for stage in ("pretrain", "discover"):
        for step in range(3):
            run.log(stage, step, loss=step)
    run.rewind("discover", 0)
    assert [(line["stage"], line["step"]) for line in run.metrics()] == [
        ("pretrain", 0), ("pretrain", 1), ("pretrain", 2), ("discover", 0),
    ]  # fmt: skip
    run.rewind("discover", -1)
    assert not run.metrics("discover")


@pytest.mark.parametrize("loss", [float("nan"), torch.tensor(float("inf")), np.float64("nan")])
def test_loss_that_is_not_finite_stops_the_run(tmp_path: Path, loss: object) -> None:
    run = RunFolder.create(tmp_path, CONFIG, seed=0)
    with pytest.raises(InternalRLError, match=r"pretrain stopped at step 7: loss is (nan|inf)"):
        run.log("pretrain", 7, rate=0.1, loss=loss)
    assert not run.metrics()


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("pretrain", 3) as advance:
        for _ in range(3):
            advance(loss=0.25)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "pretrain 3/3, 0 s left loss 0.25\n"


def two_stages(run: RunFolder) -> None:
    """Each counts its own steps; the second one logs all kinds of values."""
    for step in range(3):
        run.log("pretrain", step, loss=1.0 - step)
        run.log("discover", step, kl=torch.tensor(2.0 * step), unseen=np.array([0.25, 0.5]), f1=None, note="text")


def go_on(run: RunFolder) -> None:
    """The second stage once more from its second step."""
    run.rewind("discover", 0)
    for step in (1, 2):
        run.log("discover", step, kl=7.0 + step)


def curve(run: RunFolder, stage: str, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run.path / "tensorboard" / stage)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_shows_the_curves_of_an_uninterrupted_run(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, CONFIG, seed=0, track="tensorboard")
    two_stages(run)
    assert curve(run, "pretrain", "loss") == [(0, 1.0), (1, 0.0), (2, -1.0)]
    assert curve(run, "discover", "kl") == [(0, 0.0), (1, 2.0), (2, 4.0)]
    assert curve(run, "discover", "unseen/1") == [(0, 0.5), (1, 0.5), (2, 0.5)]
    go_on(RunFolder.create(tmp_path, CONFIG, seed=0, resume=True, track="tensorboard"))
    assert curve(run, "discover", "kl") == [(0, 0.0), (1, 8.0), (2, 9.0)]
    assert curve(run, "discover", "unseen/1") == [(0, 0.5)]
    assert len(curve(run, "pretrain", "loss")) == 3, "another stage"
    RunFolder.create(tmp_path, CONFIG, seed=0, overwrite=True)
    assert not (tmp_path / "tensorboard").exists()


class Wandb(ModuleType):
    """The part of wandb that runs are tracked with; logged lines by the id of their run."""

    class Error(Exception):
        """Wandb's own."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.asked: list[dict[str, Any]] = []
        self.axes: dict[str, str | None] = {}
        self.logged: dict[str, list[dict[str, float]]] = {}

    def init(self, **options: Any) -> SimpleNamespace:
        if not options["config"]:
            raise self.Error("api_key not configured")
        self.asked.append(options)
        lines = self.logged.setdefault(options["id"] or "new", [])
        return SimpleNamespace(
            id=options["id"] or "new",
            define_metric=lambda name, step_metric=None: self.axes.update({name: step_metric}),
            log=lines.append,
            finish=lambda: None,
        )


def test_wandb_gets_every_stage_on_its_own_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    two_stages(RunFolder.create(tmp_path / "run-7", CONFIG, seed=0, track="wandb"))
    assert wandb.asked[0]["name"] == "run-7"
    assert wandb.asked[0]["config"] == CONFIG
    assert wandb.asked[0]["id"] is wandb.asked[0]["resume"] is None
    assert wandb.axes == {
        "pretrain/step": None, "pretrain/*": "pretrain/step", "discover/step": None, "discover/*": "discover/step",
    }  # fmt: skip
    assert wandb.logged["new"][:2] == [
        {"pretrain/step": 0, "pretrain/loss": 1.0},
        {"discover/step": 0, "discover/kl": 0.0, "discover/unseen/0": 0.25, "discover/unseen/1": 0.5},
    ]
    go_on(RunFolder.create(tmp_path / "run-7", CONFIG, seed=0, resume=True, track="wandb"))
    assert (wandb.asked[1]["id"], wandb.asked[1]["resume"]) == ("new", "allow")
    assert wandb.logged["new"][-1] == {"discover/step": 2, "discover/kl": 9.0}
    with pytest.raises(InternalRLError, match=r"does not take the run \(api_key not configured\); call `wandb login`"):
        RunFolder.create(tmp_path / "other", {}, seed=0, track="wandb")


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_missing_tracker_is_told_before_a_run_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: TrackerName, package: str
) -> None:
    two_stages(RunFolder.create(tmp_path, CONFIG, seed=0))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InternalRLError, match=rf"needs more packages .* pip install 'internalrl\[{name}\]'"):
        RunFolder.create(tmp_path, CONFIG, seed=0, overwrite=True, track=name)
    assert len(RunFolder.open(tmp_path).metrics()) == 6


def test_other_processes_track_nothing(tmp_path: Path) -> None:
    tracker = SimpleNamespace(log=lambda *_: pytest.fail("logged"), rewind=lambda *_: pytest.fail("rewound"))
    run = RunFolder(tmp_path, silent=True, tracker=tracker)
    two_stages(run)
    go_on(run)
    assert not list(tmp_path.iterdir())
