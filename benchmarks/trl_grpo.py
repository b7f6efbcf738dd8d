"""Token-level GRPO against internal RL: TRL's own trainer and ours, with the same model, prompt, reward and budget.

    python benchmarks/trl_grpo.py time --base FOLDER --adapter FOLDER [--methods M …] [--repeats N] [--together N]
        [--cache dynamic|static]
    python benchmarks/trl_grpo.py memory --base FOLDER --adapter FOLDER
    python benchmarks/trl_grpo.py learn METHOD --base FOLDER [--temperature T] [--lr LR] [--idioms N | --chain A B …]
        [--budget PROGRAMS] [--seed S] [--label TEXT]

Methods: `trl-full` and `trl-lora` are `trl.GRPOTrainer`, `tokens` is token-level RL of our loop, `internal` is RL over
codes. `time` lets them take turns in one process, an iteration of 1,024 programs each: seconds of rollout (generation
and reward) and of update. `--together` (programs of one forward and backward pass) and `--cache` are TRL's to tune.
`memory` is the peak of one iteration in a process of its own. Both reward success + 0.1 · runs, so that no iteration is
without a difference to learn from. `learn` is one run rewarded by the hidden tests alone. The file collects turns and
runs. On one thread.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch are imported

import torch
from code_rl import SETTINGS
from datasets import Dataset
from peft import LoraConfig
from spread import spread
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from internalrl.domains.code import PROMPT, CodeConfig
from internalrl.domains.code_tasks import CodeTask, solved_by, task_rewards, tasks
from internalrl.domains.sandbox import Sandbox
from internalrl.internal_rl import train
from internalrl.internal_rl.trainer import InternalRLTrainer
from internalrl.metacontroller.steered import SteeredModel
from internalrl.runlog import environment
from internalrl.stages import InternalRLConfig

BATCH, LONGEST = 1024, 160
TOGETHER, CACHE = 128, "dynamic"
"""What is fastest for TRL."""
LR = {"trl-full": 1e-4, "trl-lora": 1e-3, "tokens": 1e-4}
"""The best of the sweep."""
METHODS = ("tokens", "trl-full", "trl-lora", "internal")
Reward = Callable[..., list[float]]
TIMED_WEIGHTS, LEARN_WEIGHTS = (1.0, 0.1), (1.0, 0.0)


@dataclass
class Clock:
    """What each iteration took, in seconds, and what it came to."""

    rollout: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    success: list[float] = field(default_factory=list)
    runs: list[float] = field(default_factory=list)
    trained: int = 0

    def timed(self, function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
        """`function`, whose calls' seconds go to `times`."""

        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **options)
            times.append(time.perf_counter() - began)
            return result

        return call

    def noted(self, reward: Reward, means: list[float]) -> Reward:
        """`reward`, the mean of which goes to `means`."""

        def call(completions: list[str], **_: Any) -> list[float]:
            values = reward(completions)
            means.append(sum(values) / len(values))
            return values

        call.__name__ = reward.__name__
        return call


