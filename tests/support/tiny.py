"""Tiny models and episodes that the tests share.

Weights are drawn wide: a fresh model has blocks that do nothing, a controller that hardly steers and a switch
that never fires, and would pass tests that it should fail.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from internalrl.base.encoders import GAIN, PlanningEncoder
from internalrl.base.trajectory import TrajectoryConfig, TrajectoryModel, llama_backbone
from internalrl.controller.metacontroller import Metacontroller
from internalrl.controller.steered import Decoding, SteeredModel, Step
from internalrl.discovery.objective import Coefficients, Episodes, discovery_loss
from internalrl.domains.grid.world import GridBatch, GridConfig, Layouts, observe, sample_layouts
from internalrl.settings.stages import MetacontrollerConfig

GRID = GridConfig(size=4, colors=4, walls=1, horizon=14)
WIDTH, N_Z = 16, 3
BATCH, STEPS = 4, 9
RELAXED_MODES = ("soft", "gumbel", "straight-through")
LEARNING_MODES = (*RELAXED_MODES, "counterfactual")
SIZES = MetacontrollerConfig(
    layer=1, n_z=N_Z, n_h=5, slow_features=2, horizon=3, n_s=8, encoder_hidden=6, switch_hidden=7,
    controller_hidden=4, rank=2,
)  # fmt: skip


def widen(module: nn.Module, std: float, seed: int) -> None:
    """Draw every parameter of `module`, and a metacontroller's slow features, from N(0, std²)."""
    generator = torch.Generator().manual_seed(seed)
    found = [part.buffers() for part in module.modules() if isinstance(part, Metacontroller)]
    with torch.no_grad():
        for tensor in [*module.parameters(), *(buffer for buffers in found for buffer in buffers)]:
            tensor.copy_(std * torch.randn(tensor.shape, generator=generator))


def tiny_base(encoder: str = "planner", seed: int = 0, **options: Any) -> TrajectoryModel:
    """Two blocks of width 16 on the 4 × 4 grid."""
    config = TrajectoryConfig(
        encoder=encoder,
        environment=asdict(GRID),
        encoder_options={"hidden": 8},
        backbone=llama_backbone(layers=2, width=WIDTH, heads=2, mlp=12),
        **options,
    )
    base = TrajectoryModel(config)
    widen(base, 0.4, seed)
    if isinstance(base.encoder, PlanningEncoder):  # costs as wide as the rest, not GAIN times as wide
        with torch.no_grad():
            base.encoder.log_cost /= GAIN
            base.encoder.log_sharpness /= GAIN
    return base.eval()


def tiny_metacontroller(width: int = WIDTH, config: MetacontrollerConfig = SIZES, seed: int = 1) -> Metacontroller:
    """A metacontroller that steers visibly and whose switch depends on what it reads and on the code."""
    meta = Metacontroller(config, width)
    widen(meta, 0.4, seed)
    return meta


def tiny_steered(encoder: str = "planner", seed: int = 0) -> SteeredModel:
    """A steered model whose switch fires at about every other step."""
    steered = SteeredModel(tiny_base(encoder, seed), SIZES)
    meta = steered.metacontroller
    widen(meta, 0.4, seed + 1)
    with torch.no_grad():
        x = meta.read(steered.residual(walks(16, 8, seed)))
        logit = meta.segment(x, meta.summarise(x), codes(16, 8, seed), "soft").logit
        meta.switch_head.bias -= logit.median()
    return steered


class Readout:
    """Stands in for a steered model: a linear layer `weight` (n_e, A) reads actions from the steered residual."""

    def __init__(self, meta: Metacontroller, weight: Tensor):
        self.metacontroller, self.weight = meta, weight

    def __call__(self, residual: Tensor, code: Tensor, where: Tensor | None = None) -> Tensor:
        return self.metacontroller.control(residual, code) @ self.weight


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


def close(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def decode(
    steered: SteeredModel, observations: Tensor, proposals: Tensor, forget: bool = False
) -> tuple[Step, Decoding]:
    """Decode step by step, adopting `proposals` (B, T, n_z) where the switch fires; fields are (B, T, …)."""
    decoding, steps = steered.start(len(observations), forget), []
    for t in range(observations.shape[1]):
        steps.append(steered.step(observations[:, t], decoding, lambda rows, _, t=t: proposals[rows, t]))
    fields = ("logits", "switch", "switch_logit", "code")
    return Step(*(torch.stack([getattr(step, name) for step in steps], 1) for name in fields)), decoding


def discovery(
    steered: SteeredModel, observations: Tensor, mode: str = "soft", mask: Tensor | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """The discovery loss of `observations`, with made-up actions, and what it says for the log."""
    mask = torch.ones(observations.shape[:2], dtype=torch.bool) if mask is None else mask
    actions = torch.arange(mask.numel()).reshape(mask.shape) % 4
    residual = steered.residual(observations)
    slow = steered.metacontroller.slow_features(steered.inferred(observations, residual))
    episodes = Episodes(residual, slow, actions, mask)
    return discovery_loss(steered, episodes, Coefficients(kl_coef=0.3, switch_cost=0.1), mode)
