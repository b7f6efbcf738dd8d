"""A run on programs as its demo leaves it, with tiny untrained models and made-up curves."""

from __future__ import annotations

from pathlib import Path

import torch

from internalrl.base.pretrain_text import build_language_model, save_language_model
from internalrl.controller.steered import SteeredModel
from internalrl.domains.code.grammar import CodeConfig
from internalrl.domains.code.tokenizer import build_tokenizer
from internalrl.run.folder import RunFolder
from internalrl.settings.demos import CodeDemoConfig
from internalrl.settings.schema import to_dict
from internalrl.settings.stages import PretrainTextConfig
from tests.support.language import adapter_sizes, randomise
from tests.support.tiny import widen

SMALL = PretrainTextConfig(layers=2, width=32, heads=2, mlp=32)
SUMMARY = {"success": 0.876, "raw_action_success": 0.0, "forced_unseen": 0.9, "seconds": {"total": 590.0}}


def finished_code_run(path: Path, policy: bool = True) -> RunFolder:
    """It went through all stages; without `policy` through the first two."""
    tokenizer = build_tokenizer(CodeConfig())
    torch.manual_seed(0)
    base = build_language_model(SMALL, tokenizer).eval()
    widen(base, 0.15, 0)
    steered = SteeredModel.from_base(base, adapter_sizes(layer=1))
    randomise(steered, policy=policy)
    run = RunFolder.create(path, to_dict(CodeDemoConfig(idioms=3)), seed=3)
    save_language_model(base, tokenizer, path / "base")
    steered.save_pretrained(path / "adapter")
    run.write_json("summary.json", SUMMARY)
    for step in range(0, 100, 10):
        run.log("pretrain", step, nll=2.0 - step / 100)
        run.log("discover", step, nll=1.0, kl=20.0, switches=4.0, bimodality=0.5, switch_f1=0.4, hard_switches=2.0)
        run.log("rehearse", step, loss=0.5)
    for stage, success in (("reinforce", 0.5), ("raw-action", 0.0)) if policy else ():
        for i in range(20):
            judged = {"rewards/runs/mean": 0.9, "completions/mean_length": 60.0, "decisions": 4.0, "reward_std": 0.1}
            run.log(stage, i, episodes=1024 * (i + 1), success=success, **judged)
    return run
