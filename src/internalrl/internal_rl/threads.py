"""A batch of episodes played in parts, one for each thread.

Threads inside the small operations of a rollout gain little, and wait for each other at every one of them. Parts of a
batch that are played side by side do not wait.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from internalrl.metacontroller.rollout import BatchEnvironment
from internalrl.metacontroller.steered import SteeredModel

LEAST = 64
"""Episodes that are worth a thread of their own."""

Played = TypeVar("Played")
Play = Callable[[SteeredModel, BatchEnvironment, torch.Generator], Played]


def side_by_side(
    play: Play[Played], steered: SteeredModel, environment: BatchEnvironment, generator: torch.Generator
) -> list[Played]:
    """What `play` returns for each part of `environment`, in order: as many as torch has threads.

    Every part has its own copy of the model, whose hooks know one rollout at a time, and its own random numbers: for
    the same number of threads the result is the same.
    """
    threads = torch.get_num_threads()
    parts = min(threads, len(environment) // LEAST)
    if parts < 2:
        return [play(steered, environment, generator)]
    environments = [environment.select(rows) for rows in np.array_split(np.arange(len(environment)), parts)]
    seeds = torch.randint(2**62, (parts,), generator=generator).tolist()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    models = [steered, *(copy.deepcopy(steered) for _ in range(parts - 1))]
    try:
        with ThreadPoolExecutor(parts, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(play, models, environments, generators))
    finally:
        torch.set_num_threads(threads)
