"""Programs per second that the sandbox really runs, each against the eight hidden tests of a task.

    python benchmarks/sandbox.py [--count N] [--repeats R] [--workers W] [--output FILE]

`corpus`: programs of the code domain's corpus, which share child processes. `mixed`: of these, one in eight does not
parse, and one in eight raises. `alone`: with an import, so that each needs a process of its own. Each repeat draws its
own programs; the result is written as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from spread import spread

from internalrl.domains.code.grammar import CodeConfig, sample_programs
from internalrl.domains.code.sandbox.sandbox import Sandbox
from internalrl.domains.code.tasks import tasks
from internalrl.run.folder import environment


def variations(programs: list[str]) -> dict[str, list[str]]:
    """What is timed -> programs."""
    mixed = [p[:-9] + ")" if n % 8 == 0 else p[:-9] + "x[99]" if n % 8 == 1 else p for n, p in enumerate(programs)]
    return {"corpus": programs, "mixed": mixed, "alone": [f"import math\n{program}" for program in programs]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="programs per repeat and variation")
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats, each with its own seed")
    parser.add_argument("--workers", type=int, default=2, help="worker processes, one core each")
    results = Path(__file__).parent / "results" / "sandbox.json"
    parser.add_argument("--output", type=Path, default=results, help="where the JSON goes")
    args = parser.parse_args()

    config = CodeConfig()
    inputs = tasks(config)[4].inputs
    rates: dict[str, list[float]] = {}
    busy = os.getloadavg()[0]  # of other processes: this one has not begun
    began = time.perf_counter()
    with Sandbox(workers=args.workers) as sandbox:
        started = time.perf_counter() - began
        sandbox.run(sample_programs(config, 100, np.random.default_rng(0)).texts, inputs)  # warm-up, untimed
        for seed in range(1, args.repeats + 1):
            programs = sample_programs(config, args.count, np.random.default_rng(seed)).texts
            for name, sources in variations(programs).items():
                began = time.perf_counter()
                outcomes = sandbox.run(sources, inputs)
                rates.setdefault(name, []).append(args.count / (time.perf_counter() - began))
                ran = sum(outcome.status == "ran" for outcome in outcomes)
                assert ran == (sum(n % 8 > 1 for n in range(args.count)) if name == "mixed" else args.count)
        isolation = sandbox.isolation

    result = {
        "command": " ".join(["python", *sys.argv]),
        "workers": args.workers,
        "programs_per_repeat": args.count,
        "tests_per_program": len(inputs),
        "seeds": list(range(1, args.repeats + 1)),
        "isolation": ["system calls", "resources", *isolation],
        "start_seconds": round(started, 3),
        "load_average_before": round(busy, 2),
        "per_second": {name: spread(values, None) for name, values in rates.items()},
        **environment(),
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"per_second": result["per_second"], "isolation": result["isolation"]}, indent=2))


if __name__ == "__main__":
    main()
