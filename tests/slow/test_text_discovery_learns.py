"""Discovery and consolidation on programs of four idioms: switches align, and codes come to work after any idiom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from internalrl.base.pretrain_text import build_language_model, pretrain_text
from internalrl.base.text_data import tokenise
from internalrl.controller.steered import SteeredModel
from internalrl.discovery import programs
from internalrl.discovery.programs import CodeDomain
from internalrl.discovery.rehearse import rehearse
from internalrl.discovery.text import TextMaterial
from internalrl.discovery.train import discover
from internalrl.domains.code.grammar import PROMPT, CodeConfig, sample_programs
from internalrl.domains.code.tokenizer import build_tokenizer
from internalrl.run.folder import RunFolder
from internalrl.settings.options import PRESETS
from internalrl.settings.schema import from_dict
from internalrl.settings.stages import DiscoverConfig, PretrainTextConfig

SEED = 0
BASE = PretrainTextConfig(layers=3, width=64, heads=2, mlp=96, steps=300, batch_size=32, context=128)
SHORT = {
    "metacontroller": {"slow_features": 16, "horizon": 16},
    "form_steps": 60,
    "squeeze_steps": 20,
    "switch_steps": 120,
    "hold_steps": 20,
    "rise_steps": 30,
    "batches": 20,
    "consolidate": {"rehearse": {"rounds": 1, "steps": 80, "batches": 20}},
}

pytestmark = pytest.mark.learning


def test_switches_align_and_consolidation_makes_codes_work_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One test, so that base and codes are trained once. No label is used: neither boundaries nor idioms."""
    monkeypatch.setattr(programs, "MEASURED", 256)
    code = CodeConfig(idioms=("reverse", "total", "index", "rotate"), min_idioms=2, max_idioms=4)
    tokenizer, run = build_tokenizer(code), RunFolder.create(tmp_path / "run", {}, seed=SEED)
    torch.manual_seed(SEED)
    base = build_language_model(BASE, tokenizer)
    corpus = sample_programs(code, 3000, np.random.default_rng(SEED)).completions
    examples = tokenise([{"prompt": PROMPT, "completion": text} for text in corpus], tokenizer, base.config)
    pretrain_text(base, examples, BASE, run)

    config = from_dict(DiscoverConfig, SHORT, base=from_dict(DiscoverConfig, PRESETS["text"]["discover"]))
    material = TextMaterial(examples, SEED, CodeDomain(code, tokenizer))
    steered = SteeredModel.from_base(base, config.metacontroller)
    discover(steered, material, config, run)
    discovered = material.measure(steered)
    rehearse(steered, material, config.consolidate.rehearse, run)
    consolidated = material.measure(steered)
    assert discovered["switch_f1"] > 0.7
    assert discovered["hard_nll"] < 0.8 * run.metrics("pretrain")[-1]["nll"]
    assert consolidated["forced_unseen"] > discovered["forced_unseen"] + 0.1
    torch.nn.init.zeros_(steered.metacontroller.up)
    assert material.measure(steered)["forced_unseen"] < consolidated["forced_unseen"] / 2
