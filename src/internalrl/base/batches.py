"""Demonstrations as batches of tensors: padded on the right, bucketed by length, the same for every resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from internalrl.domains.grid.world import Demonstrations, GridConfig, demonstrate, observe, pretraining_tasks
from internalrl.run.streams import Stream

BUCKET = 8  # batches that are drawn together and sorted by length, so that padding is short


@dataclass
class Batch:
    """One batch of demonstrations.

    `observations` (B, T, observation_size) uint8, `actions` (B, T) int64, `mask` (B, T) True at real steps.
    `subgoal` (B, T) int64 and `boundary` (B, T) bool are the hidden truth, for evaluation only.
    """

    observations: Tensor
    actions: Tensor
    mask: Tensor
    subgoal: Tensor
    boundary: Tensor

    def __len__(self) -> int:
        return len(self.actions)


def to_batch(config: GridConfig, demonstrations: Demonstrations, starts: np.ndarray | None = None) -> Batch:
    """Tensors of `demonstrations`, each episode cut to begin at step `starts` (N,) (default 0)."""
    starts = np.zeros(len(demonstrations), np.int64) if starts is None else starts
    lengths = demonstrations.lengths - starts
    steps = np.arange(lengths.max())
    index = np.minimum(starts[:, None] + steps, demonstrations.lengths[:, None] - 1)

    def cut(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, index, 1)

    mask = steps < lengths[:, None]
    subgoal = cut(demonstrations.subgoal).astype(np.int64)
    boundary = cut(demonstrations.boundaries) & mask & (steps > 0)
    observations = observe(config, demonstrations.layouts.contents, cut(demonstrations.positions))
    actions = cut(demonstrations.actions).astype(np.int64)
    return Batch(*(torch.from_numpy(x) for x in (observations, actions, mask, subgoal, boundary)))


def held_out(config: GridConfig, size: int, seed: int, stream: Stream = Stream.HELD_OUT) -> Batch:
    """`size` whole demonstrations, of all lengths, that no training batch holds."""
    return to_batch(config, demonstrate(config, size, pretraining_tasks(config), stream.numpy(seed)))


def demonstration_batches(
    config: GridConfig,
    size: int,
    seed: int,
    start: int = 0,
    crop: float = 0.0,
    noise: float = 0.0,
    stream: Stream = Stream.PRETRAIN,
    openings: Callable[[Batch], np.ndarray] | None = None,
) -> Iterator[Batch]:
    """Endless fresh demonstrations of the pretraining tasks, `size` episodes a batch.

    Batch k depends on (stream, seed, k) alone.

    Args:
        start: index of the first batch, to resume a run.
        crop: probability that an episode is cut to begin at a random step on a plain cell, where episodes begin:
            what came before is then unknown. Colours are seen, so this uses no label.
        noise: the expert's noise ε.
        openings: says of a batch of whole episodes at which of these steps (B, T) they may begin; an episode without
            one stays whole.
    """
    tasks = pretraining_tasks(config)
    while True:
        rng = stream.numpy(seed, start // BUCKET)
        demonstrations = demonstrate(config, size * BUCKET, tasks, rng, noise)
        starts = _crop_starts(config, demonstrations, crop, rng, size, openings)
        order = np.argsort(demonstrations.lengths - starts, kind="stable").reshape(BUCKET, size)
        for rows in rng.permutation(order)[start % BUCKET :]:
            yield to_batch(config, _rows(demonstrations, rows), starts[rows])
        start += BUCKET - start % BUCKET


def _crop_starts(
    config: GridConfig,
    demonstrations: Demonstrations,
    crop: float,
    rng: np.random.Generator,
    size: int,
    openings: Callable[[Batch], np.ndarray] | None,
) -> np.ndarray:
    content = np.take_along_axis(demonstrations.layouts.contents, demonstrations.positions.astype(np.int64), 1)
    allowed = (content >= config.colors) & demonstrations.mask
    if openings is not None:
        for rows in np.argsort(demonstrations.lengths, kind="stable").reshape(-1, size):  # short with short
            opened = openings(to_batch(config, _rows(demonstrations, rows)))
            allowed[rows] &= np.pad(opened, ((0, 0), (0, allowed.shape[1] - opened.shape[1])))
    chosen = (rng.random(allowed.shape) * allowed).argmax(1)
    return np.where(rng.random(len(chosen)) < crop, chosen, 0)


def _rows(demonstrations: Demonstrations, rows: np.ndarray) -> Demonstrations:
    d = demonstrations
    longest = int(d.lengths[rows].max())
    return Demonstrations(
        d.layouts[rows], d.tasks, d.task[rows], d.positions[rows, :longest], d.actions[rows, :longest],
        d.progress[rows, :longest], d.lengths[rows],
    )  # fmt: skip


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """Parts of at most `size` episodes."""
    fields = vars(batch)
    for begin in range(0, len(batch), size):
        yield Batch(**{name: values[begin : begin + size] for name, values in fields.items()})
