"""Stage 1: next-action and next-observation prediction on demonstrations (paper, C.1).

L = −log p(a_t | o_1:t) − λ log p(o_{t+1} | o_1:t). No rewards, goals or task labels are in the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from internalrl.base.batches import Batch, demonstration_batches, split, to_batch
from internalrl.base.residual import find_blocks
from internalrl.base.trajectory import TrajectoryConfig, TrajectoryModel, llama_backbone, save_trajectory_model
from internalrl.domains.grid.bayes import bayes_filter
from internalrl.domains.grid.world import GridConfig, demonstrate, pretraining_tasks
from internalrl.run.folder import RunFolder
from internalrl.run.loop import Loop, optimise
from internalrl.run.streams import Stream
from internalrl.settings.stages import BaseConfig, BaseTrainingConfig, PretrainConfig

WARMUP_STEPS = 20
LOG_EVERY = 10

B = TypeVar("B")
"""A batch."""


def main(config: PretrainConfig, run: RunFolder) -> dict[str, Any]:
    """Train a base model, save it to `run`/base and measure it against the exact Bayes filter."""
    torch.manual_seed(run.seed)
    model = build(config.base, config.grid)
    loop = pretrain(model, config, run)
    save_trajectory_model(model, run.path / "base")
    return {**evaluate(model, config.grid, seed=run.seed), "seconds": loop.seconds}


def check(config: PretrainConfig) -> None:
    """ValueError where the grid has no pretraining tasks or hardly any solvable layout."""
    demonstrate(config.grid, 1, pretraining_tasks(config.grid), Stream.PRETRAIN.numpy(0))


def build(config: BaseConfig, grid: GridConfig) -> TrajectoryModel:
    """A new base model for `grid`."""
    return TrajectoryModel(
        TrajectoryConfig(
            encoder=config.encoder,
            environment=asdict(grid),
            backbone=llama_backbone(config.layers, config.width, config.heads, config.mlp),
            relative_buckets=config.relative_buckets,
            relative_distance=config.relative_distance,
        )
    )


def pretrain(model: TrajectoryModel, config: PretrainConfig, run: RunFolder) -> Loop:
    """Train on demonstrations; returns the finished loop, for its times."""

    def batches(step: int) -> Iterator[Batch]:
        return demonstration_batches(config.grid, config.batch_size, run.seed, step, config.crop, config.noise)

    def loss(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        action_nll, observation_nll = losses(model, batch)
        total = action_nll + config.observation_coef * observation_nll
        return total, {"nll": action_nll.item(), "observation_nll": observation_nll.item()}

    return train_base(model, config, run, batches, loss)


def train_base(
    model: PreTrainedModel,
    config: BaseTrainingConfig,
    run: RunFolder,
    batches: Callable[[int], Iterator[B]],
    loss: Callable[[B], tuple[Tensor, dict[str, float]]],
) -> Loop:
    """The training loop of every base model; returns it finished, for its times.

    Args:
        batches: the endless batches from a step on.
        loss: of a batch, and what is logged of it.
    """
    optimizers = make_optimizers(model, config)
    loop = Loop(run, "pretrain", config.steps, {"base": model}, optimizers)
    following = None
    model.train()
    for step in loop:
        following = following or batches(step)
        value, metrics = loss(next(following))
        set_rate(optimizers, rate_at(step, config))
        optimise(value, *optimizers.values())
        if step % LOG_EVERY == 0 or step == config.steps - 1:
            loop.log(**metrics)
    model.eval()
    return loop


def losses(model: TrajectoryModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean next-action and next-observation losses in nats per step."""
    output = model(batch.observations)
    follows = batch.mask[:, 1:]
    target = model.encoder.target(batch.observations)[:, 1:]
    return (
        F.cross_entropy(output.logits[batch.mask], batch.actions[batch.mask]),
        F.cross_entropy(output.next_observation_logits[:, :-1][follows], target[follows]),
    )


def make_optimizers(model: PreTrainedModel, config: BaseTrainingConfig) -> dict[str, torch.optim.Optimizer]:
    """Muon for the backbone's matrices and AdamW for the rest, or AdamW for all."""
    matrices = [p for p in find_blocks(model).parameters() if p.ndim == 2] if config.optimizer == "muon" else []
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(rest, lr=config.lr, weight_decay=config.weight_decay)
    }
    if matrices:
        optimizers["muon"] = torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
    return optimizers


def set_rate(optimizers: dict[str, torch.optim.Optimizer], factor: float) -> None:
    """Set every learning rate to `factor` times the one the optimiser was made with."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = factor * optimizer.defaults["lr"]


def rate_at(step: int, config: BaseTrainingConfig) -> float:
    """Learning-rate factor: a short linear warm-up, then constant, then linear to zero over the last `decay`."""
    left = (config.steps - step) / (config.steps * config.decay) if config.decay else 1.0
    return min(1.0, (step + 1) / WARMUP_STEPS, left)


@torch.no_grad()
def evaluate(model: TrajectoryModel, grid: GridConfig, episodes: int = 2048, seed: int = 0) -> dict[str, float]:
    """Action NLL on fresh demonstrations beside the exact Bayes-optimal one, in nats per action."""
    tasks = pretraining_tasks(grid)
    demonstrations = demonstrate(grid, episodes, tasks, Stream.HELD_OUT.numpy(seed))
    batch = to_batch(grid, demonstrations)
    nll = float(np.mean([losses(model, part)[0].item() for part in split(batch, 256)]))
    bayes = float(bayes_filter(grid, demonstrations, tasks).nll[demonstrations.mask].mean())
    return {"nll": nll, "bayes_nll": bayes, "bayes_gap_nats": nll - bayes}
