"""Stage 3 on text: internal RL of a steered language model on prompts, in TRL's shape.

    trainer = InternalRLTrainer(
        steered, reward_funcs=[passes], args=InternalRLConfig(output_dir="runs/rl"), train_dataset=[{"prompt": "…"}],
        processing_class=tokenizer,
    )
    trainer.train()

The loop and the objective are those of `train.reinforce`. The base's weights stay as they are: a policy over codes
learns, unless `agent="raw-action"` asks for token-level RL on the bare base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from internalrl.base.fingerprint import base_fingerprint
from internalrl.base.loading import load_tokenizer
from internalrl.base.pretrain_text import save_language_model
from internalrl.base.text_data import Rows
from internalrl.controller.policy import Policy
from internalrl.controller.steered import SteeredModel, bare
from internalrl.errors import InternalRLError
from internalrl.reinforce.agents import Agent, InternalAgent, RawTokenAgent
from internalrl.reinforce.conversations import Factories
from internalrl.reinforce.conversing import make_writing
from internalrl.reinforce.rewards import Reward
from internalrl.run.files import jsonable
from internalrl.run.folder import RunFolder
from internalrl.run.processes import Processes
from internalrl.settings.stages import InternalRLConfig, PolicyGradientConfig


class InternalRLTrainer:
    """Trains a policy over the codes of `model` with outcome rewards.

    Args:
        model: a steered language model; for raw-token RL, a causal language model or the folder of one.
        reward_funcs: functions as TRL takes them, or their dotted paths; see `rewards`.
        args: settings; by default those of `InternalRLConfig`.
        train_dataset: rows with a `prompt`, text or messages, and whatever columns the rewards read; or a JSONL file.
        processing_class: the model's tokenizer; by default the one beside the model.
        environment_factory: makes an environment whose methods the model calls as tools, or several by name; see
            `conversations`. With one, prompts are messages or left out, and its own reward counts as well.
        outcomes: a function like those of rewards, or its dotted path, that says as a string what a completion came to.
            With it, the policy explores while nothing is rewarded; see `novelty`.

    Raises:
        InternalRLError: what does not fit together, in one sentence.
    """

    def __init__(
        self,
        model: SteeredModel | PreTrainedModel | str | Path,
        reward_funcs: Reward | str | Sequence[Reward | str] = (),
        args: InternalRLConfig | None = None,
        train_dataset: Rows | str | Path = (),
        processing_class: PreTrainedTokenizerBase | None = None,
        environment_factory: Factories | None = None,
        outcomes: Reward | str | None = None,
    ):
        self.args = args or InternalRLConfig()
        self.processes = Processes.join()
        if not isinstance(model, SteeredModel) and self.args.agent == "internal":
            raise InternalRLError(
                "Internal RL needs a steered model, whose codes mean something: give the SteeredModel that `discover` "
                "trained, or agent='raw-action' for token-level RL."
            )
        self.model = model if isinstance(model, SteeredModel) else bare(model)
        name = model if isinstance(model, str | Path) else self.model.base.name_or_path
        self.processing_class = processing_class or load_tokenizer(name)
        self.writing = make_writing(
            self.model, self.processing_class, reward_funcs, train_dataset, self.args, self.processes,
            environment_factory, outcomes,
        )  # fmt: skip
        torch.manual_seed(self.args.seed)
        self.agent = make_text_agent(self.model, self.args)

    def train(self, resume_from_checkpoint: bool = False) -> dict[str, Any]:
        """Train to the end of the budget and save; returns mean reward, episodes and seconds.

        Args:
            resume_from_checkpoint: continue the run in `output_dir`, bit-equal on a CPU.
        """
        run = self._run_folder(resume_from_checkpoint)
        summary = self.writing.reinforce(self.agent, run)
        if self.processes.first:
            self.save_model()
        run.write_json("summary.json", summary)
        self.processes.wait()
        return summary

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write what was learned to a folder, by default `output_dir`/adapter: the adapter with its policy, or, of
        raw-token RL, the model (`output_dir`/model)."""
        internal = isinstance(self.agent, InternalAgent)
        folder = Path(output_dir or Path(self.args.output_dir) / ("adapter" if internal else "model"))
        if internal:
            self.model.save_pretrained(folder, {"reinforce": {"seed": self.args.seed}})
        else:
            save_language_model(self.model.base, self.processing_class, folder)

    def _run_folder(self, resume: bool) -> RunFolder:
        path, seed = Path(self.args.output_dir), self.args.seed
        if self.processes.first:
            settings = asdict(self.args)
            overwrite, track = settings.pop("overwrite_output_dir") and not resume, settings.pop("report_to")
            config = jsonable({**settings, "base": base_fingerprint(self.model.base)})
            run = RunFolder.create(path, config, seed=seed, resume=resume, overwrite=overwrite, track=track)
        else:
            run = RunFolder(path, seed, resume, silent=True)
        self.processes.wait()
        return run


def make_text_agent(steered: SteeredModel, config: PolicyGradientConfig) -> Agent:
    """The agent that `config` names; an internal agent's policy becomes part of `steered`."""
    if config.agent == "raw-action":
        if config.temperature == 0:
            raise InternalRLError("Raw-token RL explores by its tokens; give a temperature above 0, such as 1.")
        return RawTokenAgent(steered, config.temperature)
    meta = steered.metacontroller
    steered.policy = Policy(meta.width, meta.config.n_z, config.policy_hidden, config.initial_std)
    return InternalAgent(steered, steered.policy, config.temperature)
