"""What is played when a language model is reinforced: batches of completions of prompts, judged by reward functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from internalrl.base.caches import token_cache
from internalrl.base.text_data import (
    Rows,
    check_tokenizer,
    context_length,
    encode_prompts,
    in_epochs,
    prompt_text,
    read_rows,
)
from internalrl.controller.generate import heeds_padding
from internalrl.controller.steered import SteeredModel
from internalrl.errors import InternalRLError
from internalrl.players.stepwise import BatchEnvironment, Rollout, RowChance
from internalrl.reinforce.agents import Agent
from internalrl.reinforce.completions import Completions, pad_prompts
from internalrl.reinforce.rewards import Rewards
from internalrl.reinforce.train import Outcome, reinforce
from internalrl.run.folder import RunFolder
from internalrl.run.processes import Processes
from internalrl.run.streams import Stream
from internalrl.settings.stages import CompletionConfig


class Writing:
    """A dataset of prompts, the batches of completions made of them, and what these are worth.

    Args:
        dataset: rows with a `prompt`, text or messages; their other columns go to the rewards.
        processes: those that share every batch.

    Raises:
        InternalRLError: an empty dataset, rows without a prompt, a tokenizer or a base that does not fit, prompts that
            leave no room for a completion, a batch that cannot be divided.
    """

    def __init__(
        self,
        steered: SteeredModel,
        tokenizer: PreTrainedTokenizerBase,
        rewards: Rewards,
        dataset: Rows | str | Any,
        config: CompletionConfig,
        processes: Processes,
    ):
        self.steered, self.tokenizer, self.rewards, self.config = steered, tokenizer, rewards, config
        self.rows, self.processes = read_rows(dataset), processes
        if config.batch_size % config.num_generations:
            raise InternalRLError(
                f"A batch of {config.batch_size} completions is not made of groups of {config.num_generations}; let "
                "batch_size be a multiple of num_generations."
            )
        self.share = processes.share(config.batch_size)
        base = steered.base
        check_tokenizer(tokenizer, base.config)
        token_cache(base)
        self.ends = text_ends(base, tokenizer)
        self.prompts = self._encode_prompts()
        self._require_room(range(len(self.prompts)), self.prompts)

    def reinforce(self, agent: Agent, run: RunFolder, stage: str = "reinforce") -> dict[str, Any]:
        """Let `agent` learn; see `train.reinforce`."""
        n_z = self.steered.metacontroller.config.n_z

        def chance(iteration: int) -> RowChance:
            generator = Stream.REINFORCE.torch(run.seed, iteration)
            horizon = self.config.max_completion_length
            return RowChance.draw(generator, self.share, self.config.batch_size, horizon, n_z)

        def environment(iteration: int) -> Completions:
            numbers = self.numbers(run.seed, iteration)
            return self.begin(numbers[self.share.start : self.share.stop])

        return reinforce(agent, environment, self.config, run, stage, self.judge, chance, self.processes)

    def begin(self, numbers: NDArray[np.int64]) -> Completions:
        """Completions of the rows with these numbers (N,)."""
        prompts = pad_prompts([self.prompts[number] for number in numbers])
        return Completions(prompts, self.ends, self.config.max_completion_length, numbers)

    def numbers(self, seed: int, iteration: int) -> NDArray[np.int64]:
        """(N,): which prompts a batch is made of, in all processes; epoch after epoch, each in a new order."""
        count = self.config.batch_size // self.config.num_generations
        first = iteration * count
        drawn = in_epochs(len(self.rows), first, first + count, seed, Stream.PROMPTS)
        return drawn.repeat(self.config.num_generations)

    def judge(self, environment: BatchEnvironment, result: Rollout) -> Outcome:
        """Ask the rewards about this process's completions; what all processes have together."""
        assert isinstance(environment, Completions)
        tokens, columns = self.read(environment, result)
        scores, came = self.rewards(columns), self.rewards.tried(columns)
        numbered = None if came is None else [f"{n} {what}" for n, what in zip(environment.numbers, came, strict=True)]
        clipped = [row[-1] not in self.ends for row in tokens]
        own = zip(environment.numbers.tolist(), map(len, tokens), clipped, scores.tolist(), strict=True)
        numbers, lengths, cut, rows = zip(*self.processes.gather(list(own)), strict=True)
        scores = torch.tensor(rows)
        groups = torch.tensor(numbers)
        reward = self.rewards.total(scores)
        spreads = torch.stack([reward[groups == group].std(correction=0) for group in groups.unique()])
        metrics = {
            "success": reward.mean().item(),
            "reward": reward.mean().item(),
            "reward_std": spreads.mean().item(),
            "frac_reward_zero_std": (spreads == 0).float().mean().item(),
            **self.said(scores),
            "completions/mean_length": float(np.mean(lengths)),
            "completions/min_length": min(lengths),
            "completions/max_length": max(lengths),
            "completions/clipped_ratio": float(np.mean(cut)),
            **self._more_metrics(environment),
        }
        return Outcome(reward, groups, metrics, None if numbered is None else self.processes.gather(numbered))

    def said(self, scores: Tensor) -> dict[str, float | None]:
        """Mean and standard deviation of the `scores` (N, F) of each function, over the completions it speaks of."""
        found: dict[str, float | None] = {}
        for name, column in zip(self.rewards.names, scores.T, strict=True):
            said = column[~column.isnan()]
            found[f"rewards/{name}/mean"] = said.mean().item() if len(said) else None
            found[f"rewards/{name}/std"] = said.std(correction=0).item() if len(said) else None
        return found

    def read(self, environment: Completions, result: Rollout) -> tuple[list[list[int]], dict[str, list[Any]]]:
        """The tokens of what was written, and the columns that the rewards are given."""
        tokens = [row[:length] for row, length in zip(result.actions.tolist(), result.length.tolist(), strict=True)]
        rows = [self.rows[int(number)] for number in environment.numbers]
        others = [name for name in rows[0] if name not in ("prompt", "completion")]
        return tokens, {
            **{name: [row.get(name) for row in rows] for name in others},
            "completion_ids": tokens,
            **self._exchanged(environment, tokens),
        }

    def _exchanged(self, environment: Completions, tokens: list[list[int]]) -> dict[str, list[Any]]:
        """Prompts, and completions in the same form."""
        prompts = [self.rows[int(number)]["prompt"] for number in environment.numbers]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return {"prompts": prompts, "completions": completions}

    def _more_metrics(self, environment: Completions) -> dict[str, float]:
        return {}

    def _encode_prompts(self) -> list[list[int]]:
        """The tokens of every row's prompt."""
        texts = []
        for number, row in enumerate(self.rows):
            prompt = row.get("prompt")
            if not isinstance(prompt, str | list) or not prompt:
                raise InternalRLError(
                    f"Row {number} has the columns {', '.join(map(str, row))} and no text or messages in `prompt`; "
                    "give it."
                )
            texts.append(prompt_text(prompt, self.tokenizer))
        return encode_prompts(texts, self.tokenizer)

    def _require_room(self, numbers: Sequence[int] | NDArray[np.int64], prompts: Sequence[list[int]]) -> None:
        """InternalRLError for `prompts`, those of the rows with these numbers, that leave none for a completion."""
        base, completion = self.steered.base, self.config.max_completion_length
        lengths = [len(prompt) for prompt in prompts]
        context = context_length(base.config)
        if context is not None and max(lengths) + completion > context:
            raise InternalRLError(
                f"The prompt of row {numbers[int(np.argmax(lengths))]} has {max(lengths)} tokens, which with "
                f"max_completion_length = {completion} is more than the model's context of {context}; shorten one of "
                "them."
            )
        if len(set(lengths)) > 1 and not heeds_padding(base):
            raise InternalRLError(
                f"{type(base).__name__} reads padding as if it were text; give prompts of the same number of tokens."
            )


def text_ends(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text."""
    ends = base.generation_config.eos_token_id if base.generation_config else None
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
