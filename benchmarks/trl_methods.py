"""What benchmarks/trl_grpo.py compares: one model, prompt and reward in TRL's trainer and in ours, with a clock."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from code_rl import SETTINGS
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerControl
from trl import GRPOConfig, GRPOTrainer

from internalrl.controller.steered import SteeredModel
from internalrl.domains.code.grammar import PROMPT
from internalrl.domains.code.sandbox.sandbox import Sandbox
from internalrl.domains.code.tasks import CodeTask, task_rewards
from internalrl.reinforce import train
from internalrl.reinforce.trainer import InternalRLTrainer
from internalrl.settings.stages import InternalRLConfig

BATCH, LONGEST = 1024, 160
TOGETHER, CACHE = 64, "static"
"""What is fastest for TRL."""
LR = {"trl-full": 1e-3, "trl-lora": 3e-3, "tokens": 1e-3}
"""The best of the sweep."""
METHODS = ("tokens", "trl-full", "trl-lora", "internal")
Reward = Callable[..., list[float]]
TIMED_WEIGHTS, LEARN_WEIGHTS = (1.0, 0.1), (1.0, 0.0)


@dataclass
class Clock:
    """What each iteration took, in seconds (`update_cpu`: of the processor), and came to; parameters `trained`."""

    rollout: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    update_cpu: list[float] = field(default_factory=list)
    success: list[float] = field(default_factory=list)
    runs: list[float] = field(default_factory=list)
    trained: int = 0


def timed(
    function: Callable[..., Any], times: list[float], clock: Callable[[], float] = time.perf_counter
) -> Callable[..., Any]:
    """`function`, whose calls' seconds go to `times`."""

    def call(*args: Any, **options: Any) -> Any:
        began = clock()
        result = function(*args, **options)
        times.append(clock() - began)
        return result

    return call


def noted(reward: Reward, means: list[float]) -> Reward:
    """`reward`, whose means go to `means`."""

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
    minutes: float = math.inf

    def run(self) -> Clock:
        clock = Clock()
        torch.manual_seed(self.seed)
        with Sandbox() as sandbox, tempfile.TemporaryDirectory() as folder:
            judged = task_rewards(self.task, sandbox)
            rewards = [noted(judged.success, clock.success), noted(judged.runs, clock.runs)]
            play = self.trl if self.method.startswith("trl") else self.ours
            play(rewards, clock, Path(folder) / "run")
        return clock

    def trl(self, rewards: list[Reward], clock: Clock, folder: Path) -> None:
        """`trl.GRPOTrainer`: one optimiser step per iteration, on fresh programs, no reference model."""

        class Timed(GRPOTrainer):
            def _generate_and_score_completions(self, inputs: Any) -> Any:
                result = timed(super()._generate_and_score_completions, clock.rollout)(inputs)
                self.scored, self.scored_cpu = time.perf_counter(), time.process_time()
                return result

        class Ended(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
                clock.update.append(time.perf_counter() - trainer.scored)
                clock.update_cpu.append(time.process_time() - trainer.scored_cpu)
                control.should_training_stop |= time.perf_counter() > until

        until = time.perf_counter() + 60 * self.minutes
        args = GRPOConfig(
            output_dir=str(folder), seed=self.seed, use_cpu=not torch.cuda.is_available(), bf16=False,
            gradient_checkpointing=False,
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
        trainer.agent.play = timed(trainer.agent.play, played)
        trainer.writing.judge = timed(trainer.writing.judge, judged)
        improve = timed(timed(train.improve, clock.update), clock.update_cpu, time.process_time)
        with mock.patch.object(train, "improve", improve):
            trainer.train()
        clock.rollout = [sum(parts) for parts in zip(played, judged, strict=True)]
