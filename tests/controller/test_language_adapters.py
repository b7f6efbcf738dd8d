"""Adapters of language models: several on one base, on the disk and in memory, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, PreTrainedModel

from internalrl.base.fingerprint import base_fingerprint
from internalrl.controller.adapter import CONFIG_FILE, TENSOR_FILE
from internalrl.controller.policy import Policy
from internalrl.controller.steered import SteeredModel
from internalrl.errors import InternalRLError
from internalrl.settings.stages import MetacontrollerConfig
from tests.support.language import (
    adapter_sizes,
    from_config,
    language_model,
    prompts,
    randomise,
    steered_language_model,
)
from tests.support.tiny import N_Z

TOKENS = prompts(2, 6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, and three adapters of it: with a policy, another one, and one of another layer and size."""
    folder = tmp_path_factory.mktemp("saved")
    first = steered_language_model(policy=True)
    first.base.save_pretrained(folder / "base")
    first.save_pretrained(folder / "first", {"discover": {"seed": 3}})
    randomise(first, seed=5, policy=True)
    first.save_pretrained(folder / "second")
    other = SteeredModel.from_base(first.base, adapter_sizes(layer=1, n_z=2))
    randomise(other, seed=9)
    other.save_pretrained(folder / "other")
    return folder


def loaded(saved: Path) -> SteeredModel:
    steered = SteeredModel.from_pretrained(saved / "base", saved / "first", "first")
    steered.load_adapter(saved / "second", "second")
    steered.load_adapter(saved / "other", "other")
    return steered


def output(steered: SteeredModel) -> torch.Tensor:
    return steered.generate(
        TOKENS, max_new_tokens=6, code_temperature=0.0, return_dict_in_generate=True, output_logits=True
    ).logits[-1]


def test_adapters_are_switched_by_name(saved: Path) -> None:
    steered = loaded(saved)
    found = {}
    for name in ("first", "second", "other"):
        steered.set_adapter(name)
        found[name] = output(steered)
        alone = SteeredModel.from_pretrained(steered.base, saved / name)
        assert torch.equal(found[name], output(alone))
        assert steered.tap.layer == alone.tap.layer
        assert (steered.policy is None) == (name == "other")
        assert steered.metacontroller.config == alone.metacontroller.config
    assert not torch.equal(found["first"], found["second"])
    steered.set_adapter("first")
    assert torch.equal(output(steered), found["first"])
    assert steered.provenance == {"discover": {"seed": 3}}


def test_what_is_set_belongs_to_the_active_adapter(saved: Path, tmp_path: Path) -> None:
    steered = loaded(saved)
    first = steered.policy
    steered.set_adapter("second")
    steered.policy = Policy(steered.metacontroller.width, N_Z, hidden=3, initial_std=1.0)
    steered.save_pretrained(tmp_path, {"reinforce": {"seed": 1}})
    steered.set_adapter("first")
    assert steered.policy is first
    assert steered.provenance == {"discover": {"seed": 3}}
    again = SteeredModel.from_pretrained(steered.base, tmp_path)
    assert again.provenance == {"discover": {"seed": 3}, "reinforce": {"seed": 1}}
    assert again.policy is not None
    assert again.policy.hidden == 3
    assert sum("policy.log_std" in name for name in steered.state_dict()) == 2


def test_adapters_are_deleted_by_name(saved: Path) -> None:
    steered = loaded(saved)
    with pytest.raises(InternalRLError, match="'first' is the active one"):
        steered.delete_adapter("first")
    steered.delete_adapter("second")
    assert not any(name.startswith("adapters.second.") for name in steered.state_dict())
    for call in (steered.set_adapter, steered.delete_adapter):
        with pytest.raises(InternalRLError, match="no adapter 'second'; known are first, other"):
            call("second")
    steered.load_adapter(saved / "second", "second")
    steered.set_adapter("second")


@pytest.mark.parametrize("name", ["first", "a.b", "", "pop"])
def test_names_that_cannot_be(saved: Path, name: str) -> None:
    with pytest.raises(InternalRLError, match=r"choose (another name|a plain word)"):
        loaded(saved).load_adapter(saved / "second", name)


def test_adapters_can_be_disabled(saved: Path) -> None:
    steered = loaded(saved)
    code, plain = torch.ones(N_Z), steered.base(input_ids=TOKENS).logits
    first, mixed = output(steered), steered(input_ids=TOKENS, code=code).logits
    with suppress(ZeroDivisionError), steered.disable_adapter():
        assert torch.equal(steered(input_ids=TOKENS).logits, plain)
        assert torch.equal(steered(input_ids=TOKENS, code=code).logits, plain)
        assert torch.equal(steered(steered.residual(TOKENS), code), plain)
        with steered.disable_adapter():
            pass
        assert not torch.equal(output(steered), first)
        raise ZeroDivisionError
    assert torch.equal(output(steered), first)
    assert torch.equal(steered(input_ids=TOKENS, code=code).logits, mixed)
    assert not torch.equal(mixed, plain)


