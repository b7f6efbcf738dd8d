"""The command line, driven through a stage that does nothing."""

from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from tyro.conf import Positional, subcommand

from internalrl import cli
from internalrl.errors import InternalRLError
from internalrl.run.folder import RunFolder
from internalrl.settings import options as config


@dataclass(frozen=True)
class Shape:
    size: int = 7
    """Edge length."""


@dataclass(frozen=True)
class FakeConfig:
    shape: Shape = Shape()
    """The shape."""
    rate: float = 0.1
    """The rate of things."""
    flag: bool = True
    """A switch."""
    fail: str = ""
    """How to fail."""

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate is {self.rate}; give a number above 0.")


@dataclass(frozen=True)
class Show:
    """Show the things."""

    limit: int = 2
    """How many."""


@dataclass(frozen=True)
class Put:
    """Put a thing there."""

    name: Positional[str]
    """Of the thing."""
    weight: float = 1.0
    """Of the thing."""


ToolConfig = Annotated[Show, subcommand("show")] | Annotated[Put, subcommand("put")]


def fake_tool(tool_config: Show | Put) -> dict[str, Any]:
    print("a library prints something")
    if isinstance(tool_config, Show):
        return {
            "things": [{"name": f"n{i}", "weight": i / 3} for i in range(tool_config.limit)],
            "all": tool_config.limit,
        }
    if tool_config.weight < 0:
        raise InternalRLError("Nothing weighs less than 0; give another --weight.")
    return {"put": tool_config.name, "weight": tool_config.weight}


FAILURES = {
    "ours": InternalRLError("The base is too small;\n give a larger one."),
    "value": ValueError("task '9' names colour 9."),
    "interrupt": KeyboardInterrupt(),
    "bug": RuntimeError("a bug"),
}


def fake_stage(stage_config: FakeConfig, run: RunFolder) -> dict[str, Any]:
    print("a library prints something")
    if stage_config.fail:
        raise FAILURES[stage_config.fail]
    run.log("fake", 0, loss=stage_config.rate)
    result = {"rate": stage_config.rate, "size": stage_config.shape.size, "flag": stage_config.flag}
    return {"config": result, "seed": run.seed, "resumed": run.resumed, "undefined": float("nan")}


@pytest.fixture(autouse=True)
def fake_subcommands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, reads in (("fake", False), ("look", True)):
        entry = cli.Subcommand(f"{__name__}:fake_stage", f"{__name__}:FakeConfig", "does nothing", reads=reads)
        monkeypatch.setitem(cli.SUBCOMMANDS, name, entry)
    entry = cli.Subcommand(f"{__name__}:fake_tool", f"{__name__}:ToolConfig", "puts and shows", tool=True)
    monkeypatch.setitem(cli.SUBCOMMANDS, "tool", entry)
    monkeypatch.setattr(config, "PRESETS", {"large": {"fake": {"shape": {"size": 99}, "rate": 9}}})
    monkeypatch.chdir(tmp_path)


