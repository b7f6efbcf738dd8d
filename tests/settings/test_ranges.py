"""Numbers out of range: refused when a config is made, in one sentence that names the option as it was typed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from internalrl import cli, demo
from internalrl.errors import InternalRLError, OptionError
from internalrl.run.folder import RunFolder
from internalrl.settings.demos import DemoConfig
from internalrl.settings.ranges import Range
from internalrl.settings.schema import from_dict
from internalrl.settings.stages import (
    BaseConfig,
    ConsolidateConfig,
    DiscoverConfig,
    EvaluateConfig,
    ReinforceConfig,
    ReportConfig,
)

ANY_NUMBER = {"switch_bias", "reward_weights"}


@pytest.fixture(autouse=True)
def nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is not refused fails its test instead of training."""

    def begin(*given: Any, **options: Any) -> None:
        raise AssertionError("the run was not refused")

    monkeypatch.setattr(RunFolder, "create", begin)


def numbers(config: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Range | None]]:
    """Paths and ranges of all numbers in a config; the grid's sizes have checks of their own."""
    hints = get_type_hints(config, include_extras=True)
    for name, hint in get_type_hints(config).items():
        if is_dataclass(hint) and name != "grid":
            yield from numbers(hint, (*path, name))
        elif {int, float} & {hint, *getattr(hint, "__args__", ())}:
            found = [extra for extra in getattr(hints[name], "__metadata__", ()) if isinstance(extra, Range)]
            yield (*path, name), (found[0] if found else None)


NUMBERS = dict(numbers(DemoConfig))


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {path[0]: nested(path[1:], value) if path[1:] else value}


def test_every_number_has_a_range() -> None:
    everything = [*NUMBERS.items(), *numbers(EvaluateConfig), *numbers(ReportConfig)]
    assert len(everything) > 60
    assert {path[-1] for path, allowed in everything if allowed is None} == ANY_NUMBER


