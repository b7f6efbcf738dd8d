"""Adapters on the disk: what is saved comes back bit-equal, and whatever does not fit is refused whole."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from internalrl.base.fingerprint import base_fingerprint
from internalrl.base.trajectory import load_trajectory_model
from internalrl.controller.adapter import CONFIG_FILE, TENSOR_FILE
from internalrl.controller.policy import Policy
from internalrl.controller.steered import SteeredModel
from internalrl.errors import InternalRLError
from tests.support.tiny import N_Z, SIZES, WIDTH, codes, tiny_base, tiny_steered, walks, widen


def steered_with_policy() -> SteeredModel:
    steered = tiny_steered()
    steered.policy = Policy(WIDTH, N_Z, hidden=6, initial_std=1.2)
    widen(steered.policy, 0.5, 9)
    return steered


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter with a policy, on `tiny_base()`."""
    steered_with_policy().save_pretrained(tmp_path / "adapter", {"discover": {"steps": 800}})
    return tmp_path / "adapter"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def edit(folder: Path, **values: Any) -> None:
    """Change entries of the config; a name like metacontroller__rank is a nested one."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    for name, value in values.items():
        *path, last = name.split("__")
        place = config
        for part in path:
            place = place[part]
        place[last] = value
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def rewrite(folder: Path, data: bytes) -> None:
    """Put other tensors in, with a config that vouches for them."""
    (folder / TENSOR_FILE).write_bytes(data)
    edit(folder, tensors_sha256=hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("policy", [True, False])
def test_round_trip_is_bit_equal(tmp_path: Path, policy: bool) -> None:
    saved = steered_with_policy() if policy else tiny_steered()
    saved.save_pretrained(tmp_path)
    base, state = tiny_base(), torch.get_rng_state()
    loaded = SteeredModel.from_pretrained(base, tmp_path)
    assert torch.equal(state, torch.get_rng_state())  # loading draws no random numbers
    assert saved.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in saved.state_dict().items())
    residual, code = loaded.residual(walks(3, 7)), codes(3, 7)
    assert torch.equal(saved(residual, code), loaded(residual, code))
    assert (loaded.policy is None) != policy
    if loaded.policy is not None and saved.policy is not None:
        assert torch.equal(saved.policy.log_prob(residual, code), loaded.policy.log_prob(residual, code))
    learned = [p.requires_grad for name, p in loaded.named_parameters() if not name.startswith("base.")]
    assert all(learned)
    assert not any(p.requires_grad for p in loaded.base.parameters())


def test_provenance_grows_from_stage_to_stage(folder: Path, tmp_path: Path) -> None:
    steered = SteeredModel.from_pretrained(tiny_base(), folder)
    assert steered.provenance == {"discover": {"steps": 800}}
    steered.save_pretrained(tmp_path / "next", {"reinforce": {"episodes": 5}})
    config = json.loads((tmp_path / "next" / CONFIG_FILE).read_text())
    assert config["provenance"] == {"discover": {"steps": 800}, "reinforce": {"episodes": 5}}
    assert config["metacontroller"]["layer"] == 1
    assert config["policy_hidden"] == 6


def test_the_base_may_come_from_a_folder(tmp_path: Path) -> None:
    saved = steered_with_policy()
    saved.base.save_pretrained(tmp_path / "base")
    saved.save_pretrained(tmp_path / "adapter")
    loaded = SteeredModel.from_pretrained(tmp_path / "base", tmp_path / "adapter")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in saved.state_dict().items())
    fresh = SteeredModel.from_base(tmp_path / "base", SIZES)
    assert base_fingerprint(fresh.base) == base_fingerprint(saved.base)
    assert SteeredModel.from_base(fresh.base, SIZES).base is fresh.base


def test_a_base_folder_that_is_not_whole(tmp_path: Path) -> None:
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    cut = (tmp_path / "base" / "model.safetensors").read_bytes()[:-100]
    (tmp_path / "base" / "model.safetensors").write_bytes(cut)
    for name, why in (("base", "no whole"), ("nowhere", "No such file")):
        with pytest.raises(InternalRLError, match=why):
            SteeredModel.from_base(tmp_path / name, SIZES)
    LlamaForCausalLM(tiny_llama()).save_pretrained(tmp_path / "llama")
    with pytest.raises(InternalRLError, match="a llama model"):
        load_trajectory_model(tmp_path / "llama")


def tiny_llama() -> LlamaConfig:
    return LlamaConfig(vocab_size=7, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)


def test_fingerprint_depends_on_the_function_and_on_nothing_else(tmp_path: Path) -> None:
    base = tiny_base()
    own = base_fingerprint(base)
    assert own == base_fingerprint(tiny_base())
    assert own != base_fingerprint(tiny_base(seed=1))
    assert own != base_fingerprint(tiny_base(relative_distance=32))  # the same tensors, used otherwise
    with torch.no_grad():
        base.action_head.bias[0] += 1
    assert own != base_fingerprint(base)  # it is remembered, but not after a change
    with torch.no_grad():
        base.action_head.bias[0] -= 1
    base.load_state_dict(tiny_base().state_dict())
    assert own == base_fingerprint(base)
    language_model = LlamaForCausalLM(tiny_llama())
    language_model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert base_fingerprint(language_model) == base_fingerprint(again)


def test_a_wrong_base_is_named_with_both_fingerprints(folder: Path) -> None:
    other = tiny_base(seed=5)
    with pytest.raises(InternalRLError) as refusal:
        SteeredModel.from_pretrained(other, folder)
    for base in (tiny_base(), other):
        assert base_fingerprint(base)[:16] in str(refusal.value)


def flip_a_bit(folder: Path) -> None:
    data = (folder / TENSOR_FILE).read_bytes()
    (folder / TENSOR_FILE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def drop_a_tensor(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / TENSOR_FILE)
    del tensors["metacontroller.up"]
    rewrite(folder, safetensors.torch.save(tensors))


def halve_precision(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / TENSOR_FILE)
    rewrite(folder, safetensors.torch.save({name: tensor.half() for name, tensor in tensors.items()}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: os.truncate(f / TENSOR_FILE, 300), "SHA-256 differ"),
    "one bit": (flip_a_bit, "SHA-256 differ"),
    "no tensors": (lambda f: (f / TENSOR_FILE).unlink(), "No such file"),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), "No such file"),
    "torn config": (lambda f: os.truncate(f / CONFIG_FILE, 200), "is no JSON"),
    "binary config": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"), "is no JSON"),
    "a list": (lambda f: (f / CONFIG_FILE).write_text("[]"), "its method is None"),
    "another library's": (lambda f: (f / CONFIG_FILE).write_text('{"peft_type": "X"}'), "its method is None"),
    "a later version": (lambda f: edit(f, method="internal-rl-9"), "'internal-rl-9', expected"),
    "unknown key": (lambda f: edit(f, colour=1), "colour is no option"),
    "unknown size": (lambda f: edit(f, metacontroller__rnak=1), "did you mean metacontroller.rank"),
    "wrong type": (lambda f: edit(f, metacontroller__rank="2"), "rank must be a whole number"),
    "policy of text": (lambda f: edit(f, policy_hidden="6"), "policy_hidden must be a whole number or null"),
    "negative size": (lambda f: edit(f, metacontroller__n_z=-1), "metacontroller.n_z is -1; give 1 or more"),
    "no fingerprint": (lambda f: edit(f, base_fingerprint="0" * 65), "must be 64 hexadecimal digits"),
    "policy of no width": (lambda f: edit(f, policy_hidden=0), "policy_hidden is 0; give 1 or more"),
    "layer too high": (lambda f: edit(f, metacontroller__layer=2), "layer is 2"),
    "more slow features than dimensions": (lambda f: edit(f, metacontroller__slow_features=17), "give fewer"),
    "other size": (lambda f: edit(f, metacontroller__rank=3), "do not have the sizes"),
    "absurd size": (lambda f: edit(f, metacontroller__rank=10**9), "do not have the sizes"),
    "sizes beyond any memory": (lambda f: edit(f, metacontroller__n_h=10**9), "beyond any tensor"),
    "sizes beyond any number": (lambda f: edit(f, metacontroller__n_z=10**30), "beyond any tensor"),
    "policy beyond any memory": (lambda f: edit(f, policy_hidden=10**10), "beyond any tensor"),
    "numbers that JSON has not": (lambda f: edit(f, provenance={"reward": math.nan}), "is no JSON"),
    "policy not told": (lambda f: edit(f, policy_hidden=None), "do not have the sizes"),
    "no safetensors": (lambda f: rewrite(f, b"PK\x03\x04 a pickle in a zip archive"), "no safetensors file"),
    "empty": (lambda f: rewrite(f, b""), "no safetensors file"),
    "tensor missing": (drop_a_tensor, "metacontroller.up"),
    "half": (halve_precision, "do not have the sizes"),
}


def with_a_wide_policy(steered: SteeredModel) -> None:
    steered.policy = Policy(2 * WIDTH, N_Z, hidden=6, initial_std=1.2)


UNUSUAL: dict[str, tuple[Callable[[SteeredModel], Any], str | None]] = {
    "bfloat16": (lambda s: s.to(torch.bfloat16), None),
    "float16": (lambda s: s.to(torch.float16), None),
    "float64": (lambda s: s.double(), None),
    "bfloat16 adapter": (lambda s: s.adapter.to(torch.bfloat16), None),
    "a book remembered": (lambda s: s.provenance.update(book="x" * 2**20), "bytes of provenance"),
    "a mean of nothing remembered": (lambda s: s.provenance.update(reward=math.nan), None),
    "not a number": (lambda s: s.metacontroller.up.data.fill_(torch.nan), "up holds numbers that are not finite"),
    "beyond float32": (lambda s: s.double().metacontroller.up.data.fill_(1e300), "up holds numbers"),
    "another width": (with_a_wide_policy, "do not have the sizes"),
    "more slow features": (lambda s: s.metacontroller.register_buffer("slow", torch.zeros(WIDTH, 3)), "have the sizes"),
    "a set remembered": (lambda s: s.provenance.update(colours={1, 2}), "not JSON serializable"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_saved_can_be_loaded_and_all_else_is_refused(tmp_path: Path, name: str) -> None:
    (change, why), steered, folder = UNUSUAL[name], steered_with_policy(), tmp_path / "adapter"
    change(steered)
    if why is not None:
        with pytest.raises(InternalRLError, match=f"not saved, as it could not be loaded again: .*{why}") as refusal:
            steered.save_pretrained(folder)
        assert "\n" not in str(refusal.value)
        assert not folder.exists()
        return
    steered.save_pretrained(folder)
    loaded = SteeredModel.from_pretrained(steered.base, folder)
    assert {parameter.dtype for parameter in loaded.adapter.parameters()} == {torch.float32}
    for key, tensor in steered.adapter.state_dict().items():
        assert torch.equal(tensor.float(), loaded.adapter.state_dict()[key])


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_foreign_adapter_is_refused_in_one_sentence(folder: Path, name: str) -> None:
    damage, why = DAMAGE[name]
    damage(folder)
    base = tiny_base()
    before = base_fingerprint(base)
    with pytest.raises(InternalRLError) as refusal:
        SteeredModel.from_pretrained(base, folder)
    message = str(refusal.value)
    assert why in message
    assert "\n" not in message
    assert base_fingerprint(base) == before


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    steered_with_policy().save_pretrained(tmp_path)
    SteeredModel.from_pretrained(tiny_base(), tmp_path)
    assert set(contents(tmp_path)) == {CONFIG_FILE, TENSOR_FILE}


def test_an_adapter_is_as_large_as_its_parameters(folder: Path) -> None:
    steered = steered_with_policy()
    learned = sum(p.numel() for name, p in steered.named_parameters() if not name.startswith("base."))
    sizes = {name: len(data) for name, data in contents(folder).items()}
    assert 4 * learned < sizes[TENSOR_FILE] < 4 * learned + 4096
    assert sizes[CONFIG_FILE] < 2048


@pytest.mark.parametrize(("function", "call"), [("fsync", 1), ("fsync", 2), ("replace", 1)])
def test_a_full_disk_harms_no_older_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int
) -> None:
    before, calls, real = contents(folder), 0, getattr(os, function)

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, function, full)
    newer = steered_with_policy()
    widen(newer.metacontroller, 0.1, 3)
    with pytest.raises(InternalRLError, match="the disk is full"):
        newer.save_pretrained(folder)
    assert contents(folder) == before
    newer.save_pretrained(folder)  # there is space again
    assert contents(folder) != before
    SteeredModel.from_pretrained(tiny_base(), folder)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InternalRLError, match="Cannot write"):
        tiny_steered().save_pretrained(tmp_path / "file")
