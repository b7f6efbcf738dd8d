"""Completions that environments take part in: what differs from `Writing`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from internalrl.base.text_data import Rows
from internalrl.controller.steered import SteeredModel
from internalrl.errors import InternalRLError
from internalrl.reinforce.completions import Completions
from internalrl.reinforce.conversations import Conversations, Factories, Host
from internalrl.reinforce.rewards import Reward, Rewards
from internalrl.reinforce.writing import Writing, text_ends
from internalrl.run.processes import Processes
from internalrl.settings.stages import CompletionConfig


class Conversing(Writing):
    """Conversations with environments, each of which ends the prompt as it likes; see `conversations`."""

    def __init__(self, host: Host, *args: Any):
        self.host = host
        super().__init__(*args)

    def begin(self, numbers: NDArray[np.int64]) -> Conversations:
        talks = self.host.begin([self.rows[int(number)] for number in numbers])
        self._require_room(numbers, [talk.read for talk in talks])
        return Conversations(talks, self.host, self.config.max_completion_length, numbers)

    def _exchanged(self, environment: Completions, tokens: list[list[int]]) -> dict[str, list[Any]]:
        assert isinstance(environment, Conversations)
        for talk in environment.talks:  # turns that the horizon has cut off
            self.host.put_down(talk)
        return {
            "prompts": [talk.prompt for talk in environment.talks],
            "completions": [talk.completion for talk in environment.talks],
            "environments": [talk.environment for talk in environment.talks],
        }

    def _more_metrics(self, environment: Completions) -> dict[str, float]:
        """TRL's: tool calls per conversation, and which share of them failed."""
        assert isinstance(environment, Conversations)
        counts = self.processes.gather([(talk.calls, talk.failures) for talk in environment.talks])
        calls, failures = map(sum, zip(*counts, strict=True))
        return {"tools/call_frequency": calls / len(counts), "tools/failure_frequency": failures / max(calls, 1)}

    def _encode_prompts(self) -> list[list[int]]:
        """Of the first row alone: the environments end the others when they begin."""
        for number, row in enumerate(self.rows):
            prompt = row.get("prompt", [{"content": ""}])
            if not isinstance(prompt, list) or not prompt or not isinstance(prompt[-1].get("content"), str):
                raise InternalRLError(
                    f"Row {number} has no messages in `prompt`, the last of them text; environments take part in "
                    "conversations: give messages, or no prompt at all."
                )
        return [self.host.begin([self.rows[0]])[0].read]


def make_writing(
    steered: SteeredModel,
    tokenizer: PreTrainedTokenizerBase,
    rewards: Reward | str | Sequence[Reward | str],
    dataset: Rows | Any,
    config: CompletionConfig,
    processes: Processes,
    factory: Factories | None = None,
    outcomes: Reward | str | None = None,
) -> Writing:
    """What is written and what it is worth; with a `factory` of environments, in conversation with them."""
    weights = config.reward_weights or None
    if factory is None:
        judged = Rewards(rewards, weights, outcomes=outcomes)
        return Writing(steered, tokenizer, judged, dataset, config, processes)
    host = Host(factory, tokenizer, text_ends(steered.base, tokenizer))
    judged = Rewards(rewards, weights, host.judges, outcomes)
    return Conversing(host, steered, tokenizer, judged, dataset or [{}], config, processes)