@dataclass
class Job:
    """One method with its settings."""

    method: str
    base: Path
    adapter: Path | None
    task: CodeTask
    iterations: int
    seed: int = 0
    temperature: float = 1.0
    lr: float | None = None
    weights: tuple[float, float] = LEARN_WEIGHTS
    together: int = TOGETHER
    cache: str = CACHE

    def run(self) -> Clock:
        clock = Clock()
        torch.manual_seed(self.seed)
        with Sandbox() as sandbox, tempfile.TemporaryDirectory() as folder:
            success, runs = task_rewards(self.task, sandbox)
            rewards = [clock.noted(success, clock.success), clock.noted(runs, clock.runs)]
            play = self.trl if self.method.startswith("trl") else self.ours
            play(rewards, clock, Path(folder) / "run")
        return clock

    def trl(self, rewards: list[Reward], clock: Clock, folder: Path) -> None:
        """`trl.GRPOTrainer`: one optimiser step per iteration, on fresh programs, no reference model."""

        class Timed(GRPOTrainer):
            def _generate_and_score_completions(self, inputs: Any) -> Any:
                result = clock.timed(super()._generate_and_score_completions, clock.rollout)(inputs)
                self.scored = time.perf_counter()
                return result

        class Ended(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.update.append(time.perf_counter() - trainer.scored)

        args = GRPOConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, seed=self.seed,
            per_device_train_batch_size=self.together, gradient_accumulation_steps=BATCH // self.together,
            num_generations=BATCH, cache_implementation=None if self.cache == "dynamic" else self.cache,
            max_completion_length=LONGEST, max_steps=self.iterations, temperature=self.temperature,
            learning_rate=LR[self.method] if self.lr is None else self.lr, lr_scheduler_type="constant",
            reward_weights=list(self.weights), save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = Timed(
            AutoModelForCausalLM.from_pretrained(self.base), rewards, args, Dataset.from_list([{"prompt": PROMPT}]),
            processing_class=AutoTokenizer.from_pretrained(self.base), callbacks=[Ended()],
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
            if self.method == "trl-lora" else None,
        )  # fmt: skip
        clock.trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        trainer.train()

    def ours(self, rewards: list[Reward], clock: Clock, folder: Path) -> None:
        internal = self.method == "internal"
        settings = dict(SETTINGS["internal" if internal else "raw-action"])
        if not internal:
            settings |= {"temperature": self.temperature, "lr": LR["tokens"] if self.lr is None else self.lr}
        args = InternalRLConfig(
            agent="internal" if internal else "raw-action", output_dir=folder, seed=self.seed,
            episodes=BATCH * self.iterations, batch_size=BATCH, num_generations=BATCH, max_completion_length=LONGEST,
            reward_weights=self.weights, **settings,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(self.base)
        if internal:
            model = SteeredModel.from_pretrained(model, self.adapter)
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        trainer = InternalRLTrainer(model, rewards, args, [{"prompt": PROMPT}], tokenizer)
        clock.trained = sum(p.numel() for p in trainer.agent.module.parameters() if p.requires_grad)
        played: list[float] = []
        judged: list[float] = []
        trainer.agent.play = clock.timed(trainer.agent.play, played)
        trainer.writing.judge = clock.timed(trainer.writing.judge, judged)
        with mock.patch.object(train, "improve", clock.timed(train.improve, clock.update)):
            trainer.train()
        clock.rollout = [sum(parts) for parts in zip(played, judged, strict=True)]


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
                "trained_parameters": clock.trained,
            })  # fmt: skip
            print(json.dumps(turns[-1]), flush=True)
    stored = read(options.output)
    turns = [*stored.get("turns", []), *turns]
    write(options.output, {**stored, "turns": turns, "time": summary(turns)})


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the turns with TRL's best settings, by method; the nth turns of two methods are compared with one another."""
    best = [turn for turn in turns if (turn["together"], turn["cache"]) == (TOGETHER, CACHE)]
    result: dict[str, Any] = {}
    updates: dict[str, list[float]] = {}
    for method in METHODS:
        own = [turn for turn in best if turn["method"] == method]
        if own:
            updates[method] = [turn["update_seconds"] for turn in own]
            result[method] = {"turns": len(own), "trained_parameters": own[0]["trained_parameters"]} | {
                name: spread([turn[name] for turn in own]) for name in ("rollout_seconds", "update_seconds")
            }
    for method in result.keys() - {"internal"}:
        ratios = [theirs / ours for theirs, ours in zip(updates[method], updates.get("internal", []), strict=False)]
        if ratios:
            result[method]["update_over_internal"] = spread(ratios, 1)
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
        options.temperature, options.lr,
    )  # fmt: skip
    clock = job.run()
    run = {
        "method": options.method, "label": options.label, "chain": list(task.chain), "seed": options.seed,
        "temperature": None if options.method == "internal" else options.temperature,
        "lr": SETTINGS["internal"]["lr"] if options.method == "internal" else job.lr or LR[options.method],
    }  # fmt: skip
    names = tuple(run)
    run |= {
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
    learning.add_argument("--label", default="")
    learning.set_defaults(command=learn)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.command(options)


if __name__ == "__main__":
    main()
