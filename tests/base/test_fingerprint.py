"""Fingerprints: the same weights are the same base in every precision, and other weights never are."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from internalrl.base.fingerprint import base_fingerprint, same_base
from internalrl.base.loading import load_base
from internalrl.controller.steered import SteeredModel
from tests.support.language import language_model
from tests.support.tiny import SIZES, tiny_base, tiny_steered

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("trajectory", "llama", "gpt2", "mixtral")


def model(kind: str) -> PreTrainedModel:
    return tiny_base() if kind == "trajectory" else language_model(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained_in", PRECISIONS[:3])
def test_a_conversion_makes_no_other_base(kind: str, trained_in: torch.dtype) -> None:
    own = base_fingerprint(model(kind).to(trained_in))
    assert len(own) == 64
    for precision in PRECISIONS:
        assert same_base(own, base_fingerprint(model(kind).to(trained_in).to(precision)))


def test_a_conversion_on_the_disk_makes_no_other_base(tmp_path: Path) -> None:
    for kind, precision in itertools.product(KINDS, PRECISIONS[1:3]):
        base = model(kind)
        own = base_fingerprint(base)
        folder = tmp_path / f"{kind} {precision}"
        base.to(precision).save_pretrained(folder)
        assert same_base(own, base_fingerprint(load_base(folder)))


def test_weights_that_were_rounded_are_seen_through_both_halves() -> None:
    """Why one half would not do: what float16 has rounded, bfloat16 rounds otherwise."""
    own, as_float16 = (base_fingerprint(tiny_base().to(precision)) for precision in (torch.float32, torch.float16))
    as_bfloat16 = base_fingerprint(tiny_base().to(torch.bfloat16))
    assert own[:32] == as_bfloat16[:32] != as_float16[:32]
    assert own[32:] == as_float16[32:] != as_bfloat16[32:]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_of_training_makes_another_base(precision: torch.dtype) -> None:
    base = language_model().to(precision)
    own = base_fingerprint(base)
    tokens = torch.arange(12).reshape(2, 6)
    base(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.SGD(base.parameters(), lr=0.1).step()
    assert not same_base(own, base_fingerprint(base))


def test_one_number_that_changes_visibly_makes_another_base() -> None:
    base = language_model()
    own = base_fingerprint(base)
    with torch.no_grad():
        base.get_input_embeddings().weight[3, 5] *= 1.02
    assert not same_base(own, base_fingerprint(base))


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(PRECISIONS[:3], 2)))
def test_an_adapter_goes_on_to_another_precision(tmp_path: Path, first: torch.dtype, second: torch.dtype) -> None:
    """Of bases that were trained in the first one."""
    base = language_model().to(first)
    steered = SteeredModel.from_base(base, SIZES)
    steered.save_pretrained(tmp_path / "first")
    again = SteeredModel.from_pretrained(base.to(second), tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    for precision in (first, second):
        converted = language_model().to(first).to(precision)
        assert SteeredModel.from_pretrained(converted, tmp_path / "second").base is converted


def test_an_adapter_keeps_to_the_base_that_it_was_first_trained_on(tmp_path: Path) -> None:
    steered = tiny_steered()
    steered.save_pretrained(tmp_path / "first")
    SteeredModel.from_pretrained(tiny_base().bfloat16(), tmp_path / "first").save_pretrained(tmp_path / "second")
    assert SteeredModel.from_pretrained(tiny_base().half(), tmp_path / "second")
