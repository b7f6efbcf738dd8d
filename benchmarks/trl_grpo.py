"""Token-level GRPO against internal RL: TRL's own trainer and ours, with the same model, prompt, reward and budget.

    python benchmarks/trl_grpo.py time --base FOLDER --adapter FOLDER [--methods M …] [--repeats N] [--together N]
        [--cache dynamic|static]
    python benchmarks/trl_grpo.py memory --base FOLDER --adapter FOLDER
    python benchmarks/trl_grpo.py learn METHOD --base FOLDER [--temperature T] [--lr LR] [--idioms N | --chain A B …]
        [--budget PROGRAMS] [--minutes M] [--seed S] [--label TEXT]

Methods: `trl-full` and `trl-lora` are `trl.GRPOTrainer`, `tokens` is token-level RL of our loop, `internal` is RL over
codes. `time` lets them take turns in one process, an iteration of 1,024 programs each: seconds of rollout (generation
and reward) and of update, the latter also in processor time, which a busy machine sways less. `--together` (programs of
one forward and backward pass) and `--cache` are TRL's to tune. `memory` is the peak of one iteration in a process of
its own. Both reward success + 0.1 · runs, so that no iteration is without a difference to learn from. `learn` is one
run rewarded by the hidden tests alone; TRL's ends after `--minutes`, and uses a GPU where there is one. All else is on
one thread. The file collects turns and runs.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch are imported

import torch
from spread import spread
from trl_methods import BATCH, CACHE, LR, METHODS, SETTINGS, TIMED_WEIGHTS, TOGETHER, Job

from internalrl.domains.code.grammar import CodeConfig
from internalrl.domains.code.tasks import solved_by, tasks
from internalrl.run.folder import environment


def peak(job: Job) -> tuple[int, int]:
    """(MB with everything imported, MB at most in one iteration), for a process of its own."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    job.run()
    return before // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def compare(options: argparse.Namespace) -> None:
    """Rollout and update of the methods, in turn."""
    task = tasks(CodeConfig())[options.idioms]
    turns = []
    for repeat in range(options.repeats):
        for method in options.methods:
            job = Job(
                method, options.base, options.adapter, task, 1, repeat, weights=TIMED_WEIGHTS,
                together=options.together, cache=options.cache,
            )  # fmt: skip
            clock = job.run()
            turns.append({
                "method": method, "together": options.together, "cache": options.cache,
                "rollout_seconds": round(clock.rollout[0], 4), "update_seconds": round(clock.update[0], 4),
                "update_cpu_seconds": round(clock.update_cpu[0], 4), "trained_parameters": clock.trained,
            })  # fmt: skip
            print(json.dumps(turns[-1]), flush=True)
    stored = read(options.output)
    turns = [*stored.get("turns", []), *turns]
    write(options.output, {**stored, "turns": turns, "time": summary(turns)})


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the turns with TRL's best settings, by method; the nth turns of two methods are compared with one another."""
    best = [turn for turn in turns if (turn["together"], turn["cache"]) == (TOGETHER, CACHE)]
    own = {method: [turn for turn in best if turn["method"] == method] for method in METHODS}
    names = ("rollout_seconds", "update_seconds", "update_cpu_seconds")
    result: dict[str, Any] = {}
    for method, found in own.items():
        if not found:
            continue
        result[method] = {"turns": len(found), "trained_parameters": found[0]["trained_parameters"]}
        result[method] |= {name: spread([turn[name] for turn in found]) for name in names}
        pairs = list(zip(found, own["internal"], strict=False))
        for name in names:
            if pairs and method != "internal":
                result[method][f"{name}_over_internal"] = spread([a[name] / b[name] for a, b in pairs], 1)
    return result


def memory(options: argparse.Namespace) -> None:
    """Peak memory of one iteration."""
    task = tasks(CodeConfig())[options.idioms]
    found = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for method in METHODS:
            job = Job(method, options.base, options.adapter, task, 1, weights=TIMED_WEIGHTS)
            before, most = pool.apply(peak, [job])
            found[method] = {"imported_mb": before, "peak_mb": most}
    print(json.dumps(found))
    write(options.output, {**read(options.output), "memory": found})


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def write(file: Path, results: dict[str, Any]) -> None:
    """One turn or run a line."""
    lists = {name: ",\n  ".join(json.dumps(row) for row in results.get(name, [])) for name in ("turns", "runs")}
    rest = {name: value for name, value in results.items() if name not in lists} | environment()
    text = json.dumps(rest, indent=1)[:-2]
    file.write_text(text + "".join(f',\n "{name}": [\n  {rows}\n ]' for name, rows in lists.items()) + "\n}\n")


def learn(options: argparse.Namespace) -> None:
    """One run."""
    task = solved_by(tuple(options.chain)) if options.chain else tasks(CodeConfig())[options.idioms]
    job = Job(
        options.method, options.base, options.adapter, task, max(1, options.budget // BATCH), options.seed,
        options.temperature, options.lr, minutes=options.minutes,
    )  # fmt: skip
    clock = job.run()
    run = {
        "method": options.method, "label": options.label, "chain": list(task.chain), "seed": options.seed,
        "temperature": None if options.method == "internal" else options.temperature,
        "lr": SETTINGS["internal"]["lr"] if options.method == "internal" else job.lr or LR[options.method],
    }  # fmt: skip
    names = tuple(run)
    run |= {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "programs": BATCH * len(clock.success), "hits": round(BATCH * sum(clock.success)),
        "final_success": sum(clock.success[-5:]) / len(clock.success[-5:]),
        "rollout_seconds": spread(clock.rollout), "updates": len(clock.update),
        "update_seconds": spread(clock.update) if clock.update else None, "trained_parameters": clock.trained,
        "success": [round(value, 6) for value in clock.success], "runs": [round(value, 4) for value in clock.runs],
    }  # fmt: skip
    stored = read(options.output)
    others = [old for old in stored.get("runs", []) if [old[name] for name in names] != [run[name] for name in names]]
    runs = sorted([*others, run], key=lambda run: json.dumps([run[name] for name in names]))
    write(options.output, {**stored, "runs": runs})
    print(json.dumps({name: value for name, value in run.items() if name != "runs"}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--base", type=Path, required=True)
    shared.add_argument("--adapter", type=Path)
    shared.add_argument("--idioms", type=int, default=4)
    shared.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "trl_grpo.json")
    commands = parser.add_subparsers(required=True)
    timing = commands.add_parser("time", parents=[shared])
    timing.add_argument("--repeats", type=int, default=2)
    timing.add_argument("--methods", choices=METHODS, nargs="+", default=METHODS)
    timing.add_argument("--together", type=int, default=TOGETHER)
    timing.add_argument("--cache", choices=("dynamic", "static"), default=CACHE)
    timing.set_defaults(command=compare)
    commands.add_parser("memory", parents=[shared]).set_defaults(command=memory)
    learning = commands.add_parser("learn", parents=[shared])
    learning.add_argument("method", choices=METHODS)
    learning.add_argument("--chain", nargs="+")
    learning.add_argument("--temperature", type=float, default=1.0)
    learning.add_argument("--lr", type=float)
    learning.add_argument("--budget", type=int, default=20 * BATCH)
    learning.add_argument("--seed", type=int, default=0)
    learning.add_argument("--minutes", type=float, default=math.inf)
    learning.add_argument("--label", default="")
    learning.set_defaults(command=learn)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.command(options)


if __name__ == "__main__":
    main()
