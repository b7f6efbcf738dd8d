"""Pretraining on text: what is learned, how it is measured, and that a killed run goes on bit-equal."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel

from internalrl.base import pretrain
from internalrl.base.loading import load_base, load_tokenizer
from internalrl.base.pretrain_text import build_language_model, completion_nll, pretrain_text, save_language_model
from internalrl.base.text_data import Examples, tokenise
from internalrl.run import loop
from internalrl.run.folder import RunFolder
from internalrl.run.loop import Loop
from internalrl.settings.stages import PretrainTextConfig
from tests.support.written import letters

CONFIG = PretrainTextConfig(layers=2, width=16, heads=2, mlp=24, context=32, steps=40, batch_size=8)
TEXTS = [{"prompt": "a" * (1 + n % 3), "completion": "bcdefgh"[: 2 + n % 5]} for n in range(48)]


def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return build_language_model(CONFIG, letters())


def examples() -> Examples:
    return tokenise(TEXTS, letters(), model().config)


def test_a_new_model_knows_nothing_and_learns(tmp_path: Path) -> None:
    """At first every token is about as likely as any other; then completions are, and prompts are still not learned."""
    base, texts = model(), examples()
    learned = texts.lengths - texts.prompts
    first = completion_nll(base, texts)
    assert np.mean(first / learned) == pytest.approx(math.log(24), abs=0.3)
    pretrain_text(base, texts, replace(CONFIG, lr=3e-2), RunFolder.create(tmp_path / "run", {}, seed=0))
    assert completion_nll(base, texts).mean() < 0.5 * first.mean()


def test_a_completion_is_as_likely_alone_as_in_a_batch() -> None:
    base, texts = model(), examples()
    torch.nn.init.normal_(base.get_output_embeddings().weight)
    together = completion_nll(base, texts, size=16)
    for number in (0, 7, 30):
        batch = texts.batch(np.array([number]))
        prompt = int(batch.prompts)
        log_prob = torch.log_softmax(base(batch.tokens).logits[0, prompt - 1 : -1], -1)
        alone = -log_prob.gather(1, batch.tokens[0, prompt:, None]).sum().item()
        assert together[number] == pytest.approx(alone, abs=1e-4)


def test_a_killed_run_goes_on_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(pretrain, "LOG_EVERY", 1)
    whole = model()
    pretrain_text(whole, examples(), CONFIG, RunFolder.create(tmp_path / "whole", {}, seed=3))
    log = Loop.log

    def dying(self: Loop, **metrics: Any) -> None:
        if self.step == 21:
            raise KeyboardInterrupt
        log(self, **metrics)

    monkeypatch.setattr(Loop, "log", dying)
    with pytest.raises(KeyboardInterrupt):
        pretrain_text(model(), examples(), CONFIG, RunFolder.create(tmp_path / "torn", {}, seed=3))
    monkeypatch.setattr(Loop, "log", log)
    resumed = model()
    pretrain_text(resumed, examples(), CONFIG, RunFolder.create(tmp_path / "torn", {}, seed=3, resume=True))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "torn")]
    assert lines[0] == lines[1]


def test_a_saved_model_is_a_base(tmp_path: Path) -> None:
    base = model()
    save_language_model(base, letters(), tmp_path / "base")
    again = load_base(tmp_path / "base")
    assert load_tokenizer(tmp_path / "base").decode([3, 4]) == "ab"
    tokens = torch.tensor([[3, 4, 5]])
    assert_close(again(tokens).logits, base.eval()(tokens).logits)
