"""Stage 3 on the code domain: internal RL finds a composition of idioms whose every transition is new to the base.

    python benchmarks/code_rl.py --base FOLDER --adapter FOLDER [--idioms N] [--agent raw-action --temperature T]
        [--budget PROGRAMS] [--seed S] [--blind] [--label TEXT] [--run FOLDER] [--output FILE]

The task is known through its hidden tests alone: reward 1 for a program that passes them all. One run with one seed;
the file collects runs, one for each label, agent, number of idioms, seed and settings. For every iteration of 1,024
programs it holds the success, the programs that run, and the segments per program. The settings are those of
`internalrl demo code`: a run ends when the mean success of the last five iterations reaches 97 %. On one thread.
With --blind it does not know what programs return, and cannot explore by it while none is rewarded. With --run, a run
that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch are imported

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from internalrl.base.fingerprint import base_fingerprint
from internalrl.controller.steered import SteeredModel
from internalrl.domains.code.grammar import PROMPT, CodeConfig
from internalrl.domains.code.sandbox.sandbox import Sandbox
from internalrl.domains.code.tasks import task_rewards, tasks
from internalrl.reinforce.train import RECENT
from internalrl.reinforce.trainer import InternalRLTrainer
from internalrl.run.folder import environment
from internalrl.run.metrics import read_metrics
from internalrl.settings.demos import CodeDemoConfig
from internalrl.settings.stages import InternalRLConfig

SETTINGS = {"internal": CodeDemoConfig().reinforce, "raw-action": CodeDemoConfig().raw_action}
STORED = ("lr", "epochs", "clip_coef", "initial_std", "replay", "decision_cost", "temperature", "target")


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run of RL."""
    task, base = tasks(CodeConfig())[options.idioms], AutoModelForCausalLM.from_pretrained(options.base)
    fingerprint, settings = base_fingerprint(base)[:16], SETTINGS[options.agent]
    given = {
        "agent": options.agent, "output_dir": folder, "seed": options.seed, "episodes": options.budget,
        "num_generations": settings.batch_size, "reward_weights": (1.0, 0.0),
        "temperature": settings.temperature if options.temperature is None else options.temperature,
    }  # fmt: skip
    args = InternalRLConfig(**{**vars(settings), **given})
    with Sandbox() as sandbox:
        judged = task_rewards(task, sandbox)
        model = base if options.agent == "raw-action" else SteeredModel.from_pretrained(base, options.adapter)
        trainer = InternalRLTrainer(
            model, [judged.success, judged.runs], args, [{"prompt": PROMPT}],
            AutoTokenizer.from_pretrained(options.base), outcomes=None if options.blind else judged.outcomes,
        )  # fmt: skip
        summary = trainer.train(resume_from_checkpoint=(folder / "config.json").exists())
    lines = read_metrics(folder)
    curve = {name: [line[key] for line in lines] for name, key in (
        ("programs", "episodes"), ("success", "rewards/success/mean"), ("run", "rewards/runs/mean"),
        ("segments", "decisions"), ("tokens", "completions/mean_length"),
    )}  # fmt: skip
    hits = [programs for programs, rate in zip(curve["programs"], curve["success"], strict=True) if rate]
    return {
        "label": options.label, "agent": options.agent, "idioms": options.idioms, "seed": options.seed,
        "blind": options.blind,
        "base": fingerprint, "settings": {name: getattr(args, name) for name in STORED},
        "programs": summary["episodes"], "seconds": round(summary["seconds"]),
        "final_success": sum(curve["success"][-RECENT:]) / RECENT,
        "final_run": sum(curve["run"][-RECENT:]) / RECENT,
        "first_hit_by": hits[0] if hits else None,
        "above_0.8_by": next((p for p, s in zip(curve["programs"], curve["success"], strict=True) if s >= 0.8), None),
        "curve": curve,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--idioms", type=int, default=4)
    parser.add_argument("--agent", choices=SETTINGS, default="internal")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--budget", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--label", default="")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "code_rl.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {**run(options, options.run or Path(folder) / "run"), **environment()}
    runs = json.loads(options.output.read_text()) if options.output.exists() else []
    names = ("label", "agent", "idioms", "seed", "blind", "settings")
    runs = [old for old in runs if [old.get(name) for name in names] != [found[name] for name in names]]
    options.output.write_text(json.dumps([*runs, found], indent=1) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "curve"}))


if __name__ == "__main__":
    main()
