"""Stage 2: discovery on the frozen base, then consolidation (paper, C.4; consolidation is ours)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from internalrl.base.batches import Batch, demonstration_batches
from internalrl.base.trajectory import TrajectoryModel
from internalrl.discovery.consolidate import consolidate
from internalrl.discovery.evaluate import alignment, pass_rates
from internalrl.discovery.objective import discovery_loss
from internalrl.loop import Loop, optimise
from internalrl.metacontroller.steered import SteeredModel
from internalrl.runlog import RunFolder
from internalrl.stages import DiscoverConfig

LOG_EVERY = 10
EVALUATE_EVERY = 100


def discover(steered: SteeredModel, config: DiscoverConfig, run: RunFolder) -> Loop:
    """Train the metacontroller on demonstrations; the base stays frozen.

    Three phases: random switches, so that codes form and persist; the switch is learned while α rises; both are
    refined at the final α.
    """
    meta, grid = steered.metacontroller, config.grid
    optimizer = torch.optim.AdamW(meta.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    stream = demonstration_batches(grid, config.batch_size, run.seed + 1, crop=config.crop)
    corpus = [(batch, steered.residual(batch.observations)) for batch, _ in zip(stream, range(config.batches))]
    held_out = next(demonstration_batches(grid, 512, run.seed + 2))
    choice = torch.Generator().manual_seed(run.seed)
    loop = Loop(run, "discover", config.steps, {"metacontroller": meta}, {"adamw": optimizer}, {"choice": choice})
    for step in loop:
        batch, residual = corpus[int(torch.randint(len(corpus), (1,), generator=choice))]
        if step == config.warmup_steps:
            meta.reset_switch()
        risen = min(max(step - config.warmup_steps, 0) / max(config.kl_anneal_steps, 1), 1.0)
        loss, metrics, _ = discovery_loss(
            steered,
            residual,
            batch.actions,
            batch.mask,
            kl_coef=config.kl_coef_start * (config.kl_coef / config.kl_coef_start) ** risen,
            switch_cost=config.switch_cost,
            mode=config.switch,
            temperature=1 + (config.temperature_end - 1) * risen,
            kl=config.kl,
            random_switch=config.warmup_switch if step < config.warmup_steps else None,
        )
        optimise(loss, optimizer)
        last = step == config.steps - 1
        if step % LOG_EVERY == 0 or last:
            if step % EVALUATE_EVERY == 0 or last:
                metrics |= alignment(steered, held_out) | pass_rates(steered, grid, 64, run.seed)
            loop.log(**metrics)
    return loop
