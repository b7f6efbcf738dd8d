"""Run folders as the stages leave them, with tiny untrained models and made-up curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from internalrl.base.trajectory import TrajectoryConfig, TrajectoryModel, llama_backbone
from internalrl.controller.policy import Policy
from internalrl.controller.steered import SteeredModel
from internalrl.domains.grid.world import GridConfig, observe, sample_layouts
from internalrl.run.folder import RunFolder
from tests.support.tiny import N_Z, SIZES, WIDTH, widen

SMALL = GridConfig(size=5, colors=6, walls=1, horizon=24)
"""The fewest colours that there are demonstrations for."""
SUMMARY = {
    "success": 0.934,
    "raw_action_success": 0.0,
    "switch_f1": 0.9971,
    "probe_accuracy": 0.827,
    "unseen_pass_rate": 0.213,
    "unseen_pass_rate_before_consolidation": 0.04,
    "bayes_gap_nats": 0.0214,
    "episodes": 149_504,
    "seconds": {"pretrain": 410.0, "discover": 180.0, "total": 590.0},
}
STAGES = ("pretrain", "discover", "reinforce")


def finished_run(path: Path, stages: Sequence[str] = STAGES, task: str = "0") -> RunFolder:
    """A run that went through `stages`; an untrained policy visits colour 0 now and then."""
    config = {"discover": {"form_steps": 30, "squeeze_steps": 20}, "reinforce": {"task": task, "forget": True}}
    run = RunFolder.create(path, {name: config.get(name, {}) for name in stages}, seed=3)
    base = small_base()
    base.save_pretrained(path / "base")
    for name in stages:
        globals()[f"_log_{name}"](run)
    if "discover" in stages:
        steered = small_steered(base)
        if "reinforce" in stages:
            steered.policy = Policy(WIDTH, N_Z, hidden=6, initial_std=1.2)
            widen(steered.policy, 0.5, 9)
            run.write_json("summary.json", SUMMARY)
        steered.save_pretrained(path / "adapter")
    return run


def small_base() -> TrajectoryModel:
    """Two blocks of width 16 that move about the 5 × 5 grid without aim."""
    config = TrajectoryConfig(
        encoder_options={"hidden": 8},
        environment=asdict(SMALL),
        backbone=llama_backbone(layers=2, width=WIDTH, heads=2, mlp=12),
    )
    base = TrajectoryModel(config)
    widen(base, 0.4, 0)
    return base.eval()


def small_steered(base: TrajectoryModel) -> SteeredModel:
    """Its switch fires every few steps."""
    steered = SteeredModel(base, SIZES)
    meta = steered.metacontroller
    widen(meta, 0.4, 1)
    layouts = sample_layouts(SMALL, 16, np.random.default_rng(0))
    positions = np.random.default_rng(0).integers(0, SMALL.cells, (16, 8))
    with torch.no_grad():
        x = meta.read(steered.residual(torch.from_numpy(observe(SMALL, layouts.contents, positions))))
        logit = meta.segment(x, meta.summarise(x), torch.randn(16, 8, N_Z), "soft").logit
        meta.switch_head.bias -= logit.quantile(0.7)
    return steered


def _log_pretrain(run: RunFolder) -> None:
    for step in range(0, 1000, 10):
        run.log("pretrain", step, nll=0.3 + np.exp(-step / 80), observation_nll=0.7 + 3 * np.exp(-step / 80))


def _log_discover(run: RunFolder) -> None:
    for step in range(0, 100, 10):
        rare = {
            "hard_nll": 0.3,
            "switch_f1": 0.1,
            "hard_switches": 1.0,
            "true_switches": 2.0,
            "unseen": [0.0, 0.1, 0.2],
        }
        common = {"loss": 0.5, "nll": 0.3, "kl": 20.0 - step / 10, "switches": 3.0, "bimodality": 0.5}
        run.log("discover", step, **common, **(rare if step % 50 == 0 else {}))
    for step in range(0, 100, 10):
        run.log("consolidate", step, loss=0.3, kl=0.2, switch_loss=0.1)


def _log_reinforce(run: RunFolder) -> None:
    for name, success in (("reinforce", 0.5), ("raw-action", 0.0), ("my-baseline", 0.1)):
        for i in range(20):
            rest = {"length": 20.0, "decisions": 4.0, "reward_std": 0.4}
            run.log(name, i, episodes=1024 * (i + 1), success=success, **rest)
