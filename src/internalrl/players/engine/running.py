"""The sequences in their slots: prompts are read, and then all of them grow by a token per forward pass of the base."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from internalrl.controller.steering import open_taps
from internalrl.players.engine.batch import JointCache, plain_cache
from internalrl.players.engine.group import Group
from internalrl.players.engine.sampling import Sampler
from internalrl.players.engine.sequence import Sequence


@dataclass
class _Steered:
    """A group, its members, and their rows among all sequences; None is all of them, in the same order."""

    group: Group
    members: list[Sequence]
    rows: Tensor | None = None


class Running:
    """Up to `slots` sequences that are decoded together. What fails in one of them ends that one alone."""

    def __init__(self, base: PreTrainedModel, slots: int, context: int | None):
        self.base, self.slots, self.context = base, slots, context
        self.sequences: list[Sequence] = []
        self._cache = JointCache(base, slots, context)
        self._steered: dict[tuple[object, ...], _Steered] = {}
        self._sampler: Sampler | None = None  # of these sequences, in this order
        parameters = inspect.signature(base.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def prefill(self, sequence: Sequence, most: int) -> int:
        """Read on in a prompt, at most `most` tokens; at its end the sequence joins the others. Returns how many."""
        begin, prompt = sequence.read, sequence.request.prompt
        end = sequence.read = min(begin + most, len(prompt))
        try:
            if sequence.cache is None:
                sequence.cache = plain_cache(self.base, self.context)
            tokens = torch.tensor([prompt[begin:end]], device=self.base.device)
            inputs = {"past_key_values": sequence.cache, "attention_mask": tokens.new_ones(1, end), **self._last_only}
            group = sequence.group
            parts = [] if group is None else [group.part(None, prompt=len(prompt) - 1 - begin)]
            with open_taps(self.base, *parts):
                logits = self.base(input_ids=tokens, use_cache=True, **inputs).logits[:, -1]
            if group is not None:
                self._open(group, [sequence])
            if end == len(prompt):
                self._take([sequence], logits, self._sampler_of([sequence]))
                if not sequence.finished:
                    self._join(sequence)
        except Exception as error:
            sequence.fail(error)
        return end - begin

    def step(self) -> None:
        """One more token for every sequence."""
        if not self.sequences:
            return
        if self._sampler is None:
            self._arrange()
        assert self._sampler is not None
        tokens = torch.tensor([[sequence.last] for sequence in self.sequences], device=self.base.device)
        parts = [steered.group.part(steered.rows) for steered in self._steered.values()]
        with open_taps(self.base, *parts):
            logits = self.base(input_ids=tokens, use_cache=True, **self._cache.inputs()).logits[:, -1]
        self._cache.grow()
        for steered in self._steered.values():
            self._open(steered.group, steered.members)
        self._take(self.sequences, logits, self._sampler)

    def drop_finished(self) -> None:
        """Free the slots of sequences that have finished."""
        gone = [row for row, sequence in enumerate(self.sequences) if sequence.finished]
        if not gone:
            return
        order = self._cache.drop(gone)
        self.sequences = [self.sequences[row] for row in order]
        for kind, steered in list(self._steered.items()):
            left = [at for at, sequence in enumerate(steered.members) if not sequence.finished]
            if not left:
                del self._steered[kind]
            elif len(left) < len(steered.members):
                steered.group.select(left)
                steered.members = [steered.members[at] for at in left]
        self._sampler = None

    def _join(self, sequence: Sequence) -> None:
        assert sequence.cache is not None
        self._cache.add(sequence.cache)
        self.sequences.append(sequence)
        group = sequence.group
        if group is not None:
            if group.kind in self._steered:
                steered = self._steered[group.kind]
                steered.group.join(group)
                steered.members.append(sequence)
            else:
                self._steered[group.kind] = _Steered(group, [sequence])
        sequence.cache = sequence.group = None
        self._sampler = None

    def _arrange(self) -> None:
        """After sequences have come or gone: which rows are whose."""
        row_of = {sequence: row for row, sequence in enumerate(self.sequences)}
        for steered in self._steered.values():
            rows = [row_of[sequence] for sequence in steered.members]
            everyone = rows == list(range(len(self.sequences)))
            steered.rows = None if everyone else torch.tensor(rows, device=self.base.device)
        self._sampler = self._sampler_of(self.sequences)

    def _sampler_of(self, sequences: list[Sequence]) -> Sampler:
        requests = [sequence.request for sequence in sequences]
        return Sampler(requests, [sequence.generator for sequence in sequences], self.base.device)

    def _open(self, group: Group, members: list[Sequence]) -> None:
        for opening in group.finish():
            sequence = members[opening.row]
            _guarded(sequence, sequence.open, opening)

    def _take(self, sequences: Iterable[Sequence], logits: Tensor, sampler: Sampler) -> None:
        drawn = sampler(logits)
        for sequence, *token in zip(sequences, drawn.numbers, drawn.logprobs, drawn.tops, strict=True):
            if not sequence.finished:
                _guarded(sequence, sequence.take, *token)


def _guarded(sequence: Sequence, do: Callable[..., None], *args: Any) -> None:
    try:
        do(*args)
    except Exception as error:
        sequence.fail(error)
