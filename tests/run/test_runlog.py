"""Run folders survive kills, full disks and foreign files; a resumed run is the uninterrupted one."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from internalrl.errors import InternalRLError
from internalrl.run.checkpoint import (
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from internalrl.run.files import PARTIAL
from internalrl.run.folder import RunFolder

CONFIG = {"rate": 0.1, "sizes": (1, 2)}


class KilledError(Exception):
    """Stands for a kill: nothing after it runs."""


def train(run: RunFolder, steps: int = 12, kill_at: int = -1) -> None:
    """A stage in small: both optimizers, both kinds of generator, a checkpoint every five steps."""
    torch.manual_seed(run.seed)
    numbers = np.random.default_rng(run.seed)
    noise = torch.Generator().manual_seed(run.seed)
    model = torch.nn.Linear(4, 3)
    muon = torch.optim.Muon([model.weight], lr=0.02)
    adamw = torch.optim.AdamW([model.bias], lr=0.1)
    start = 0
    if run.resumed and run.has_checkpoint("last"):
        tensors, state = run.load_checkpoint("last")
        model.load_state_dict({name: tensors[name] for name in model.state_dict()})
        load_optimizer(muon, tensors, state["muon"], "muon")
        load_optimizer(adamw, tensors, state["adamw"], "adamw")
        set_rng_state(state["rng"], numbers=numbers, noise=noise)
        start = state["step"] + 1
    run.rewind("train", start - 1)
    for step in range(start, steps):
        inputs = torch.randn(8, 4, generator=noise) + torch.rand(1) + float(numbers.normal())
        loss = model(inputs).square().mean()
        for optimizer in (muon, adamw):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (muon, adamw):
            optimizer.step()
        run.log("train", step, loss=loss.detach(), draw=numbers.random(dtype=np.float32))
        if step == kill_at:
            raise KilledError
        if step % 5 == 4:
            muon_tensors, muon_state = optimizer_tensors(muon, "muon")
            adamw_tensors, adamw_state = optimizer_tensors(adamw, "adamw")
            state = {"step": step, "muon": muon_state, "adamw": adamw_state}
            state["rng"] = rng_state(numbers=numbers, noise=noise)
            run.save_checkpoint("last", {**model.state_dict(), **muon_tensors, **adamw_tensors}, state)


@pytest.mark.parametrize("kill_at", [2, 7, 10])
def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, kill_at: int) -> None:
    train(RunFolder.create(tmp_path / "whole", CONFIG, seed=3))
    with pytest.raises(KilledError):
        train(RunFolder.create(tmp_path / "killed", CONFIG, seed=3), kill_at=kill_at)
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"stage": "tr')  # the kill came in the middle of a line
    (tmp_path / "killed" / "checkpoints" / f"{PARTIAL}x").write_bytes(b"half a checkpoint")
    train(RunFolder.create(tmp_path / "killed", CONFIG, seed=3, resume=True))
    whole, killed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    assert len(RunFolder.open(tmp_path / "killed").metrics("train")) == 12
    assert not list(tmp_path.rglob(f"{PARTIAL}*"))


def test_config_says_how_to_repeat_the_run(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG, seed=3)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["config"] == {"rate": 0.1, "sizes": [1, 2]}
    assert stored["seed"] == 3
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["hardware"]["cpu"]
    assert stored["threads"] == torch.get_num_threads()


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG, seed=3)
    run.log("train", 0, loss=1.0)
    with pytest.raises(InternalRLError, match="is not empty; add --resume"):
        RunFolder.create(run.path, CONFIG, seed=3)
    with pytest.raises(InternalRLError, match=r"other values of rate, seed"):
        RunFolder.create(run.path, {**CONFIG, "rate": 1}, seed=4, resume=True)
    assert len(run.metrics()) == 1
    assert not RunFolder.create(run.path, CONFIG, seed=4, overwrite=True).metrics()


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(InternalRLError, match=str(tmp_path)):
            RunFolder.create(tmp_path, CONFIG, seed=0, **options)
    with pytest.raises(InternalRLError, match="is not a run folder"):
        RunFolder.open(tmp_path)
    with pytest.raises(InternalRLError, match="is a file"):
        RunFolder.create(tmp_path / "thesis.tex", CONFIG, seed=0)
    with pytest.raises(InternalRLError, match="no run to resume"):
        RunFolder.create(tmp_path / "new", CONFIG, seed=0, resume=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(("code", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "Input/output")])
def test_failed_save_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    file = tmp_path / "last.safetensors"
    save_checkpoint(file, {"w": torch.ones(3)}, {"step": 1})
    before = file.read_bytes()

    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InternalRLError, match=reason):
        save_checkpoint(file, {"w": torch.zeros(3)}, {"step": 2})
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "last.safetensors"
    save_checkpoint(file, {"w": torch.ones(300)}, {"step": 1})
    whole = file.read_bytes()
    for data in (b"", whole[:5], whole[:60], whole[:-1], b"PK\x03\x04 something else" * 10):
        file.write_bytes(data)
        with pytest.raises(InternalRLError, match="cannot be read") as caught:
            load_checkpoint(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
    save_file({"w": torch.ones(3)}, file)
    with pytest.raises(InternalRLError, match="not an internalrl checkpoint"):
        load_checkpoint(file)
    with pytest.raises(InternalRLError, match="There is no checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_tied_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    save_checkpoint(tmp_path / "c", {"a": weight, "b": weight, "c": weight.T}, {})
    tensors, _ = load_checkpoint(tmp_path / "c")
    assert torch.equal(tensors["a"], weight)
    assert torch.equal(tensors["c"], weight.T)


def test_optimizer_of_another_model_is_refused() -> None:
    def stepped(*sizes: int) -> torch.optim.Optimizer:
        parameters = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
        optimizer = torch.optim.AdamW(parameters)
        torch.cat(parameters).sum().backward()
        optimizer.step()
        return optimizer

    tensors, state = optimizer_tensors(stepped(3, 4), "o")
    for other in (stepped(3, 5), stepped(3), stepped(3, 4, 5)):
        with pytest.raises(InternalRLError, match="resume with the config"):
            load_optimizer(other, tensors, state, "o")


def test_random_states_must_have_the_same_names() -> None:
    with pytest.raises(InternalRLError, match=r"expected \['data', 'torch_global'\]"):
        set_rng_state(rng_state(), data=np.random.default_rng(0))
