"""`internalrl reinforce`: stage 3 on the grid, or, given prompts, of a language model."""

from __future__ import annotations

from typing import Any

import torch

from internalrl.base.loading import load_tokenizer
from internalrl.base.pretrain_text import save_language_model
from internalrl.controller.steered import SteeredModel, bare
from internalrl.errors import InternalRLError
from internalrl.reinforce import train
from internalrl.reinforce.conversing import make_writing
from internalrl.reinforce.rewards import load_function
from internalrl.reinforce.trainer import make_text_agent
from internalrl.reinforce.writing import Writing
from internalrl.run.folder import RunFolder
from internalrl.run.processes import Processes
from internalrl.settings.stages import ReinforceConfig


def main(config: ReinforceConfig, run: RunFolder) -> dict[str, Any]:
    """Reinforce what is in another run's folder; save base and adapter to `run`."""
    if config.prompts is None:
        return train.main(config, run)
    writing = _writing(config)
    steered = writing.steered
    torch.manual_seed(run.seed)
    summary = writing.reinforce(make_text_agent(steered, config), run)
    save_language_model(steered.base, writing.tokenizer, run.path / "base")
    steered.save_pretrained(run.path / "adapter", {"reinforce": {"rewards": list(config.rewards), "seed": run.seed}})
    return summary


def check(config: ReinforceConfig) -> None:
    """Raise where the stage could not begin: no whole model there, or a task that is none of its."""
    if config.prompts is None:
        train.load_steered(config)
    else:
        make_text_agent(_writing(config).steered, config)


def _writing(config: ReinforceConfig) -> Writing:
    factory = None if config.environment is None else load_function(config.environment)
    if not config.rewards and factory is None:
        raise InternalRLError("--rewards is empty; name functions that judge completions, package.module.function.")
    if config.limits is not None:
        raise InternalRLError("Limits are for grids as yet; leave --limits out.")
    folder = config.discovered / "base"
    if config.agent == "raw-action":
        steered = bare(folder)
    else:
        steered = SteeredModel.from_pretrained(folder, config.discovered / "adapter")
    tokenizer = load_tokenizer(folder)
    return make_writing(
        steered, tokenizer, config.rewards, config.prompts, config, Processes(), factory, config.outcomes
    )
