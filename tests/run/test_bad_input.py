"""Mistakes and mishaps at the command line: one sentence, exit code 2, and no file harmed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from transformers import LlamaConfig

from internalrl import cli
from internalrl.base import pretrain
from internalrl.controller.adapter import CONFIG_FILE, TENSOR_FILE
from internalrl.errors import InternalRLError
from internalrl.run import loop
from internalrl.run.folder import RunFolder
from internalrl.settings.schema import to_dict
from tests.support import stages

pytestmark = pytest.mark.filterwarnings("ignore:The switch has collapsed")

PRETRAIN = ("pretrain", "--config", "pretrain.yaml")
DISCOVER = ("discover", "--config", "discover.yaml")
REINFORCE = ("reinforce", "--config", "reinforce.yaml")
NEW = ("--run", "new")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs of the three stages, and the runs pretrained, discovered and reinforced, made at the command line."""
    folder = tmp_path_factory.mktemp("finished")
    configs = {
        "pretrained": ("pretrain", stages.PRETRAIN),
        "discovered": ("discover", stages.discover(Path("pretrained"))),
        "reinforced": ("reinforce", replace(stages.reinforce(Path("discovered")), episodes=32)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for run, (stage, config) in configs.items():
            Path(f"{stage}.yaml").write_text(yaml.safe_dump(to_dict(config)))
            assert cli.main([stage, "--config", f"{stage}.yaml", "--run", run]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory holds a copy of them."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def files() -> dict[str, bytes]:
    """Everything in the working directory but the run `new`."""
    found = (file for file in Path().rglob("*") if file.is_file() and file.parts[0] != "new")
    return {str(file): file.read_bytes() for file in found}


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run what must fail, and return what it says after any progress: one line, a sentence."""
    capsys.readouterr()
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("internalrl: ") == 1
    said = captured.err.splitlines()[-1]
    assert said.startswith("internalrl: ")
    assert said.endswith(".")
    return said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((*PRETRAIN, *NEW, "--grid.size", "2"), "do not fit on 2 × 2 = 4 cells"),
        ((*PRETRAIN, *NEW, "--grid.size", "9"), "a grid has 2 to 8 cells a side"),
        ((*PRETRAIN, *NEW, "--grid.colors", "7"), "no pretraining tasks of 3 subgoals for 7 colours"),
        ((*PRETRAIN, *NEW, "--grid.colors", "10", "--grid.walls", "13"), "let the agent reach all 10 colours"),
        ((*REINFORCE, *NEW, "--task", "0-9"), "task '0-9' names colour 9; this grid has colours 0 to 5"),
        ((*REINFORCE, *NEW, "--task", "0-red"), "is not a list of colours"),
        ((*REINFORCE, *NEW, "--task", "1-1"), "seeks a colour twice in a row"),
        (("evaluate", "reinforced", "--task", "6"), "task '6' names colour 6; this grid has colours 0 to 5"),
        (("evaluate", "reinforced", "--episodes", "0"), "--episodes is 0"),
        (("evaluate", "reinforced", "--prompts", "p.jsonl"), "are for language models"),
        ((*DISCOVER, *NEW, "--metacontroller.layer", "2"), "layer is 2, but this model has 2 blocks: choose 1 to 1"),
        ((*DISCOVER, *NEW, "--metacontroller.layer", "0"), "layer is 0"),
        ((*DISCOVER, *NEW, "--metacontroller.layer", "low"), "--metacontroller.layer"),
        ((*DISCOVER, *NEW, "--metacontroller.slow-features", "17"), "the residual stream has 16 dimensions"),
        ((*DISCOVER, *NEW, "--base", "nowhere"), "nowhere/base holds no whole TrajectoryModel"),
        ((*REINFORCE, *NEW, "--discovered", "nowhere"), "nowhere/base holds no whole"),
        ((*REINFORCE, *NEW, "--discovered", "pretrained"), "adapter_config.json cannot be read"),
        (("evaluate", "discovered", "--task", "0"), "has no policy to choose codes with"),
        (("evaluate", "nowhere"), "is not a run folder"),
    ],
    ids=lambda value: " ".join(value[3:]) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = files()
    assert message in complaint(capsys, *argv)
    assert files() == before
    assert not Path("new").exists()


def test_what_cannot_be_done_replaces_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    before = files()
    complaint(capsys, *DISCOVER, "--base", "nowhere", "--run", "discovered", "--overwrite")
    complaint(capsys, *REINFORCE, "--discovered", "nowhere", "--run", "reinforced", "--overwrite")
    assert files() == before


# ---------------------------------------------------------------------------------- damaged and foreign files


def cut(name: str) -> Callable[[], None]:
    return lambda: os.truncate(name, os.path.getsize(name) - 100)


def put(name: str, source: str) -> Callable[[], None]:
    return lambda: Path(name).write_bytes(Path(source).read_bytes())


def foreign_tensors(name: str) -> Callable[[], None]:
    return lambda: Path(name).write_bytes(safetensors.torch.save({"weight": torch.ones(3)}))


def another_model(folder: str) -> Callable[[], None]:
    return lambda: LlamaConfig().save_pretrained(folder)


def another_width() -> None:
    config = json.loads(Path("pretrained/base/config.json").read_text())
    config["backbone"]["hidden_size"] = 32
    Path("pretrained/base/config.json").write_text(json.dumps(config))


def another_base() -> None:
    tensors = safetensors.torch.load_file("discovered/base/model.safetensors")
    tensors["action_head.bias"] += 1
    safetensors.torch.save_file(tensors, "discovered/base/model.safetensors", {"format": "pt"})


CHECKPOINT, BASE = "discovered/checkpoints/discover.safetensors", "pretrained/base/model.safetensors"
RESUME, AGAIN = ("discover", "--run", "discovered", "--resume"), (*DISCOVER, *NEW)
REINFORCE_AGAIN, EVALUATE = (*REINFORCE, *NEW), ("evaluate", "reinforced", "--task", "0", "--episodes", "4")
ADAPTER = f"discovered/adapter/{TENSOR_FILE}"

DAMAGE: dict[str, tuple[Callable[[], Any], tuple[str, ...], str]] = {
    "checkpoint cut": (cut(CHECKPOINT), RESUME, "cannot be read"),
    "checkpoint of another stage": (
        put(CHECKPOINT, "pretrained/checkpoints/pretrain.safetensors"), RESUME, "do not fit Metacontroller",
    ),
    "checkpoint no checkpoint": (foreign_tensors(CHECKPOINT), RESUME, "not an internalrl checkpoint"),
    "checkpoint no tensors": (put(CHECKPOINT, "discover.yaml"), RESUME, "cannot be read"),
    "run of another stage": (lambda: None, ("discover", "--run", "pretrained", "--resume"), "pretrained"),
    "base cut": (cut(BASE), AGAIN, "holds no whole TrajectoryModel"),
    "base without some tensors": (foreign_tensors(BASE), AGAIN, "holds no whole TrajectoryModel"),
    "base of other sizes": (another_width, AGAIN, "holds no whole TrajectoryModel"),
    "base another model": (another_model("pretrained/base"), AGAIN, "it holds a llama model"),
    "base of a run cut": (cut("reinforced/base/model.safetensors"), EVALUATE, "holds no whole TrajectoryModel"),
    "adapter cut": (cut(ADAPTER), REINFORCE_AGAIN, "the SHA-256 differ"),
    "adapter of another method": (
        put(f"discovered/adapter/{CONFIG_FILE}", "discovered/config.json"), REINFORCE_AGAIN, "its method is None",
    ),
    "adapter of another base": (another_base, REINFORCE_AGAIN, "was trained on the base with fingerprint"),
    "adapter of a run cut": (cut(f"reinforced/adapter/{TENSOR_FILE}"), EVALUATE, "the SHA-256 differ"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_foreign_files(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, argv, message = DAMAGE[name]
    damage()
    before = files()
    assert message in complaint(capsys, *argv)
    assert files() == before
    assert not Path("new").exists()


# ---------------------------------------------------------------------------------- what happens on the way


def test_a_loss_that_is_not_a_number(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The run stops with its last checkpoint, and goes on from there once it is healthy again."""
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    healthy, checkpoint = pretrain.losses, Path("new/checkpoints/pretrain.safetensors")
    kept = []

    def sick(*given: Any) -> Any:
        action, observation = healthy(*given)
        if not checkpoint.exists():
            return action, observation
        kept.append(checkpoint.read_bytes())
        return action, observation * float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "losses", sick)
        assert "The loss is nan; lower the learning rate" in complaint(capsys, *PRETRAIN, *NEW)
    assert kept == [checkpoint.read_bytes()]
    assert cli.main([*PRETRAIN, *NEW, "--resume"]) == 0
    assert Path("new/base/model.safetensors").read_bytes() == Path("pretrained/base/model.safetensors").read_bytes()


def test_a_gradient_that_is_not_a_number_reaches_no_weight() -> None:
    """√x at 0 is as finite as a loss can be; its slope is not."""
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(InternalRLError, match=r"norm of the gradient is (nan|inf)"):
        loop.optimise(weight.sqrt().sum(), torch.optim.SGD([weight], lr=0.1))
    assert not weight.any()


@pytest.mark.parametrize(
    ("command", "compared"),
    [
        (PRETRAIN, ("metrics.jsonl", "base/model.safetensors")),
        (REINFORCE, ("metrics.jsonl", "base/config.json", f"adapter/{TENSOR_FILE}")),
    ],
)
def test_a_full_disk(
    command: tuple[str, ...],
    compared: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whichever file does not fit any more: no other one suffers, and with space again the run ends as it should."""
    before, sync = files(), os.fsync
    for allowed in range(20):
        shutil.rmtree("new", ignore_errors=True)
        left = iter(range(allowed))

        def full(handle: int, left: Any = left) -> None:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(handle)

        monkeypatch.setattr(os, "fsync", full)
        capsys.readouterr()
        if cli.main([*command, *NEW]) == 0:
            break
        began, told = Path("new/config.json").exists(), capsys.readouterr().err
        assert "the disk is full; free some space." in told
        assert ("Continue with: internalrl" in told) == began
        monkeypatch.setattr(os, "fsync", sync)
        assert not [file for file in Path("new").rglob("*") if file.name.startswith(".partial-")]
        assert cli.main([*command, *NEW, *(["--resume"] if began else [])]) == 0
        finished = "pretrained" if command is PRETRAIN else "reinforced"
        assert all(Path("new", name).read_bytes() == Path(finished, name).read_bytes() for name in compared)
    assert allowed >= 5
    assert files() == before


def test_a_full_disk_while_logging(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {}, seed=0)
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(InternalRLError, match=r"metrics.jsonl: the disk is full"):
        run.log("pretrain", 0, loss=1.0)
