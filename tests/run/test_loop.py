"""A stage that is killed and resumed goes on as if nothing had happened, down to the last bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from internalrl.base import pretrain
from internalrl.discovery import consolidate, rehearse
from internalrl.discovery import train as discovery
from internalrl.discovery.grid import GridMaterial
from internalrl.errors import InternalRLError
from internalrl.reinforce import train as internal_rl
from internalrl.run import loop
from internalrl.run.folder import RunFolder
from internalrl.run.loop import Loop
from internalrl.settings.schema import to_dict
from tests.support import stages

SEED = 3
pytestmark = pytest.mark.filterwarnings("ignore:The switch has collapsed")


class KilledError(Exception):
    """Stands for a kill: nothing after it runs."""


@pytest.fixture(autouse=True)
def at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log and save at every step."""
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    for stage in (pretrain, discovery, rehearse, consolidate):
        monkeypatch.setattr(stage, "LOG_EVERY", 1)


def start(main: Callable[..., dict[str, Any]], config: Any, path: Path, resume: bool = False) -> dict[str, Any]:
    """Run a stage as the command line does; the summary without its times."""
    torch.manual_seed(12345 if resume else SEED)  # a resumed run is another process
    summary = main(config, RunFolder.create(path, to_dict(config), seed=SEED, resume=resume))
    return {name: value for name, value in summary.items() if name != "seconds"}


