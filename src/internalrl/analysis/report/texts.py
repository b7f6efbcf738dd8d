"""What the report shows of runs on texts that it knows nothing about: prompts and their completions, by segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from internalrl.analysis.report.material import Material, Words
from internalrl.base.text_data import encode_prompts, prompt_text, read_rows
from internalrl.controller.steered import SteeredModel
from internalrl.errors import InternalRLError

Source = Literal["off", "prior", "policy"]

SHOWN = 4
"""Prompts that are completed for the report."""

MOST = 128
"""Tokens of a completion of a run that was not told how many."""


@dataclass(frozen=True)
class Written:
    """A prompt, and how it was completed: the text of each segment, or of the whole if nothing chose codes."""

    prompt: str
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class TextMaterial(Material):
    """Of a run on texts."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model: SteeredModel | None

    words = Words(episode="text", action="token", step="token", raw="tokens")
    lead = (
        "A language model went on as it was trained to. What it works out while it reads became actions of a higher "
        "order, and reinforcement learning was done on those."
    )

    @property
    def steered(self) -> SteeredModel | None:
        return self.model

    @cached_property
    def prompts(self) -> list[str]:
        """The first prompts of the run, or of the texts that codes were found in; none where the file is gone, or where
        an environment would have to take part."""
        if self.setting("environment"):
            return []
        file = self.setting("prompts") or self.setting("data")
        try:
            rows: Any = read_rows(file) if file else []
        except InternalRLError:
            return []
        found = (_prompt(rows[number], self.tokenizer) for number in range(min(len(rows), SHOWN)))
        return [prompt for prompt in found if prompt]

    @cached_property
    def written(self) -> dict[Source, list[Written]]:
        """Completions of these prompts by whoever there is to choose the codes, "off" for the base alone."""
        if self.model is None:
            return {}
        sources: list[Source] = ["off", "prior"] if self.model.policy is None else ["off", "prior", "policy"]
        return {source: [self._write(prompt, source) for prompt in self.prompts] for source in sources}

    def _write(self, prompt: str, source: Source) -> Written:
        """Tokens at the temperature of internal RL; of the base alone, at 1."""
        assert self.model is not None
        temperature = 1.0 if source == "off" else self.setting("temperature") or 0.0
        tokens = torch.tensor(encode_prompts([prompt], self.tokenizer), device=self.base.device)
        with torch.random.fork_rng():
            torch.manual_seed(self.run.seed)
            sequences, trace = self.model.generate(
                tokens,
                steering=source,
                return_trace=True,
                tokenizer=self.tokenizer,
                max_new_tokens=self.setting("max_completion_length") or MOST,
                **({"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}),
            )
        if source == "off":
            return Written(prompt, (str(self.tokenizer.decode(sequences[0, tokens.shape[1] :])),))
        return Written(prompt, tuple(segment.text for segment in trace.segments[0]))


def _prompt(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What there is to complete in a row of prompts or of a corpus; None in one that is a single text."""
    messages: Sequence[Mapping[str, Any]] = row.get("messages", ())
    prompt = row.get("prompt") or list(messages[:-1])
    return prompt_text(prompt, tokenizer) if prompt else None