@pytest.mark.parametrize("path", [path for path, allowed in NUMBERS.items() if allowed], ids=".".join)
def test_numbers_out_of_range_are_refused(path: tuple[str, ...]) -> None:
    allowed = NUMBERS[path]
    assert allowed is not None
    beyond = [allowed.low if allowed.above else allowed.low - 1]
    beyond += [allowed.high + 1] if allowed.high < math.inf else []
    for value in beyond:
        with pytest.raises(InternalRLError, match=rf"^f.yaml: {'.'.join(path)} is {value}.*; give .*\.$"):
            from_dict(DemoConfig, nested(path, value), where="f.yaml")


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "text"),
    [
        (Range(1), (1, 7), (0, math.inf, math.nan), "1 or more"),
        (Range(0, above=True), (1e-9, 3), (0, -1, math.inf, math.nan), "a number above 0"),
        (Range(-5, 2), (-5, 0.5, 2), (-5.1, 2.1, math.nan), "a number from -5 to 2"),
    ],
)
def test_ranges(allowed: Range, inside: tuple[float, ...], outside: tuple[float, ...], text: str) -> None:
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)
    assert str(allowed) == text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("pretrain --steps 0", "--steps is 0; give 1 or more."),
        ("pretrain --lr -1", "--lr is -1.0; give a number above 0."),
        ("pretrain --lr nan", "--lr is nan; give a number above 0."),
        ("pretrain --crop 1.5", "--crop is 1.5; give a number from 0 to 1."),
        ("pretrain --noise -0.1", "--noise is -0.1; give a number from 0 to 1."),
        ("pretrain --grid.size 9", "--grid.size is 9; a grid has 2 to 8 cells a side"),
        ("pretrain --grid.walls -1", "--grid.walls is -1; a grid needs at least"),
        ("pretrain --base.heads 3", "--base.heads is 3; the width, 128, must split into heads of even size;"),
        ("pretrain --base.heads 128", "--base.heads is 128; the width, 128, must split"),
        ("pretrain --base.relative-distance 16", "--base.relative-distance is 16; give more than half the number"),
        ("discover --batches 0", "--batches is 0; give 1 or more."),
        ("discover --kl-coef -1", "--kl-coef is -1.0; give 0 or more."),
        ("discover --random-switch 2", "--random-switch is 2.0; give a number from 0 to 1."),
        ("discover --switch-steps 0", "--switch-steps is 0; give 1 or more."),
        ("discover --metacontroller.rank -1", "--metacontroller.rank is -1; give 1 or more;"),
        ("discover --metacontroller.n-z 0", "--metacontroller.n-z is 0; give 1 or more;"),
        ("discover --metacontroller.horizon 0", "--metacontroller.horizon is 0; give 1 or more;"),
        ("discover --metacontroller.layer 0", "--metacontroller.layer is 0; give 1 or more;"),
        ("discover --consolidate.episodes 0", "--consolidate.episodes is 0; give 1 or more;"),
        ("reinforce --batch-size 1", "--batch-size is 1; give 2 or more."),
        ("reinforce --epochs 0", "--epochs is 0; give 1 or more."),
        ("reinforce --initial-std 0", "--initial-std is 0.0; give a number above 0."),
        ("reinforce --temperature -1", "--temperature is -1.0; give 0 or more."),
        ("evaluate run --episodes 0", "--episodes is 0; give 1 or more."),
        ("report run --episodes 0", "--episodes is 0; give 1 or more."),
        ("demo --discover.consolidate.switch-coef -1", "--discover.consolidate.switch-coef is -1.0; give 0 or more;"),
        ("demo --pretrain.grid.colors 0", "--pretrain.grid.colors is 0; a grid needs at least one colour"),
        ("demo --reinforce.episodes 9", "--reinforce.episodes is 9, and --discover.consolidate.episodes takes"),
        ("demo --reinforce.task 8", "task '8' names colour 8; this grid has colours 0 to 7."),
        ("demo --discover.metacontroller.layer 4", "layer is 4, but this model has 4 blocks: choose 1 to 3"),
        ("demo --discover.metacontroller.slow-features 129", "slow_features is 129, but the residual stream has 128"),
        ("demo --pretrain.grid.colors 7", "no pretraining tasks of 3 subgoals for 7 colours"),
    ],
)
def test_at_the_command_line(
    argv: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"internalrl: {message}")
    assert captured.err.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "values", "message"),
    [
        ("discover", {"switch_lr": 0}, "f.yaml: switch_lr is 0.0; give a number above 0."),
        ("pretrain", {"base": {"heads": 3}}, "f.yaml: base.heads is 3; the width, 128, must split"),
        ("demo", {"pretrain": {"grid": {"size": 1}}}, "f.yaml: pretrain.grid.size is 1; a grid has 2 to 8"),
        ("demo", {"reinforce": {"episodes": 9}}, "--reinforce.episodes is 9, and --discover.consolidate.episodes"),
    ],
)
def test_in_a_yaml_file(
    command: str,
    values: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.yaml").write_text(yaml.safe_dump(values))
    assert cli.main([command, "--config", "f.yaml"]) == 2
    assert capsys.readouterr().err.startswith(f"internalrl: {message}")
    assert [file.name for file in tmp_path.iterdir()] == ["f.yaml"]


def test_the_demo_leaves_episodes_to_internal_rl() -> None:
    """What a file and the command line say is put together before it is judged."""
    config = DemoConfig(reinforce=ReinforceConfig(episodes=9))
    with pytest.raises(InternalRLError, match=f"takes {config.discover.consolidate.episodes} of them"):
        demo.check(config)
    for off in (ConsolidateConfig(enabled=False), ConsolidateConfig(episodes=8)):
        demo.check(replace(config, discover=DiscoverConfig(consolidate=off)))


def test_in_python() -> None:
    """The error is a ValueError that names the field."""
    with pytest.raises(OptionError, match=r"^kl_coef is -1; give 0 or more\.$"):
        DiscoverConfig(kl_coef=-1)
    with pytest.raises(ValueError, match="heads is 3"):
        BaseConfig(heads=3)
