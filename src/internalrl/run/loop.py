"""The resumable training loop shared by all stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from internalrl.errors import InternalRLError
from internalrl.run.checkpoint import Generator, load_optimizer, optimizer_tensors, rng_state, set_rng_state
from internalrl.run.folder import RunFolder
from internalrl.run.metrics import progress

SECONDS_BETWEEN_CHECKPOINTS = 60.0


class Loop:
    """Iterates over the steps a stage has still to do; restores its last checkpoint first, saves as it goes.

    Everything that a step depends on is given here, so that a killed and resumed run goes on bit-equal on a CPU.

    Args:
        run: where metrics and checkpoints go.
        stage: name of the metrics and of the checkpoint.
        total: number of steps.
        modules, optimizers, generators: what the steps change, by name.
    """

    def __init__(
        self,
        run: RunFolder,
        stage: str,
        total: int,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        generators: Mapping[str, Generator] | None = None,
    ):
        self.run, self.stage, self.total = run, stage, total
        self.modules, self.optimizers, self.generators = modules, optimizers, dict(generators or {})
        self.step = 0
        self.seconds = 0.0
        self._shown: dict[str, float] = {}

    def __iter__(self) -> Iterator[int]:
        if self.run.resumed and self.run.has_checkpoint(self.stage):
            self._restore()
        self.run.rewind(self.stage, self.step - 1)
        began = saved = time.monotonic()
        before = self.seconds
        with progress(self.stage, self.total, self.step, self.run.silent) as advance:
            while self.step < self.total:
                yield self.step
                self.step += 1
                now = time.monotonic()
                self.seconds = before + now - began
                advance(**self._shown)
                if now - saved > SECONDS_BETWEEN_CHECKPOINTS:
                    self.save()
                    saved = now
        self.save()

    def log(self, **metrics: Any) -> None:
        """Append this step's metrics to the run; the numbers among them stand beside the progress bar."""
        self.run.log(self.stage, self.step, **metrics)
        self._shown = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}

    def finish(self) -> None:
        """End the loop after this step, because its goal is reached."""
        self.total = self.step + 1

    def save(self) -> None:
        """Write the stage's checkpoint."""
        tensors = {f"{name}/{k}": v for name, module in self.modules.items() for k, v in module.state_dict().items()}
        state: dict[str, Any] = {
            "step": self.step,
            "total": self.total,
            "seconds": self.seconds,
            "optimizers": {},
        }
        for name, optimizer in self.optimizers.items():
            more, state["optimizers"][name] = optimizer_tensors(optimizer, name)
            tensors |= more
        state["rng"] = rng_state(**self.generators)
        self.run.save_checkpoint(self.stage, tensors, state)

    def _restore(self) -> None:
        tensors, state = self.run.load_checkpoint(self.stage)
        for name, module in self.modules.items():
            load_module(
                module,
                {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")},
            )
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, tensors, state["optimizers"][name], name)
        set_rng_state(state["rng"], **self.generators)
        self.step, self.seconds = state["step"], state["seconds"]
        self.total = min(self.total, state["total"])


def load_module(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load `tensors` into `module` whole or not at all; InternalRLError when they do not fit."""
    own = module.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys()) or sorted(k for k in own if own[k].shape != tensors[k].shape)
    if wrong:
        raise InternalRLError(
            f"These weights do not fit {type(module).__name__} ({len(wrong)} tensors differ, the first is {wrong[0]}): "
            "they were made with other sizes; use the settings they were trained with."
        )
    module.load_state_dict(dict(tensors))


def optimise(
    loss: torch.Tensor | Iterable[torch.Tensor],
    *optimizers: torch.optim.Optimizer,
    max_norm: float = 1.0,
    share: Callable[[list[torch.Tensor]], None] | None = None,
) -> None:
    """One gradient step with the global norm clipped; InternalRLError if loss or gradient are not finite.

    The weights are then as they were, so that no checkpoint is spoilt.

    Args:
        loss: or parts of it, each computed when its turn comes, so that one at a time is in memory.
        share: makes the gradients of these parameters those of several processes.
    """
    parts = [loss] if isinstance(loss, torch.Tensor) else loss
    for optimizer in optimizers:
        optimizer.zero_grad()
    for part in parts:
        _require_finite("loss", part)
        part.backward()
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    if share is not None:
        share(parameters)
    _require_finite("norm of the gradient", torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    for optimizer in optimizers:
        optimizer.step()


def _require_finite(name: str, value: torch.Tensor) -> None:
    if not torch.isfinite(value):
        raise InternalRLError(
            f"The {name} is {value.item()}; lower the learning rate or check the data, "
            "then resume from the last checkpoint."
        )
