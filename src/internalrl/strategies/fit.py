"""Finding an adapter's strategies: let it act, and put together the codes that lie together.

Nothing is told of what the codes mean: their number of clusters comes from the codes alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from transformers import PreTrainedTokenizerBase

from internalrl.base.batches import split, to_batch
from internalrl.controller.policy import PolicyActor
from internalrl.controller.steered import SteeredModel
from internalrl.discovery.objective import Episodes
from internalrl.domains.grid.play import FreePlay, entered_colors
from internalrl.domains.grid.world import GridConfig, demonstrate, pretraining_tasks, sample_layouts
from internalrl.errors import InternalRLError
from internalrl.players.stepwise import prior, rollout
from internalrl.run.streams import Stream
from internalrl.strategies.library import Strategy

if TYPE_CHECKING:
    from internalrl.strategies.cli import Source

TOLERANCE = 0.95
"""Of the best silhouette, what the finest partition must have: parts of one strategy can be ruled alike, but two in
one cannot be told apart."""

TYPICAL, SHOWN, LENGTH = 50, 5, 160
"""Codes nearest to a centroid that examples are taken from; examples of a strategy; characters of an example."""

BATCH = 32
"""Sequences generated together."""


@dataclass(frozen=True)
class Sample:
    """M segments: the `codes` (M, n_z) that were in force, and the `deeds`, what each wrote or did."""

    codes: NDArray[np.float64]
    deeds: list[str]


@dataclass(frozen=True)
class Fit:
    """The strategies found, and the silhouette of their codes."""

    strategies: tuple[Strategy, ...]
    silhouette: float


def from_texts(
    steered: SteeredModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    source: Source,
    samples: int,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> Sample:
    """Segments of `samples` texts or a few more: as many from each prompt, or from the beginning of a text."""
    starts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts] or [_beginning(tokenizer)]
    copies = -(-samples // len(starts))
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    generator, codes, deeds = Stream.STRATEGIES.torch(seed), [], []
    context = getattr(steered.base.config.get_text_config(), "max_position_embeddings", None)
    torch.manual_seed(seed)  # transformers samples tokens with torch's own generator
    for number, start in enumerate(starts, 1):
        if not 0 < start.shape[1] < (context or math.inf):
            raise InternalRLError(
                f"Prompt {number} has {start.shape[1]} tokens; give at least one, and room in the context of {context}."
            )
        for made in range(0, copies, BATCH):
            _, trace = steered.generate(
                start,
                steering="policy" if source == "policy" else "prior",
                generator=generator,
                num_return_sequences=min(BATCH, copies - made),
                max_new_tokens=max_tokens if context is None else min(max_tokens, context - start.shape[1]),
                tokenizer=tokenizer,
                return_trace=True,
                **sampling,
            )
            for segment in (segment for row in trace.segments for segment in row):
                codes.append(segment.code.cpu().double().numpy())
                deeds.append(segment.text or "")
    return Sample(np.array(codes), deeds)


def from_grid(steered: SteeredModel, source: Source, episodes: int, seed: int) -> Sample:
    """Segments on the grid: of demonstrations as the encoder codes them, or of free play, where nothing is asked for.

    A segment sees nothing from before it, so that it shows what the code does by itself. The last segment of an
    episode is left out, for it is not finished.
    """
    grid: GridConfig = steered.base.config.grid
    if source == "demonstrations":
        contents, positions, switch, code = _demonstrated(steered, grid, episodes, seed)
    else:
        generator = Stream.STRATEGIES.torch(seed)
        environment = FreePlay(grid, sample_layouts(grid, episodes, Stream.STRATEGIES.numpy(seed)))
        propose = prior(steered.metacontroller.config.n_z, generator)
        if source == "policy":
            assert steered.policy is not None
            propose = PolicyActor(steered.policy, episodes, generator)
        result = rollout(steered, environment, propose, forget=True)
        contents, positions = environment.layouts.contents, environment.positions
        switch, code = result.switch.numpy(), result.code.numpy()
    codes, deeds = [], []
    for entered, opened, held in zip(entered_colors(grid, contents, positions), switch, code, strict=True):
        for begin, end in pairwise(np.flatnonzero(opened)):
            colors = [str(color) for color in entered[begin + 1 : end + 1] if color >= 0]
            codes.append(held[begin].astype(np.float64))
            deeds.append(f"enters {', '.join(colors)}" if colors else "enters no colour")
    return Sample(np.array(codes), deeds)


@torch.no_grad()
def _demonstrated(steered: SteeredModel, grid: GridConfig, episodes: int, seed: int) -> tuple[NDArray[Any], ...]:
    shown = demonstrate(grid, episodes, pretraining_tasks(grid), Stream.STRATEGIES.numpy(seed))
    switch = np.zeros(shown.mask.shape, bool)
    code = np.zeros((*shown.mask.shape, steered.metacontroller.config.n_z), np.float32)
    first = 0
    for part in split(to_batch(grid, shown), 128):
        demonstrated, rows = Episodes.of(steered, part), slice(first, first + len(part))
        segments, _ = steered.metacontroller.parse(demonstrated.residual, demonstrated.slow, part.mask)
        switch[rows, : part.mask.shape[1]] = (segments.switch > 0.5) & part.mask
        code[rows, : part.mask.shape[1]] = segments.code
        first += len(part)
    return shown.layouts.contents, shown.positions, switch, code


def fit(sample: Sample, seed: int, most: int, coverage: float, count: int | None = None) -> Fit:
    """k-means; the number of strategies is the largest up to `most` whose silhouette is nearly the best.

    Args:
        coverage: quantile of the distances from a centroid that is its radius.
        count: this many strategies instead.
    """
    codes = sample.codes
    distinct = len(np.unique(codes, axis=0)) if len(codes) else 0
    if distinct < 3 or distinct <= (count or 2):
        raise InternalRLError(
            f"Only {distinct} different codes were used, too few to tell {count or 2} strategies apart; give more "
            "samples, or a source whose codes vary."
        )
    tried = {}
    for k in [count] if count else range(2, min(most, distinct - 1) + 1):
        labels = KMeans(k, n_init=10, random_state=seed).fit_predict(codes)
        tried[k] = float(silhouette_score(codes, labels, sample_size=min(2000, len(codes)), random_state=seed)), labels
    best = max(score for score, _ in tried.values())
    score, labels = tried[max(k for k, (score, _) in tried.items() if score >= best - (1 - TOLERANCE) * abs(best))]
    return Fit(_strategies(sample, labels, coverage), score)


def _strategies(sample: Sample, labels: NDArray[np.integer], coverage: float) -> tuple[Strategy, ...]:
    """The clusters as strategies, the largest first."""
    found = []
    for number, (label, size) in enumerate(Counter(labels.tolist()).most_common(), 1):
        rows = np.flatnonzero(labels == label)
        centroid = sample.codes[rows].mean(0)
        distance = np.linalg.norm(sample.codes[rows] - centroid, axis=1)
        typical = [sample.deeds[row] for row in rows[distance.argsort(kind="stable")[:TYPICAL]]]
        deeds = [deed for deed, _ in Counter(deed for deed in typical if deed.strip()).most_common(SHOWN)]
        found.append(
            Strategy(
                number=number,
                name=f"strategy-{number}",
                centroid=tuple(centroid.tolist()),
                radius=max(float(np.quantile(distance, coverage)), 1e-3),
                share=size / len(labels),
                examples=tuple(deed if len(deed) <= LENGTH else deed[: LENGTH - 1] + "…" for deed in deeds),
            )
        )
    return tuple(found)


def _beginning(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise InternalRLError("The tokenizer has no token for the beginning of a text; give prompts.")
    return torch.tensor([[token]])
