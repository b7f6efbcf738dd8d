"""What the completions of a run's language model are worth, on the run's own prompts or any other ones."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from internalrl.analysis.report.runs import find, open_steered, require_codes
from internalrl.analysis.statistics import mean_interval
from internalrl.base.loading import load_tokenizer
from internalrl.base.text_data import Rows
from internalrl.controller.policy import PolicyActor
from internalrl.controller.steered import Propose, bare
from internalrl.domains.code.grammar import PROMPT, CodeConfig
from internalrl.domains.code.tasks import tasks
from internalrl.errors import InternalRLError
from internalrl.players.stepwise import Rollout, RowChance, prior, rollout
from internalrl.reinforce.completions import Completions
from internalrl.reinforce.conversing import make_writing
from internalrl.reinforce.rewards import load_function
from internalrl.reinforce.writing import Writing
from internalrl.run.folder import RunFolder, read_run
from internalrl.run.processes import Processes
from internalrl.run.streams import Stream
from internalrl.settings.stages import CompletionConfig, EvaluateConfig

CHUNK = 512
"""Completions written at once."""


@dataclass(frozen=True)
class Asked:
    """What a run's model is asked to write, and who judges it."""

    prompts: Rows | str
    rewards: tuple[str, ...]
    environment: str | None
    options: CompletionConfig


def main(config: EvaluateConfig, run: RunFolder, base: PreTrainedModel) -> dict[str, Any]:
    """Let the models of `run` complete prompts, in turn until there are `config.episodes` completions.

    Returns the mean reward with its 95 % interval, the mean of each reward function, mean length in tokens, the
    fraction that the most tokens cut off, segments per completion (None with the controller off), and seconds.
    """
    if config.task is not None or config.forget is not None:
        raise InternalRLError("--task and --forget are for grids; a language model is evaluated with --prompts.")
    began, asked = time.monotonic(), find_asked(config, run)
    alone = config.controller == "off"
    steered = bare(base) if alone else require_codes(run, open_steered(run, base), config.controller)
    factory = None if asked.environment is None else load_function(asked.environment)
    writing = make_writing(
        steered, load_tokenizer(run.path / "base"), asked.rewards, asked.prompts, asked.options, Processes(), factory
    )
    scores, lengths = [], list[int]()
    cut = segments = 0
    for environment, result in write(writing, config, temperature_of(config, asked.options), run.seed):
        tokens, columns = writing.read(environment, result)
        scores.append(writing.rewards(columns))
        lengths += map(len, tokens)
        cut += sum(row[-1] not in writing.ends for row in tokens)
        segments += int(result.switch.sum())
    judged, count = torch.cat(scores), config.episodes
    reward = writing.rewards.total(judged)
    return {
        "prompts": len(writing.rows),
        "controller": config.controller,
        "deterministic": config.deterministic,
        "episodes": count,
        "reward": reward.mean().item(),
        "reward_95": mean_interval(reward.tolist()),
        **{name: value for name, value in writing.said(judged).items() if name.endswith("/mean")},
        "mean_length": float(np.mean(lengths)),
        "cut_off": cut / count,
        "segments_per_episode": None if alone else segments / count,
        "seconds": time.monotonic() - began,
    }


def find_asked(config: EvaluateConfig, run: RunFolder) -> Asked:
    """The prompts and rewards of `config`, or else the run's own; InternalRLError where neither has any."""
    stored: Mapping[str, Any] = read_run(run.path)["config"]
    prompts: Any = find(stored, "prompts") if config.prompts is None else str(config.prompts)
    rewards, environment = config.rewards or tuple(find(stored, "rewards") or ()), find(stored, "environment")
    if prompts is None and (idioms := find(stored, "idioms")):  # the demo's task
        prompts = [{"prompt": PROMPT, "chain": tasks(CodeConfig())[idioms].chain}]
        rewards = rewards or ("internalrl.domains.code.tasks.passes_tests",)
    if prompts is None or not (rewards or environment):
        raise InternalRLError(
            f"Run {run.path} has no prompts and rewards of its own; give --prompts, a JSONL file, and --rewards."
        )
    own = {name: find(stored, name) for name in ("agent", "temperature", "max_completion_length")}
    weights = () if config.rewards or find(stored, "idioms") else tuple(find(stored, "reward_weights") or ())
    own["max_completion_length"] = config.max_completion_length or own["max_completion_length"]
    options = {name: value for name, value in own.items() if value is not None}
    return Asked(prompts, rewards, environment, CompletionConfig(**options, reward_weights=weights))


def temperature_of(config: EvaluateConfig, options: CompletionConfig) -> float:
    """Of the tokens: the run's own; of a bare base that was not trained at it, 1, or 0 to be deterministic."""
    if config.controller != "off":
        return options.temperature
    if config.deterministic:
        return 0.0
    return options.temperature if options.agent == "raw-action" else 1.0


def write(
    writing: Writing, config: EvaluateConfig, temperature: float, seed: int
) -> Iterator[tuple[Completions, Rollout]]:
    """`config.episodes` completions, at most `CHUNK` at a time; the same seed gives the same ones."""
    generator, steered = Stream.EVALUATE.torch(seed), writing.steered
    n_z, horizon = steered.metacontroller.config.n_z, writing.config.max_completion_length
    for begin in range(0, config.episodes, CHUNK):
        environment = writing.begin(np.arange(begin, min(begin + CHUNK, config.episodes)) % len(writing.rows))
        count = len(environment)
        chance = RowChance.draw(generator, range(count), count, horizon, n_z)
        if config.controller == "policy":
            assert steered.policy is not None
            propose: Propose = PolicyActor(steered.policy, count, chance.codes, config.deterministic)
        else:
            propose = prior(n_z, generator)
        yield environment, rollout(steered, environment, propose, temperature, generator=chance)
