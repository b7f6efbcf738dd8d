"""Inside `torch.inference_mode()`, where tensors count no versions, everything works that needs no gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from internalrl.controller.steered import SteeredModel
from tests.support.language import adapter_sizes, language_model, prompts, randomise
from tests.support.tiny import codes, decode, discovery, tiny_base, tiny_steered, walks

TOKENS = prompts(2, 6)


def test_language_models_are_made_saved_loaded_and_used(tmp_path: Path) -> None:
    with torch.inference_mode():
        steered = SteeredModel.from_base(language_model(), adapter_sizes())
        randomise(steered, 0, policy=True)
        steered.save_pretrained(tmp_path)
        again = SteeredModel.from_pretrained(language_model(), tmp_path)
        again.load_adapter(tmp_path, "other")
        expected = steered.generate(TOKENS, max_new_tokens=4, code_temperature=0.0)
        assert torch.equal(again.generate(TOKENS, max_new_tokens=4, code_temperature=0.0), expected)
        assert again(input_ids=TOKENS).logits.isfinite().all()
        assert again.view(TOKENS, again.residual(TOKENS)).isfinite().all()
    outside = SteeredModel.from_pretrained(language_model(), tmp_path)
    assert torch.equal(outside.generate(TOKENS, max_new_tokens=4, code_temperature=0.0), expected)


def test_what_was_used_inside_learns_outside(tmp_path: Path) -> None:
    steered, observations = tiny_steered(), walks(4, 5)
    with torch.inference_mode():
        decode(steered, observations, codes(4, 5))
        steered.save_pretrained(tmp_path)
        SteeredModel.from_pretrained(tiny_base(), tmp_path)
    loss, _ = discovery(steered, observations)
    loss.backward()
    assert any(parameter.grad is not None for parameter in steered.adapter.parameters())


@pytest.mark.parametrize("inside", [True, False])
def test_a_model_made_inside_is_refused_as_another_base_after_a_change(tmp_path: Path, inside: bool) -> None:
    """A fingerprint is remembered until a tensor changes; these tell nobody that they did."""
    with torch.inference_mode(inside):
        base = language_model()
        SteeredModel.from_base(base, adapter_sizes()).save_pretrained(tmp_path)
        with torch.no_grad():
            base.get_input_embeddings().weight[3] += 1
        with pytest.raises(Exception, match="load the base that it was trained on"):
            SteeredModel.from_pretrained(base, tmp_path)
