"""A corpus of texts as material of stage 2: completions after their prompts, and texts spliced at learned switches.

The actions are the next tokens. Prompt tokens are history; at the last of them the first segment opens, as in
generation.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from internalrl.base.batches import Batch
from internalrl.base.text_data import Examples, TextBatch, context_length
from internalrl.controller.metacontroller import Metacontroller
from internalrl.controller.steered import SteeredModel
from internalrl.discovery.consolidate import Lesson
from internalrl.discovery.evaluate import alignment
from internalrl.discovery.objective import Episodes, opening
from internalrl.discovery.rehearse import Rehearsal
from internalrl.discovery.splice import Cut, splice
from internalrl.errors import InternalRLError
from internalrl.run.streams import Stream
from internalrl.settings.stages import ConsolidateConfig, DiscoverConfig, RehearseConfig

HELD_OUT = 256  # texts, at most a tenth of them all, that are measured on and never learned from


class TextDomain(Protocol):
    """What is known of the texts beyond their tokens. None of it is used for training but `accept`."""

    def boundaries(self, tokens: list[int]) -> list[int]:
        """Positions of the tokens at which a switch is due; for evaluation alone."""

    def accept(self, texts: list[list[int]]) -> list[bool]:
        """Which spliced texts, given as tokens, are worth learning from."""

    def measure(self, steered: SteeredModel, material: TextMaterial) -> dict[str, Any]:
        """What codes make the model write."""


class TextMaterial:
    """The texts of `examples`, in an order that depends on `seed`; of plain texts, `domain` is None.

    Raises:
        InternalRLError: there are fewer than two.
    """

    def __init__(self, examples: Examples, seed: int, domain: TextDomain | None = None):
        if len(examples) < 2:
            raise InternalRLError(f"The corpus has {len(examples)} text; give two or more, since some are held out.")
        self.examples, self.seed, self.domain = examples, seed, domain
        order = Stream.HELD_OUT.numpy(seed).permutation(len(examples))
        held_out, self.training = np.split(order, [min(HELD_OUT, max(len(examples) // 10, 1))])
        self.measured = self._measured(held_out)
        """The held-out texts."""

    def sample(self, count: int) -> Batch:
        return to_batch(self.examples.batch(self._draw(count, Stream.SLOW)))

    def corpus(
        self, steered: SteeredModel, config: DiscoverConfig, segmenter: Metacontroller | None = None
    ) -> list[Episodes]:
        """Whole texts: a completion belongs to its prompt, so nothing is cropped."""
        rows = self._draw(config.batch_size * config.batches, Stream.DISCOVER)
        parts = by_length(self.examples.lengths[rows], config.batch_size)
        return [Episodes.of(steered, to_batch(self.examples.batch(rows[part]))) for part in parts]

    def rehearsals(self, steered: SteeredModel, config: RehearseConfig, segmenter: Metacontroller) -> list[Rehearsal]:
        """Half of them texts as they are, half spliced from the segments of all."""
        rows = self._draw(config.batch_size * config.batches, Stream.REHEARSE)
        whole: list[Cut] = []
        for part in by_length(self.examples.lengths[rows], config.batch_size):
            whole += self._cut(steered, to_batch(self.examples.batch(rows[part])), segmenter)
        spliced = splice(
            whole,
            len(whole) // 2,
            Stream.REHEARSE.numpy(self.seed, 1),
            self.domain.accept if self.domain else lambda texts: [True] * len(texts),
            context_length(steered.base.config),
        )
        if not spliced:
            warnings.warn("No spliced text was accepted: the switches are not where segments end.", stacklevel=2)
        return [
            self._rehearsal(steered, [texts[i] for i in part])
            for texts in (whole[: len(spliced) or None], spliced)
            for part in by_length(np.array([len(text.tokens) for text in texts]), config.batch_size)
        ]

    def lessons(self, steered: SteeredModel, config: ConsolidateConfig) -> list[Lesson]:
        raise InternalRLError("Texts have no forgetful teacher: splices take its place; give --consolidate.steps 0.")

    @torch.no_grad()
    def measure(self, steered: SteeredModel, thorough: bool = True) -> dict[str, Any]:
        """Alignment on texts held out, as far as boundaries are known; thoroughly, also what the domain tells of
        codes."""
        found: dict[str, Any] = alignment(steered, self.measured)
        if self.domain is None:
            return {name: found[name] for name in ("hard_nll", "hard_switches")}
        return found | self.domain.measure(steered, self) if thorough else found

    def _draw(self, count: int, stream: Stream) -> NDArray[np.int64]:
        """Numbers of `count` training texts, each as often as any other, or once more."""
        rng, size = stream.numpy(self.seed), len(self.training)
        return np.concatenate([rng.permutation(self.training) for _ in range(-(-count // size))])[:count]

    def _measured(self, rows: NDArray[np.int64]) -> Batch:
        """The texts numbered `rows`, with their true boundaries if these are known."""
        texts = self.examples.batch(rows)
        boundary = torch.zeros_like(texts.mask)
        if self.domain is not None:
            for row, (tokens, real) in enumerate(zip(texts.tokens, texts.real, strict=True)):
                boundary[row, self.domain.boundaries(tokens[real].tolist())] = True
        return to_batch(texts, boundary)

    def _cut(self, steered: SteeredModel, batch: Batch, segmenter: Metacontroller) -> list[Cut]:
        """The texts of `batch`, cut at the hard switches of `segmenter`."""
        episodes = Episodes.of(steered, batch)
        segments, _ = segmenter.parse(episodes.residual, episodes.slow, batch.mask)
        switch, lengths = (segments.switch > 0.5) & batch.mask, batch.mask.shape[1] - batch.mask.flip(1).int().argmax(1)
        return [
            Cut(tokens[: length + 1].tolist(), row.nonzero().squeeze(-1).tolist())
            for tokens, length, row in zip(batch.observations, lengths.tolist(), switch, strict=True)
        ]

    def _rehearsal(self, steered: SteeredModel, texts: list[Cut]) -> Rehearsal:
        tokens = np.concatenate([np.array(text.tokens, np.int32) for text in texts])
        ends = np.cumsum([len(text.tokens) for text in texts])
        examples = Examples(tokens, ends, np.array([text.switches[0] + 1 for text in texts]), self.examples.pad)
        episodes = Episodes.of(steered, to_batch(examples.batch(np.arange(len(texts)))))
        switch = torch.zeros_like(episodes.mask)
        for row, text in enumerate(texts):
            switch[row, text.switches] = True
        return Rehearsal(episodes, switch, episodes.mask & ~opening(episodes.mask), episodes.residual)


def to_batch(texts: TextBatch, boundary: Tensor | None = None) -> Batch:
    """Texts as discovery knows batches: at every step the action is the next token."""
    actions, mask = (F.pad(values[:, 1:], (0, 1)) for values in (texts.tokens, texts.mask))
    boundary = torch.zeros_like(mask) if boundary is None else boundary
    return Batch(texts.tokens, actions, mask, torch.full_like(actions, -1), boundary & mask & ~opening(mask))


def by_length(lengths: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Numbers of texts in groups of at most `size` of similar length."""
    order = np.argsort(lengths, kind="stable")
    return [order[begin : begin + size] for begin in range(0, len(order), size)]
