"""`internalrl demo code` at a size that takes seconds: from nothing to the report, stopped and continued, refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from internalrl import cli, demo_code
from internalrl.analysis.report import programs as shown
from internalrl.discovery import programs as measured
from internalrl.domains.code import tasks as code_tasks
from internalrl.run import loop
from internalrl.run.metrics import read_metrics
from internalrl.settings.stages import ReportConfig

pytestmark = pytest.mark.filterwarnings("ignore:The (switch|codes)", "ignore:No spliced text")

SMALL = """
idioms: 2
programs: 500
pretrain: {steps: 8, batch_size: 8, layers: 2, width: 32, heads: 2, mlp: 32}
discover:
  metacontroller: {n_z: 3, n_h: 5, slow_features: 2, horizon: 3, n_s: 8, encoder_hidden: 6, rank: 2}
  form_steps: 3
  squeeze_steps: 3
  switch_steps: 3
  batch_size: 8
  batches: 2
  consolidate: {rehearse: {rounds: 1, steps: 4, batch_size: 8, batches: 2}}
reinforce: {episodes: 80, batch_size: 16, max_completion_length: 30, policy_hidden: 4, epochs: 2, replay: 8}
raw_action: {batch_size: 16, max_completion_length: 30}
"""
STAGES = ["pretrain", "discover", "rehearse", "reinforce", "raw-action"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a small demo has run; it is measured on few and short programs, and saved after every step."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "small.yaml").write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(demo_code, "HELD_OUT", 16)
        patch.setattr(measured, "MEASURED", 8)
        patch.setattr(measured, "LONGEST", 40)
        patch.setattr(shown, "LONGEST", 40)
        patch.setattr(demo_code, "ReportConfig", partial(ReportConfig, episodes=8))
        patch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
        assert demo("--run", "whole") == 0
        yield folder


def demo(*options: str) -> int:
    return cli.main(["demo", "code", "--config", "small.yaml", "--threads", "1", *options])


def timeless(values: Any) -> Any:
    return {name: value for name, value in values.items() if name not in ("seconds", "resumed")}


def test_from_nothing_to_the_report(folder: Path) -> None:
    run = folder / "whole"
    summary = json.loads((run / "summary.json").read_text())
    assert list(dict.fromkeys(line["stage"] for line in read_metrics(run))) == STAGES
    assert list(summary["seconds"]) == [*STAGES, "total"]
    assert summary["task"] == "total → index"
    assert summary["episodes"] == read_metrics(run)[-1]["episodes"] == 80
    assert summary["gap_nats"] == pytest.approx(summary["pretrain"]["nll_nats"] - 15, abs=3)
    for name in ("success", "raw_action_success", "runs", "raw_action_runs", "switch_f1", "forced_unseen"):
        assert 0 <= summary[name] <= 1
    html = (run / "report.html").read_text(encoding="utf-8")
    for part in (
        "The bare model",
        "Random codes",
        "The trained policy",
        "total → index",
        "versions.torch",
        "All results",
    ):
        assert part in html
    stored = json.loads((run / "config.json").read_text())["config"]
    assert stored["reinforce"]["epochs"] == 2
    assert stored["reinforce"]["temperature"] == 0.3, "the preset is under what the file says"


def test_stages_are_those_that_other_commands_know(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "whole", "--episodes", "8", "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)["sections"]
    assert sections[-3:] == ["reinforce", "programs", "settings"]
    adapter = json.loads((folder / "whole" / "adapter" / "adapter_config.json").read_text())
    assert adapter["provenance"]["demo"] == {"seed": 0, "task": ["total", "index"]}
    assert (folder / "whole" / "discovered" / "adapter_config.json").exists()
    assert cli.main(["evaluate", "whole", "--episodes", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found["rewards/passes_tests/mean"] == found["reward"] <= 1
    assert found["mean_length"] <= 30


@pytest.mark.parametrize("calls", [2, 8])
def test_resumes_where_it_was_stopped(
    folder: Path, calls: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of internal RL, and of token-level RL: what comes out is that of the run in one go."""
    left, evaluate = calls, code_tasks.evaluate

    def stopped(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    name = f"stopped-{calls}"
    with monkeypatch.context() as patch:
        patch.setattr(code_tasks, "evaluate", stopped)
        assert demo("--run", name) == 130
    assert f"Continue with: internalrl demo code --run {name} --resume" in capsys.readouterr().err
    assert cli.main(["demo", "code", "--run", name, "--resume", "--threads", "1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert timeless(summary) == timeless(json.loads((folder / "whole" / "summary.json").read_text()))
    assert [timeless(line) for line in read_metrics(folder / name)] == [
        timeless(line) for line in read_metrics(folder / "whole")
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--idioms", "7"], "--idioms is 7; give a number from 2 to 6"),
        (["--programs", "10"], "--programs is 10; give 500 or more"),
        (["--pretrain.context", "90"], "--pretrain.context is 90, which programs of the corpus fill"),
        (
            ["--pretrain.context", "200", "--reinforce.max-completion-length", "199"],
            "more than the model's context of 200",
        ),
        (["--raw-action.temperature", "0"], "temperature above 0"),
        (["--discover.consolidate.steps", "5"], "Texts have no forgetful teacher"),
        (["--discover.metacontroller.layer", "9"], "layer"),
        (["--preset", "paper"], "demo code has no preset 'paper'"),
        (["--pretrain.step", "5"], "did you mean --pretrain.steps; see internalrl demo code --help."),
        (["--run", "whole"], "Run folder whole is not empty"),
    ],
)
def test_mistakes_are_told_before_a_folder_is_made(
    options: list[str], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    assert demo(*options) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert sentence in told[0]
    assert sorted(folder.iterdir()) == before


def test_help_tells_both_demos(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, parts in (
        (["demo", "--help"], ("internalrl demo code", "--pretrain.grid.size")),
        (["demo", "code", "--help"], ("--idioms", "--raw-action.temperature", "runs/demo-code")),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert not stop.value.code
        text = " ".join(capsys.readouterr().out.split())
        assert all(part in text for part in parts)
    assert cli.main(["demo", "cod"]) == 2
    assert "Unrecognized options: cod; see internalrl demo --help." in capsys.readouterr().err
