"""Tiny models and episodes that the tests share.

Weights are drawn wide: a fresh model has blocks that do nothing, a controller that hardly steers and a switch
that never fires, and would pass tests that it should fail.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from internalrl.base.trajectory import TrajectoryConfig, TrajectoryModel, llama_backbone
from internalrl.domains.grid import GridBatch, GridConfig, Layouts, observe, sample_layouts
from internalrl.metacontroller.model import Metacontroller
from internalrl.metacontroller.steered import SteeredModel
from internalrl.stages import MetacontrollerConfig

GRID = GridConfig(size=4, colors=4, walls=1, horizon=14)
WIDTH, N_Z = 16, 3
SIZES = MetacontrollerConfig(
    layer=1, n_z=N_Z, n_h=5, n_s=4, encoder_hidden=6, switch_hidden=7, controller_hidden=4, rank=2
)


def widen(module: nn.Module, std: float, seed: int) -> None:
    """Draw every parameter of `module` from N(0, std²)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def tiny_base(encoder: str = "planner", seed: int = 0, **options: Any) -> TrajectoryModel:
    """Two blocks of width 16 on the 4 × 4 grid."""
    config = TrajectoryConfig(
        encoder=encoder,
        encoder_options={"size": GRID.size, "colors": GRID.colors, "walls": GRID.walls, "hidden": 8},
        backbone=llama_backbone(layers=2, width=WIDTH, heads=2, mlp=12),
        **options,
    )
    base = TrajectoryModel(config)
    widen(base, 0.4, seed)
    return base.eval()


def tiny_metacontroller(
    width: int = WIDTH, config: MetacontrollerConfig = SIZES, seed: int = 1
) -> Metacontroller:
    """A metacontroller that steers visibly and whose switch depends on what it reads and on the code."""
    meta = Metacontroller(config, width)
    widen(meta, 0.4, seed)
    return meta


def tiny_steered(encoder: str = "planner", seed: int = 0) -> SteeredModel:
    steered = SteeredModel(tiny_base(encoder, seed), SIZES)
    widen(steered.metacontroller, 0.4, seed + 1)
    return steered


def layouts(count: int, seed: int = 0) -> Layouts:
    return sample_layouts(GRID, count, np.random.default_rng(seed))


def environment(count: int, seed: int = 0) -> GridBatch:
    """Episodes of different lengths: most end early, on a wrong colour."""
    return GridBatch(GRID, layouts(count, seed), (0, 1, 2, 3))


def walks(count: int, steps: int, seed: int = 0) -> Tensor:
    """(count, steps, observation_size) observations: on each layout the agent appears in cells at random."""
    positions = np.random.default_rng(seed).integers(0, GRID.cells, (count, steps))
    return torch.from_numpy(observe(GRID, layouts(count, seed).contents, positions))


def codes(count: int, steps: int, seed: int = 0) -> Tensor:
    """(count, steps, n_z) from N(0, I)."""
    return torch.randn(count, steps, N_Z, generator=torch.Generator().manual_seed(seed))
