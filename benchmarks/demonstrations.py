"""Demonstrations per second on one core: the paper's grid, from drawing layouts to finished episodes.

    python benchmarks/demonstrations.py [--count N] [--repeats R] [--output FILE]

Each repeat draws `count` fresh layouts with its own seed and lets the expert play one episode on each. The
result, with the exact references of the last repeat's demonstrations, is written as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy is imported
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import numpy as np
from spread import spread

from internalrl.domains.grid.bayes import bayes_filter, expert_nll
from internalrl.domains.grid.layouts import shortest_path_moves
from internalrl.domains.grid.world import PRETRAINING_TASKS, GridConfig, demonstrate, sample_layouts
from internalrl.run.folder import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=20_000, help="episodes per repeat")
    parser.add_argument("--repeats", type=int, default=15, help="timed repeats, each with its own seed")
    results = Path(__file__).parent / "results" / "demonstrations.json"
    parser.add_argument("--output", type=Path, default=results, help="where the JSON goes")
    args = parser.parse_args()

    config = GridConfig()
    rates: dict[str, list[float]] = {"layouts": [], "shortest_paths": [], "demonstrations": []}
    demonstrate(config, args.count, PRETRAINING_TASKS, np.random.default_rng(0))  # warm-up, untimed
    for seed in range(1, args.repeats + 1):
        rng = np.random.default_rng(seed)
        began = time.perf_counter()
        layouts = sample_layouts(config, args.count, rng)
        drawn = time.perf_counter()
        for begin in range(0, args.count, 4096):
            shortest_path_moves(config, layouts.contents[begin : begin + 4096])
        searched = time.perf_counter()
        demonstrations = demonstrate(config, args.count, PRETRAINING_TASKS, rng)
        ended = time.perf_counter()
        for name, seconds in zip(rates, (drawn - began, searched - drawn, ended - searched), strict=True):
            rates[name].append(args.count / seconds)

    known = expert_nll(config, demonstrations)[demonstrations.mask].mean()
    observer = bayes_filter(config, demonstrations, PRETRAINING_TASKS)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "cores_used": 1,
        "episodes_per_repeat": args.count,
        "seeds": list(range(1, args.repeats + 1)),
        "per_second": {name: spread(values, None) for name, values in rates.items()},
        "references": {
            "episodes": len(demonstrations),
            "seed": args.repeats,
            "mean_length": round(float(demonstrations.lengths.mean()), 3),
            "max_length": int(demonstrations.lengths.max()),
            "nll_goal_known": round(float(known), 5),
            "nll_bayes": round(observer.mean_nll, 5),
            "subgoal_accuracy_bayes": round(observer.subgoal_accuracy, 4),
        },
        **environment(),
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"per_second": result["per_second"], "references": result["references"]}, indent=2))


if __name__ == "__main__":
    main()
