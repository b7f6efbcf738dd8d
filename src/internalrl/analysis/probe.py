"""Linear probes: how much of the hidden subgoal can be read from the residual stream, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from internalrl.base.batches import split, to_batch
from internalrl.base.residual import find_blocks
from internalrl.base.trajectory import TrajectoryModel
from internalrl.domains.grid.bayes import bayes_filter
from internalrl.domains.grid.world import Demonstrations, GridConfig, demonstrate, pretraining_tasks
from internalrl.run.streams import Stream

FIT_STEPS = 8000
"""Steps that a probe is fitted on, drawn at random from the demonstrations: more change the result little."""


def probe(
    model: TrajectoryModel,
    grid: GridConfig,
    layers: Sequence[int] | None = None,
    episodes: int = 512,
    seed: int = 0,
) -> dict[int, float]:
    """Accuracy on fresh demonstrations by layer: a multinomial logistic regression each, on standardised residuals.

    Args:
        layers: numbers of blocks below, 0 being the embedding; None takes all (paper, Fig A1).
        episodes: demonstrations to fit on, and as many fresh ones to test on.
    """
    chosen = range(len(find_blocks(model)) + 1) if layers is None else layers
    fit, test = _demonstrations(grid, episodes, seed)
    residuals, subgoal = _steps(model, grid, fit, chosen)
    fresh, truth = _steps(model, grid, test, chosen)
    rows = Stream.PROBE.numpy(seed, 1).permutation(len(subgoal))[:FIT_STEPS]
    accuracy = {}
    for layer in chosen:
        # How strong the penalty is matters little; some of it makes the fit fast where features are nearly collinear.
        reader = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200, tol=1e-3))
        reader.fit(residuals[layer][rows], subgoal[rows])
        accuracy[layer] = float(reader.score(fresh[layer], truth))
    return accuracy


def limits(grid: GridConfig, episodes: int = 512, seed: int = 0) -> tuple[float, float]:
    """What to hold `probe` with the same arguments against, as accuracies on the same steps.

    First that of always naming the most frequent subgoal, then that of the exact filter's most probable one: no
    reader of the observations can do better.
    """
    _, test = _demonstrations(grid, episodes, seed)
    counts = np.bincount(test.subgoal[test.mask])
    return float(counts.max() / counts.sum()), bayes_filter(grid, test, pretraining_tasks(grid)).subgoal_accuracy


def _demonstrations(grid: GridConfig, episodes: int, seed: int) -> tuple[Demonstrations, Demonstrations]:
    """Some to fit on, and others to test on."""
    rng, tasks = Stream.PROBE.numpy(seed), pretraining_tasks(grid)
    return demonstrate(grid, episodes, tasks, rng), demonstrate(grid, episodes, tasks, rng)


@torch.no_grad()
def _steps(
    model: TrajectoryModel, grid: GridConfig, demonstrations: Demonstrations, layers: Sequence[int]
) -> tuple[dict[int, NDArray[np.float32]], NDArray[np.int64]]:
    """Residuals (M, n_e) by layer and subgoals (M,) of all real steps."""
    batch = to_batch(grid, demonstrations)
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with _listening(model) as heard:
        for part in split(batch, 128):
            model(part.observations)
            for layer in layers:
                found[layer].append(heard[layer][part.mask])
    return {k: torch.cat(v).numpy() for k, v in found.items()}, batch.subgoal[batch.mask].numpy()


@contextmanager
def _listening(model: TrajectoryModel) -> Iterator[dict[int, Tensor]]:
    """While open, the last forward pass's residual stream (B, T, n_e) before (0) and after every block."""
    heard: dict[int, Tensor] = {}
    blocks = find_blocks(model)

    def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        heard[0] = arguments[0]

    def after(layer: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            heard[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[0].register_forward_pre_hook(before)]
    handles += [block.register_forward_hook(after(k + 1)) for k, block in enumerate(blocks)]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
