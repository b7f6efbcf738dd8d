"""The three stages on programs, one after the other in one run folder, beside token-level RL."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from internalrl.analysis.report import report
from internalrl.base.loading import load_base
from internalrl.base.pretrain_text import build_language_model, completion_nll, pretrain_text, save_language_model
from internalrl.base.text_data import tokenise
from internalrl.controller.steered import SteeredModel, bare
from internalrl.discovery.consolidate import consolidate
from internalrl.discovery.programs import CodeDomain
from internalrl.discovery.text import TextMaterial
from internalrl.discovery.train import discover
from internalrl.domains.code.grammar import PROMPT, CodeConfig, entropy, log_prob, sample_programs
from internalrl.domains.code.sandbox.sandbox import Sandbox
from internalrl.domains.code.tasks import task_rewards, tasks
from internalrl.domains.code.tokenizer import build_tokenizer
from internalrl.errors import InternalRLError
from internalrl.reinforce.rewards import Rewards
from internalrl.reinforce.train import RECENT
from internalrl.reinforce.trainer import make_text_agent
from internalrl.reinforce.writing import Writing
from internalrl.run.folder import RunFolder
from internalrl.run.processes import Processes
from internalrl.run.streams import Stream
from internalrl.settings.demos import CodeDemoConfig
from internalrl.settings.stages import CompletionConfig, ReportConfig

CODE = CodeConfig()
HELD_OUT = 2048  # programs that the base is measured on


def main(config: CodeDemoConfig, run: RunFolder) -> dict[str, Any]:
    """Pretrain, discover, consolidate, reinforce; then the same budget for token-level RL, and the report."""
    tokenizer, seconds = build_tokenizer(CODE), {}
    torch.manual_seed(run.seed)
    new = build_language_model(config.pretrain, tokenizer)
    corpus = sample_programs(CODE, config.pretrain.steps * config.pretrain.batch_size, Stream.PRETRAIN.numpy(run.seed))
    examples = tokenise(corpus.rows, tokenizer, new.config)
    seconds["pretrain"] = pretrain_text(new, examples, config.pretrain, run).seconds
    save_language_model(new, tokenizer, run.path / "base")
    base = load_base(run.path / "base")
    pretrained = measure_base(base, tokenizer, run.seed)

    torch.manual_seed(run.seed)
    steered = SteeredModel.from_base(base, config.discover.metacontroller)
    programs = sample_programs(CODE, config.programs, Stream.DISCOVER.numpy(run.seed))
    examples = tokenise(programs.rows, tokenizer, base.config)
    material = TextMaterial(examples, run.seed, CodeDomain(CODE, tokenizer))
    seconds["discover"] = discover(steered, material, config.discover, run).seconds
    consolidated = discovered = material.measure(steered)
    steered.save_pretrained(run.path / "discovered", {"discover": {"seed": run.seed}})
    if config.discover.consolidate.enabled:
        seconds |= consolidate(steered, material, config.discover.consolidate, run)
        consolidated = material.measure(steered)

    task = tasks(CODE)[config.idioms]
    with Sandbox() as sandbox:
        judged = task_rewards(task, sandbox)
        rewards = Rewards([judged.success, judged.runs], (1.0, 0.0), outcomes=judged.outcomes)
        budget = replace(config.reinforce, agent="internal")
        internal = reinforce(make_writing(steered, tokenizer, rewards, budget), run, "reinforce")
        steered.save_pretrained(run.path / "adapter", {"demo": {"seed": run.seed, "task": list(task.chain)}})
        budget = replace(config.raw_action, agent="raw-action", episodes=internal["episodes"])
        raw = reinforce(make_writing(bare(run.path / "base"), tokenizer, rewards, budget), run, "raw-action")
    seconds |= {"reinforce": internal["seconds"], "raw-action": raw["seconds"]}

    summary = {
        "success": internal["success"],
        "raw_action_success": raw["success"],
        "runs": internal["runs"],
        "raw_action_runs": raw["runs"],
        "task": " → ".join(task.chain),
        "switch_f1": consolidated["switch_f1"],
        "forced_unseen": consolidated["forced_unseen"],
        "forced_unseen_before_consolidation": discovered["forced_unseen"],
        "forced_corpus": consolidated["forced_corpus"],
        "random_runs": consolidated["random_runs"],
        "gap_nats": pretrained["gap_nats"],
        "pretrain": pretrained,
        "discovered": discovered,
        "consolidated": consolidated,
        "episodes": internal["episodes"],
        "seconds": {**seconds, "total": math.fsum(seconds.values())},
    }
    run.write_json("summary.json", summary)
    report.main(ReportConfig(), run)
    return summary


def check(config: CodeDemoConfig) -> None:
    """Raise where one of the stages could not begin: better now than after those before it."""
    if config.discover.consolidate.enabled and config.discover.consolidate.steps:
        raise InternalRLError("Texts have no forgetful teacher: splices take its place; give consolidate.steps 0.")
    tokenizer = build_tokenizer(CODE)
    base = build_language_model(config.pretrain, tokenizer)
    longest = max(tokenise(sample_programs(CODE, 500, Stream.HELD_OUT.numpy(0)).rows, tokenizer, base.config).lengths)
    if longest >= config.pretrain.context:
        raise InternalRLError(
            f"--pretrain.context is {config.pretrain.context}, which programs of the corpus fill; give 256 or more."
        )
    steered = SteeredModel.from_base(base, config.discover.metacontroller)
    rewards = Rewards(lambda completions: [0.0] * len(completions))
    for settings in (replace(config.reinforce, agent="internal"), replace(config.raw_action, agent="raw-action")):
        make_text_agent(steered, make_writing(steered, tokenizer, rewards, settings).config)


def measure_base(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, float]:
    """Nats per fresh program: the base's NLL, what it is above the corpus's own on the same ones, and the entropy."""
    programs = sample_programs(CODE, HELD_OUT, Stream.HELD_OUT.numpy(seed))
    nll = completion_nll(base, tokenise(programs.rows, tokenizer, base.config))
    gap = nll + [log_prob(CODE, program) for program in programs.texts]
    return {"nll_nats": float(nll.mean()), "gap_nats": float(gap.mean()), "entropy_nats": entropy(CODE)}


def make_writing(
    steered: SteeredModel, tokenizer: PreTrainedTokenizerFast, rewards: Rewards, config: CompletionConfig
) -> Writing:
    """Programs after the one prompt there is; all of a batch are compared with one another."""
    config = replace(config, num_generations=config.batch_size)
    return Writing(steered, tokenizer, rewards, [{"prompt": PROMPT}], config, Processes())


def reinforce(writing: Writing, run: RunFolder, stage: str) -> dict[str, Any]:
    """Let the agent that the settings name learn; its success and `runs`, the share of programs that run, in the end,
    the programs that it took, and the seconds."""
    torch.manual_seed(run.seed)
    found = writing.reinforce(make_text_agent(writing.steered, writing.config), run, stage)
    last = [line["rewards/runs/mean"] for line in run.metrics(stage)[-RECENT:]]
    return {**found, "runs": math.fsum(last) / len(last)}
