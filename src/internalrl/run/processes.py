"""Several processes that learn together, as `accelerate launch` or `torchrun` starts them; by default there is one.

Each plays its share of every batch. Gradients are summed, so that all make the same update, and the first one alone
writes files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from internalrl.errors import InternalRLError


class Processes:
    """The processes of this run; joining them is up to `join`.

    Attributes:
        rank: the number of this process, from 0; count: how many there are.
    """

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count

    @classmethod
    def join(cls) -> Processes:
        """Those that the launcher has started, over gloo on CPUs and NCCL on GPUs; one where there is no launcher."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(distributed.get_rank(), count)

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """This process's rows of a batch of `total`; InternalRLError where it cannot be divided evenly."""
        if total % self.count:
            raise InternalRLError(f"A batch of {total} cannot be divided among {self.count} processes; change one.")
        size = total // self.count
        return range(self.rank * size, (self.rank + 1) * size)

    def gather(self, values: Sequence[Any]) -> list[Any]:
        """What all processes have, in their order."""
        if self.count == 1:
            return list(values)
        parts: list[Any] = [None] * self.count
        distributed.all_gather_object(parts, list(values))
        return [value for part in parts for value in part]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over the processes."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            distributed.barrier()
