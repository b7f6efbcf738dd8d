"""Linear probes: how much of the hidden subgoal can be read from the residual stream, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from internalrl.domains.grid import Demonstrations, GridConfig, demonstrate, pretraining_tasks
from internalrl.domains.grid_bayes import bayes_filter

FIT_STEPS = 8000
"""Steps that a probe is fitted on, drawn at random from the demonstrations: more change the result little."""


@dataclass(frozen=True)
class Probe:
    """Accuracy on fresh demonstrations by layer, 0 being the embedding, and what to hold it against.

    `bayes` is the accuracy of the exact filter's most probable subgoal, the best that any reader of the
    observations can do; `chance` that of always naming the most frequent subgoal.
    """

    accuracy: dict[int, float]
    bayes: float
    chance: float


def probe(
    model: TrajectoryModel,
    grid: GridConfig,
    layers: Sequence[int] | None = None,
    episodes: int = 512,
    seed: int = 0,
) -> Probe:
    """Fit one multinomial logistic regression per layer on standardised residuals; paper, Fig A1.

    Args:
        layers: numbers of blocks below; None takes the embedding and every block.
        episodes: demonstrations to fit on, and as many fresh ones to test on.
    """
    tasks, chosen = pretraining_tasks(grid), range(len(find_blocks(model)) + 1) if layers is None else layers
    rng = np.random.default_rng([seed, 6])
    fit, test = (demonstrate(grid, episodes, tasks, rng) for _ in range(2))
    residuals, subgoal = _steps(model, grid, fit, chosen)
    fresh, truth = _steps(model, grid, test, chosen)
    rows = rng.permutation(len(subgoal))[:FIT_STEPS]
    accuracy = {}
    for layer in chosen:
        # The penalty matters little; a light one keeps nearly collinear features from slowing the fit.
        reader = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200, tol=1e-3))
        reader.fit(residuals[layer][rows], subgoal[rows])
        accuracy[layer] = float(reader.score(fresh[layer], truth))
    chance = float(np.bincount(truth).max() / len(truth))
    return Probe(accuracy, bayes_filter(grid, test, tasks).subgoal_accuracy, chance)


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
