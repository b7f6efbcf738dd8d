"""A batch of episodes played in parts, one for each thread.

Threads inside the small operations of a rollout gain little, and wait for each other at every one of them. Parts of a
batch that are played side by side do not wait.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

import numpy as np
import torch

from internalrl.controller.steered import SteeredModel
from internalrl.players.stepwise import BatchEnvironment, RowChance

LEAST = 64
"""Episodes that are worth a thread of their own."""

Played = TypeVar("Played")
Play = Callable[[SteeredModel, BatchEnvironment, torch.Generator | RowChance], Played]


def side_by_side(
    play: Play[Played], steered: SteeredModel, environment: BatchEnvironment, generator: torch.Generator | RowChance
) -> list[Played]:
    """What `play` returns for each part of `environment`, in order: as many as torch has threads.

    Every part has its own copy of the model, whose hooks know one rollout at a time, though not of its weights. It also
    has its own random numbers: for the same number of threads the result is the same, and for any number where each row
    has its own.
    """
    threads = torch.get_num_threads()
    parts = min(threads, len(environment) // LEAST)
    if parts < 2:
        return [play(steered, environment, generator)]
    rows = np.array_split(np.arange(len(environment)), parts)
    environments = [environment.select(own) for own in rows]
    chances: list[torch.Generator | RowChance]
    if isinstance(generator, RowChance):
        chances = [generator.select(own) for own in rows]
    else:
        seeds = torch.randint(2**62, (parts,), generator=generator).tolist()
        chances = [torch.Generator().manual_seed(seed) for seed in seeds]
    weights = list(chain(steered.parameters(), steered.buffers()))
    models = [steered, *(copy.deepcopy(steered, {id(tensor): tensor for tensor in weights}) for _ in range(parts - 1))]
    try:
        with ThreadPoolExecutor(parts, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(play, models, environments, chances))
    finally:
        torch.set_num_threads(threads)
