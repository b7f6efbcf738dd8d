"""Cost of one discovery step against the frozen base's own forward and backward pass, on one thread.

    python benchmarks/discovery_step.py [--repeats R] [--output FILE]

Each repeat draws one batch of demonstrations and times on it, one after the other: the base's forward and backward
pass from its observations; one optimiser step of discovery with random switches; one with the counterfactual gradient
of the switch; reading a cached batch, that is residuals and slow features; and cutting it into segments. Ratios are
taken within a repeat. `whole_run` weighs the parts as a run with the default settings does: every cached batch is
read at the start, and again, whole and then cropped, when crops move to the learned switches. Weights are untrained:
they do not change what is computed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch are imported
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import numpy as np
import torch
from spread import spread

from internalrl.base.batches import Batch, demonstration_batches
from internalrl.base.pretrain import build
from internalrl.controller.steered import SteeredModel
from internalrl.discovery.objective import Episodes, action_nll, discovery_loss
from internalrl.discovery.train import coefficients_at, make_optimizer
from internalrl.run.folder import environment
from internalrl.run.loop import optimise
from internalrl.settings.stages import DiscoverConfig, PretrainConfig

WARM_UP = 2
"""Untimed repeats."""


def base_pass(steered: SteeredModel, batch: Batch) -> None:
    """Forward and backward of the frozen base; gradients reach its embeddings, and no weight."""
    embeddings, _ = steered.base.encoder(batch.observations)
    logits = steered.base(inputs_embeds=embeddings.requires_grad_()).logits
    action_nll(logits, batch.actions, batch.mask).backward()


@torch.no_grad()
def parse(steered: SteeredModel, episodes: Episodes) -> None:
    """What finding the learned switches costs beyond reading."""
    steered.metacontroller.parse(episodes.residual, episodes.slow, episodes.mask)


def parts(
    steered: SteeredModel, optimizer: torch.optim.Optimizer, config: DiscoverConfig, batch: Batch
) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    episodes = Episodes.of(steered, batch)

    def discovery_step(random_switch: float | None) -> None:
        loss, _ = discovery_loss(
            steered, episodes, coefficients_at(0, config), config.switch, random_switch=random_switch
        )
        optimise(loss, optimizer)

    return {
        "base_forward_backward": lambda: base_pass(steered, batch),
        "random_switch": lambda: discovery_step(config.random_switch),
        "counterfactual": lambda: discovery_step(None),
        "read": lambda: Episodes.of(steered, batch),
        "parse": lambda: parse(steered, episodes),
    }


def seconds_of(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=30, help="timed repeats, each on its own batch")
    results = Path(__file__).parent / "results" / "discovery_step.json"
    parser.add_argument("--output", type=Path, default=results, help="where the JSON goes")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    pretraining, config = PretrainConfig(), DiscoverConfig()
    steered = SteeredModel.from_base(build(pretraining.base, pretraining.grid), config.metacontroller)
    optimizer = make_optimizer(steered.metacontroller, config)
    stream = demonstration_batches(pretraining.grid, config.batch_size, seed=1, crop=config.crop)
    measured: dict[str, list[float]] = {}
    lengths = []
    for repeat in range(WARM_UP + args.repeats):
        batch = next(stream)
        for name, call in parts(steered, optimizer, config, batch).items():
            duration = seconds_of(call)
            if repeat >= WARM_UP:
                measured.setdefault(name, []).append(duration)
        if repeat >= WARM_UP:
            lengths.append(batch.mask.shape[1])

    seconds = {name: np.array(values) for name, values in measured.items()}
    steps = {"random_switch": config.form_steps + config.squeeze_steps, "counterfactual": config.switch_steps}
    schedule = {**steps, "read": 3 * config.batches, "parse": config.batches}
    whole = sum(count * seconds[name] for name, count in schedule.items())
    base = seconds["base_forward_backward"]
    ratio = {name: spread(seconds[name] / base) for name in steps}
    result = {
        "command": " ".join(["python", *sys.argv]),
        "cores_used": 1,
        "repeats": args.repeats,
        "seed": 1,
        "batch_size": config.batch_size,
        "padded_steps": spread(np.array(lengths)),
        "schedule": schedule,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio": {**ratio, "whole_run": spread(whole / sum(steps.values()) / base)},
        **environment(),
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"seconds": result["seconds"], "ratio": result["ratio"]}, indent=2))


if __name__ == "__main__":
    main()