def test_adapters_share_the_memory_of_their_base(saved: Path) -> None:
    steered = loaded(saved)
    another = SteeredModel.from_pretrained(steered.base, saved / "second")
    fresh = SteeredModel.from_base(another.base, MetacontrollerConfig())
    own = {name: t.data_ptr() for name, t in steered.base.state_dict().items()}
    for model in (another, fresh):
        assert model.base is steered.base
        assert {name: t.data_ptr() for name, t in model.base.state_dict().items()} == own
    parts = [{p.data_ptr() for p in adapter.parameters()} for adapter in steered.adapters.children()]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert not any(p.requires_grad for p in steered.base.parameters())


def test_an_adapter_is_small(tmp_path: Path) -> None:
    """At the sizes of a small model, width 256, an adapter with its policy takes a few hundred kB."""
    base = from_config(AutoConfig.for_model("gpt2", n_embd=256, n_layer=2, n_head=4, vocab_size=24))
    steered = SteeredModel.from_base(
        base, MetacontrollerConfig(rank=4, controller_hidden=16, encoder_hidden=64, n_s=32)
    )
    steered.policy = Policy(256, 8, hidden=64, initial_std=1.0)
    steered.save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 200e3 < size < 800e3
    assert size < 4.2 * sum(p.numel() for p in steered.adapter.parameters())


def test_fingerprint_is_that_of_the_function(saved: Path, tmp_path: Path) -> None:
    base = language_model()
    own = base_fingerprint(base)
    again = SteeredModel.from_pretrained(saved / "base", saved / "first").base
    assert base_fingerprint(again) == own
    base.save_pretrained(tmp_path)
    eager = type(base).from_pretrained(tmp_path, attn_implementation="eager")
    eager.generation_config.max_new_tokens = 7
    assert base_fingerprint(eager) == own
    assert base_fingerprint(language_model(rope_parameters={"rope_type": "default", "rope_theta": 5e3})) != own
    assert base_fingerprint(language_model(seed=1)) != own


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **values}))


def rewrite(folder: Path, **changes: torch.Tensor) -> None:
    """Other tensors, with a config that vouches for them."""
    data = safetensors.torch.save({**safetensors.torch.load_file(folder / TENSOR_FILE), **changes})
    (folder / TENSOR_FILE).write_bytes(data)
    edit(folder, tensors_sha256=hashlib.sha256(data).hexdigest())


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: os.truncate(f / TENSOR_FILE, 1000), "SHA-256 differ"),
    "another base": (lambda f: edit(f, base_fingerprint="0" * 64), "fingerprint 0000000000000000, but this Llama"),
    "no numbers": (lambda f: rewrite(f, **{"policy.log_std": torch.full((N_Z,), torch.nan)}), "log_std holds numbers"),
    "one tensor more": (lambda f: rewrite(f, **{"base.lm_head.weight": torch.zeros(2)}), "1 differ, the first is base"),
    "deeply nested": (lambda f: (f / CONFIG_FILE).write_text("[" * 100_000), "is no JSON"),
    "a pickle": (lambda f: (f / TENSOR_FILE).write_bytes(b"\x80\x04cos\nsystem\n."), "SHA-256 differ"),
    "a folder": (lambda f: ((f / TENSOR_FILE).unlink(), (f / TENSOR_FILE).mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_bad_adapter_is_refused_and_changes_nothing(saved: Path, tmp_path: Path, name: str) -> None:
    damage, why = DAMAGE[name]
    steered = loaded(saved)
    before, kept = output(steered), dict(steered.state_dict())
    for file in (saved / "second").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(InternalRLError, match=why) as refusal:
        steered.load_adapter(tmp_path, "bad")
    assert "\n" not in str(refusal.value)
    assert steered.state_dict().keys() == kept.keys()
    assert torch.equal(output(steered), before)


def test_adapters_of_other_models_are_refused(saved: Path) -> None:
    for base in (language_model(seed=1), language_model("qwen2")):
        with pytest.raises(InternalRLError, match="load the base that it was trained on"):
            SteeredModel.from_pretrained(base, saved / "first")


def test_sizes_may_be_anything_the_base_allows() -> None:
    base: PreTrainedModel = language_model()
    for layer in (1, 2, 3, "middle"):
        steered = SteeredModel.from_base(base, dataclasses.replace(MetacontrollerConfig(), layer=layer))
        assert steered.tap.layer == (2 if layer == "middle" else layer)
    with pytest.raises(InternalRLError, match="choose 1 to 3, or 'middle'"):
        SteeredModel.from_base(base, MetacontrollerConfig(layer=4))
