"""The three stages on the grid world, one after the other in one run folder, beside raw-action RL."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from internalrl.analysis.probe import probe
from internalrl.analysis.report import report
from internalrl.base.pretrain import build, pretrain
from internalrl.base.pretrain import check as check_grid
from internalrl.base.pretrain import evaluate as evaluate_base
from internalrl.base.trajectory import load_trajectory_model, save_trajectory_model
from internalrl.controller.adapter import Adapter
from internalrl.controller.steered import SteeredModel
from internalrl.discovery.consolidate import consolidate
from internalrl.discovery.grid import GridMaterial
from internalrl.discovery.train import discover
from internalrl.domains.grid.world import parse_task
from internalrl.errors import InternalRLError
from internalrl.reinforce.train import grid_environments, make_agent, reinforce
from internalrl.run.folder import RunFolder
from internalrl.settings.demos import DemoConfig
from internalrl.settings.stages import ReportConfig


def main(config: DemoConfig, run: RunFolder) -> dict[str, Any]:
    """Pretrain, discover, consolidate, reinforce; then the same budget for raw-action RL, and the report."""
    grid, seconds = config.pretrain.grid, {}
    torch.manual_seed(run.seed)
    base = build(config.pretrain.base, grid)
    seconds["pretrain"] = pretrain(base, config.pretrain, run).seconds
    save_trajectory_model(base, run.path / "base")
    pretrained = evaluate_base(base, grid, seed=run.seed)

    torch.manual_seed(run.seed)
    steered, material = SteeredModel.from_base(base, config.discover.metacontroller), GridMaterial(grid, run.seed)
    accuracy = probe(base, grid, layers=[steered.tap.layer], seed=run.seed)[steered.tap.layer]
    seconds["discover"] = discover(steered, material, config.discover, run).seconds
    discovered = material.measure(steered)
    steered.save_pretrained(run.path / "discovered", {"discover": {"seed": run.seed}})
    consolidated, played = discovered, consolidation_episodes(config)
    if played:
        seconds |= consolidate(steered, material, config.discover.consolidate, run)
        consolidated = material.measure(steered)

    budget = replace(config.reinforce, episodes=config.reinforce.episodes - played)
    internal = reinforce(make_agent(steered, budget), grid_environments(steered, budget, run.seed), budget, run)
    seconds["reinforce"] = internal["seconds"]
    steered.save_pretrained(run.path / "adapter", {"demo": {"seed": run.seed, "task": budget.task}})

    raw_budget = replace(budget, agent="raw-action", controller=False, episodes=internal["episodes"] + played)
    bare = SteeredModel.from_base(load_trajectory_model(run.path / "base"), config.discover.metacontroller)
    environments = grid_environments(bare, raw_budget, run.seed)
    raw = reinforce(make_agent(bare, raw_budget), environments, raw_budget, run, "raw-action")
    seconds["raw-action"] = raw["seconds"]

    rates = consolidated["pass_rates"]
    summary = {
        "success": internal["success"],
        "raw_action_success": raw["success"],
        "switch_f1": consolidated["switch_f1"],
        "switch_f1_before_consolidation": discovered["switch_f1"],
        "probe_accuracy": accuracy,
        "unseen_pass_rate": rates["unseen_mean"],
        "unseen_pass_rates": rates["unseen"],
        "unseen_pass_rate_before_consolidation": discovered["pass_rates"]["unseen_mean"],
        "bayes_gap_nats": pretrained["bayes_gap_nats"],
        "pretrain": pretrained,
        "episodes": internal["episodes"] + played,
        "seconds": {**seconds, "total": math.fsum(seconds.values())},
    }
    run.write_json("summary.json", summary)
    report.main(ReportConfig(), run)
    return summary


def check(config: DemoConfig) -> None:
    """Raise where one of the stages could not begin: better now than after those before it."""
    if config.reinforce.limits is not None:
        raise InternalRLError(
            "--reinforce.limits needs a library of the adapter's strategies, which a demo does not have yet; leave it "
            "out, fit the strategies of the demo's adapter, then give it to `internalrl reinforce`."
        )
    check_grid(config.pretrain)
    Adapter(build(config.pretrain.base, config.pretrain.grid), config.discover.metacontroller)
    parse_task(config.reinforce.task, config.pretrain.grid)
    consolidation_episodes(config)


def consolidation_episodes(config: DemoConfig) -> int:
    """How many of the episodes of `config.reinforce` consolidation plays; InternalRLError if it leaves none."""
    played = config.discover.consolidate.episodes if config.discover.consolidate.enabled else 0
    if played >= config.reinforce.episodes:
        raise InternalRLError(
            f"--reinforce.episodes is {config.reinforce.episodes}, and --discover.consolidate.episodes takes {played} "
            "of them; give more of the former, or --discover.consolidate.no-enabled."
        )
    return played