def kill_at(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    """Kill once, in the middle of a step: what it logged is there, but no checkpoint that includes it."""
    log = Loop.log

    def dying_log(self: Loop, **metrics: Any) -> None:
        log(self, **metrics)
        if (self.stage, self.step) == (stage, step):
            monkeypatch.setattr(Loop, "log", log)
            raise KilledError

    monkeypatch.setattr(Loop, "log", dying_log)


def outcome(run: Path) -> dict[str, bytes]:
    """Every file that a run leaves behind, its checkpoints aside: they hold times."""
    files = [file for file in run.rglob("*") if file.is_file() and file.parent.name != "checkpoints"]
    return {str(file.relative_to(run)): file.read_bytes() for file in files if file.name != "config.json"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted runs: pretrain, discover, internal, raw-action; each with its summary."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for stage in (pretrain, discovery, rehearse, consolidate):
            patch.setattr(stage, "LOG_EVERY", 1)
        for name, (main, config) in recipes(folder).items():
            summary = start(main, config, folder / name)
            (folder / f"{name}.json").write_text(json.dumps(summary))
    return folder


def recipes(folder: Path) -> dict[str, tuple[Callable[..., dict[str, Any]], Any]]:
    """Stage function and config by name of the run."""
    return {
        "pretrain": (pretrain.main, stages.PRETRAIN),
        "discover": (discovery.main, stages.discover(folder / "pretrain")),
        "internal": (internal_rl.main, stages.reinforce(folder / "discover")),
        "raw-action": (internal_rl.main, stages.reinforce(folder / "discover", "raw-action")),
    }


@pytest.mark.parametrize(
    ("name", "stage", "step"),
    [
        ("pretrain", "pretrain", 0),
        ("pretrain", "pretrain", 3),
        ("discover", "discover", 2),
        ("discover", "discover", 7),  # while the switch is learned: crops are about to move
        ("discover", "discover", 8),  # they have moved
        ("discover", "rehearse", 2),  # the switches that cut are those of the start
        ("discover", "consolidate", 0),  # discovery is complete
        ("discover", "consolidate", 3),
        ("internal", "reinforce", 3),
        ("raw-action", "reinforce", 3),
    ],
)
def test_resumed_run_equals_uninterrupted_run(
    name: str, stage: str, step: int, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics, models and summary; the lessons of consolidation are those of the discovered controller again."""
    main, config = recipes(runs)[name]
    kill_at(monkeypatch, stage, step)
    with pytest.raises(KilledError):
        start(main, config, tmp_path / name)
    killed = (tmp_path / name / "metrics.jsonl").read_bytes()
    assert len(killed) < len((runs / name / "metrics.jsonl").read_bytes())
    summary = start(main, config, tmp_path / name, resume=True)
    assert summary == json.loads((runs / f"{name}.json").read_text())
    assert outcome(tmp_path / name) == outcome(runs / name)


def test_a_resumed_run_crops_where_the_killed_one_did(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the switches of the metacontroller as it was when crops moved to them, not as it is by now."""
    main, config = recipes(runs)["discover"]
    read, segmenters = GridMaterial.corpus, []

    def reading(*given: Any) -> Any:
        segmenters.append(copy.deepcopy(given[-1]))
        return read(*given)

    monkeypatch.setattr(GridMaterial, "corpus", reading)
    kill_at(monkeypatch, "discover", 8)
    with pytest.raises(KilledError):
        start(main, config, tmp_path / "run")
    meanwhile = RunFolder.open(tmp_path / "run").load_checkpoint("discover")[0]
    start(main, config, tmp_path / "run", resume=True)
    first, moved, again = segmenters
    assert first is None
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in moved.state_dict().items())
    now = moved.state_dict()
    changed = {name for name, t in now.items() if not torch.equal(t, meanwhile[f"metacontroller/{name}"])}
    assert changed  # else there would be nothing to tell apart


@pytest.mark.parametrize("name", ["pretrain", "discover", "internal", "raw-action"])
def test_a_finished_run_has_nothing_left_to_do(name: str, runs: Path) -> None:
    main, config = recipes(runs)[name]
    before = outcome(runs / name)
    assert start(main, config, runs / name, resume=True) == json.loads((runs / f"{name}.json").read_text())
    assert outcome(runs / name) == before


def test_the_runs_above_learn_something(runs: Path) -> None:
    """Else equality would say nothing: every stage's loss moves, switches differ, and some rewards are 1."""
    lines = {name: RunFolder.open(runs / name).metrics() for name in recipes(runs)}
    for name, stage, value in (
        ("pretrain", "pretrain", "nll"),
        ("discover", "discover", "loss"),
        ("discover", "rehearse", "loss"),
        ("discover", "consolidate", "loss"),
    ):
        values = [line[value] for line in lines[name] if line["stage"] == stage]
        assert len(set(values)) == len(values) >= 5
    assert any(line["kl"] > 1e-4 for line in lines["discover"] if line["stage"] == "consolidate")
    assert any(0 < line["success"] < 1 for line in lines["internal"])
    assert any(0 < line["success"] < 1 for line in lines["raw-action"])
    assert any(line["decisions"] > 1.5 for line in lines["internal"])


# ---------------------------------------------------------------------------------- what goes wrong


def checkpoints(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "checkpoints").iterdir()}


@pytest.mark.parametrize(
    ("name", "module", "loss", "stage"),
    [
        ("pretrain", pretrain, "losses", "pretrain"),
        ("discover", discovery, "discovery_loss", "discover"),
        ("discover", consolidate, "consolidation_loss", "consolidate"),
        ("raw-action", internal_rl, "clipped_surrogate", "reinforce"),
    ],
)
def test_a_loss_that_is_not_a_number_keeps_the_last_checkpoint(
    name: str, module: Any, loss: str, stage: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops the run before it reaches the weights, and the run can be resumed."""
    main, config = recipes(runs)[name]
    healthy, kept = getattr(module, loss), []

    def sick(*given: Any, **options: Any) -> Any:
        value = healthy(*given, **options)
        if not RunFolder.open(tmp_path / name).has_checkpoint(stage):
            return value
        kept.append(checkpoints(tmp_path / name))
        nan = torch.tensor(float("nan"), requires_grad=True)
        return (nan, *value[1:]) if isinstance(value, tuple) else nan

    with monkeypatch.context() as patch:
        patch.setattr(module, loss, sick)
        with pytest.raises(InternalRLError, match="The loss is nan; lower the learning rate") as refusal:
            start(main, config, tmp_path / name)
    assert "\n" not in str(refusal.value)
    assert kept == [checkpoints(tmp_path / name)]
    start(main, config, tmp_path / name, resume=True)
    assert outcome(tmp_path / name) == outcome(runs / name)


def test_a_checkpoint_of_other_sizes_is_refused_whole(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither loaded in part nor replaced, and what was logged stays."""
    config = stages.discover(runs / "pretrain")
    start(discovery.main, replace(config, metacontroller=replace(stages.SIZES, n_h=6)), tmp_path / "other")
    kill_at(monkeypatch, "discover", 5)
    with pytest.raises(KilledError):
        start(discovery.main, config, tmp_path / "run")
    own = (tmp_path / "run" / "checkpoints" / "discover.safetensors").read_bytes()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for file in ("discover", "consolidate"):
        foreign = (tmp_path / "other" / "checkpoints" / f"{file}.safetensors").read_bytes()
        (tmp_path / "run" / "checkpoints" / "discover.safetensors").write_bytes(foreign)
        with pytest.raises(InternalRLError, match=r"do not fit Metacontroller .* made with other sizes") as refusal:
            start(discovery.main, config, tmp_path / "run", resume=True)
        assert "\n" not in str(refusal.value)
        assert checkpoints(tmp_path / "run") == {"discover.safetensors": foreign}
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    (tmp_path / "run" / "checkpoints" / "discover.safetensors").write_bytes(own)
    start(discovery.main, config, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(runs / "discover")


# ---------------------------------------------------------------------------------- the loop by itself


def counting(run: RunFolder, total: int = 6) -> Loop:
    module = torch.nn.Linear(1, 1)
    return Loop(run, "count", total, {"module": module}, {"sgd": torch.optim.SGD(module.parameters(), lr=0.1)})


def test_a_goal_that_was_reached_ends_the_resumed_run_too(tmp_path: Path) -> None:
    run, seen = RunFolder.create(tmp_path, {}, seed=0), []
    counted = counting(run)
    for step in counted:
        seen.append(step)
        if step == 2:
            counted.finish()
    assert seen == [0, 1, 2]
    again = counting(RunFolder.create(tmp_path, {}, seed=0, resume=True))
    assert list(again) == []
    assert (again.step, again.total) == (3, 3)


def test_times_of_a_resumed_run_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of a second each before the kill, whose last one is lost, and five after it."""
    clock = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])

    def run(resume: bool, die_at: int | None = None) -> Loop:
        clock[0] += 1000
        counted = counting(RunFolder.create(tmp_path, {}, seed=0, resume=resume))
        for step in counted:
            clock[0] += 1
            if step == die_at:
                return counted
        return counted

    run(resume=False, die_at=1)
    assert run(resume=True).seconds == 6