def result(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """Run with --json; all of stdout must be one JSON object."""
    assert cli.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run what must fail: exit code 2, one line on stderr, nothing on stdout."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line != "a library prints something"]
    assert len(lines) == 1
    assert lines[0].startswith("internalrl: ")
    return lines[0]


def test_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    summary = result(capsys, "fake", "--rate", "2", "--no-flag", "--shape.size", "3", "--seed", "5")
    assert summary["config"] == {"rate": 2.0, "size": 3, "flag": False}
    assert (summary["seed"], summary["resumed"], summary["undefined"]) == (5, False, None)
    assert json.loads(Path("runs/fake/summary.json").read_text()) == summary
    assert json.loads(Path("runs/fake/config.json").read_text())["config"]["shape"] == {"size": 3}


def test_a_run_is_tracked_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    result(capsys, "fake")
    assert not Path("runs/fake/tensorboard").exists()
    result(capsys, "fake", "--overwrite", "--track", "tensorboard")
    assert list(Path("runs/fake/tensorboard/fake").iterdir())


def test_the_summary_is_a_table_without_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fake"]) == 0
    assert "config.rate" in capsys.readouterr().out


def test_values_come_from_preset_file_and_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text("rate: 5\nflag: false\n")
    argv = ("fake", "--preset", "large", "--config", "c.yaml", "--rate", "3")
    assert result(capsys, *argv)["config"] == {"rate": 3.0, "size": 99, "flag": False}


def test_resume_takes_the_stored_values(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("fake", "--run", "a", "--rate", "2", "--no-flag", "--seed", "4")
    first = result(capsys, *argv)
    assert "is not empty" in complaint(capsys, *argv)
    for again in (("fake", "--run=a", "--resume"), (*argv, "--resume")):
        assert result(capsys, *again) == {**first, "resumed": True}
    assert "other values of rate" in complaint(capsys, "fake", "--run", "a", "--resume", "--rate", "7")
    assert result(capsys, *argv, "--overwrite") == first


def test_reading_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    result(capsys, "fake", "--run", "a")
    before = Path("a/config.json").read_bytes()
    assert result(capsys, "look", "a", "--rate", "3")["config"]["rate"] == 3
    assert Path("a/config.json").read_bytes() == before
    assert "is not a run folder" in complaint(capsys, "look", "b")


def test_a_tool_has_actions_and_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert result(capsys, "tool", "put", "a", "--weight", "3") == {"put": "a", "weight": 3.0}
    assert result(capsys, "tool", "show")["things"] == [{"name": "n0", "weight": 0.0}, {"name": "n1", "weight": 1 / 3}]
    assert cli.main(["tool", "show"]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in ("name", "n1", "0.3333", "all"))
    assert not any(Path().iterdir())
    for argv, parts in (("tool --help", ("Show the things.", "put")), ("tool put --help", ("--weight", "--json"))):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv.split())
        assert not stop.value.code
        text = capsys.readouterr().out
        assert all(part in text for part in parts)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("tool", "Expected one of {show, put}"),
        ("tool shaw", "Unrecognized options: shaw"),
        ("tool put", "see internalrl tool --help"),
        ("tool show --run a", "Unrecognized options: --run"),
        ("tool put a --weight=-1", "internalrl: Nothing weighs less than 0; give another --weight."),
        ("fale", "'fale' is no subcommand; did you mean fake?"),
        ("xyzzy", "'xyzzy' is no subcommand; known are pretrain, discover"),
        ("fake --rat 3", "Unrecognized options: --rat, 3; did you mean --rate; see internalrl fake --help."),
        ("fake --rate abc", "Error parsing --rate"),
        ("fake --rate 0", "rate is 0.0; give a number above 0"),
        ("fake --seed -1", "--seed is -1"),
        ("fake --threads 0", "--threads is 0"),
        ("fake --config none.yaml", "Config file none.yaml cannot be read"),
        ("fake --config", "Missing value for argument '--config'"),
        ("fake --preset tiny", "fake has no preset 'tiny'; known are: large."),
        ("fake --resume", "There is no run to resume in runs/fake"),
        ("fake --resume --overwrite", "exclude each other"),
        ("fake --fail ours", "internalrl: The base is too small; give a larger one."),
        ("fake --fail value", "internalrl: task '9' names colour 9."),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], argv: str, message: str) -> None:
    assert message in complaint(capsys, *argv.split(), *(["--json"] if "--fail" in argv else []))


def test_interruption_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fake", "--fail", "interrupt"]) == 130
    assert "Continue with: internalrl fake --run runs/fake --resume" in capsys.readouterr().err
    awkward = "runs/it's $HOME; a run"
    assert cli.main(["fake", "--fail", "interrupt", "--run", awkward]) == 130
    told = shlex.split(capsys.readouterr().err.partition("Continue with: ")[2])
    assert told == ["internalrl", "fake", "--run", awkward, "--resume"]


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["fake", "--fail", "bug"])
    monkeypatch.setenv("INTERNALRL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="colour 9"):
        cli.main(["fake", "--run", "b", "--fail", "value"])


def test_stage_help_lists_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fake", "--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    for part in ("--shape.size", "The rate of things", "--resume", "runs/fake"):
        assert part in text


def test_help_is_instant() -> None:
    code = (
        "import sys; sys.argv = ['internalrl', '--help']; from internalrl.cli import main; main();"
        "print({'torch', 'numpy', 'gymnasium', 'tyro', 'yaml', 'rich'} & set(sys.modules) or 'light')"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert used < 1.0  # of processor time, which other work does not use up; about 0.06 s
    assert all(name in done.stdout for name in ("pretrain", "discover", "reinforce", "evaluate", "report", "demo"))
    assert done.stdout.endswith("light\n")
    assert (
        "0.1.0"
        in subprocess.run([sys.executable, "-m", "internalrl.cli", "--version"], capture_output=True, text=True).stdout
    )
