"""The grid world over several seeds: the demo's three stages, then every baseline on the same number of episodes.

    python benchmarks/grid.py --seeds 0 1 2 3 4 --jobs 2

Runs go to runs/bench/grid/seed-K and are continued where they were cut off. Results, with median and spread, go to
benchmarks/results/grid.json; seeds that are not asked for stay there as they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from spread import spread

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "bench" / "grid"
RESULTS = ROOT / "benchmarks" / "results" / "grid.json"

BASELINES = {
    "no-consolidation": {"adapter": "discovered", "agent": "internal"},
    "raw-action-consolidated": {"adapter": "adapter", "agent": "raw-action"},
}
"""Baseline -> adapter it starts from and what differs from internal RL; the demo itself runs `raw-action`."""


def play(seed: int, part: str) -> None:
    """The demo of one seed, or the baselines on what it left; on one thread."""
    import torch

    from internalrl.controller.steered import SteeredModel
    from internalrl.demo import main as demo
    from internalrl.reinforce.train import grid_environments, make_agent, reinforce
    from internalrl.run.folder import RunFolder
    from internalrl.settings.demos import DemoConfig
    from internalrl.settings.schema import to_dict

    torch.set_num_threads(1)
    folder, config = RUNS / f"seed-{seed}", DemoConfig()
    run = RunFolder.create(folder, to_dict(config), seed=seed, resume=(folder / "config.json").exists())
    if part == "demo":
        demo(config, run)
        return
    summary = json.loads((folder / "summary.json").read_text())
    summary["baselines"] = {}
    for name, change in BASELINES.items():
        options = {k: v for k, v in change.items() if k != "adapter"}
        budget = replace(config.reinforce, episodes=summary["episodes"], **options)
        torch.manual_seed(seed)
        steered = SteeredModel.from_pretrained(folder / "base", folder / change["adapter"])
        environments = grid_environments(steered, budget, seed)
        summary["baselines"][name] = reinforce(make_agent(steered, budget), environments, budget, run, name)
    run.write_json("summary.json", summary)


def read_run(seed: int) -> dict[str, Any]:
    """What the runs of one seed found, with their success at every iteration, and where."""
    from internalrl.run.folder import environment

    folder = RUNS / f"seed-{seed}"
    run: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    run["success_per_iteration"] = {
        stage: [round(line["success"], 4) for line in lines if line["stage"] == stage]
        for stage in ("reinforce", "raw-action", *BASELINES)
    }
    return {**run, **environment(), "threads": 1}


def collect(seeds: list[int]) -> dict[str, Any]:
    """Results of `seeds` and of those before them, with median, minimum and maximum of the headline figures."""
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    runs |= {str(seed): read_run(seed) for seed in seeds}
    runs = {seed: runs[seed] for seed in sorted(runs, key=int)}
    keys = [k for k, v in next(iter(runs.values())).items() if isinstance(v, float)]
    return {
        "command": f"python benchmarks/grid.py --seeds {' '.join(runs)}",
        "spread": {key: spread([run[key] for run in runs.values()]) for key in keys},
        "runs": runs,
    }


def run_apart(part: str, seed: int) -> None:
    """Run a part in a process of its own; a summary says that it is done."""
    folder = RUNS / f"seed-{seed}"
    summary = folder / "summary.json"
    if summary.exists() and (part == "demo" or "baselines" in json.loads(summary.read_text())):
        return
    with (RUNS / f"seed-{seed}.log").open("a") as log:
        command = [sys.executable, __file__, "--part", part, str(seed)]
        if subprocess.run(command, stdout=log, stderr=log).returncode:
            raise SystemExit(f"The {part} of seed {seed} failed; see the logs in {RUNS}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one thread each")
    parser.add_argument("--part", nargs=2, metavar=("PART", "SEED"), help="run this in this process")
    options = parser.parse_args()
    if options.part:
        play(int(options.part[1]), options.part[0])
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    with ThreadPool(options.jobs) as pool:
        for part in ("demo", "baselines"):
            pool.map(lambda seed, part=part: run_apart(part, seed), options.seeds, chunksize=1)
    RESULTS.write_text(json.dumps(collect(options.seeds), indent=2) + "\n")


if __name__ == "__main__":
    main()
