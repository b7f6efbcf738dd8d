"""What a run folder holds, opened for looking at: the models, the grid, the task, any setting by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from internalrl.base.trajectory import TrajectoryModel, load_trajectory_model
from internalrl.controller.steered import SteeredModel
from internalrl.domains.grid.world import GridConfig
from internalrl.errors import InternalRLError
from internalrl.run.folder import RunFolder, read_run
from internalrl.strategies.limits import LIMITS_FILE, Limits, limits_of


@dataclass(frozen=True)
class Models:
    """The base model of a run, its grid, and, once there is an adapter, the steered model on that same base; `limits`
    if its policy was trained within some."""

    base: TrajectoryModel
    grid: GridConfig
    steered: SteeredModel | None
    limits: Limits | None


def open_models(run: RunFolder) -> Models:
    """Load `run`/base and `run`/adapter; InternalRLError where a file is missing or damaged.

    A run without an adapter folder has `steered` None; one that is there must be whole.
    """
    base, adapter = load_trajectory_model(run.path / "base").eval(), run.path / "adapter"
    limits = limits_of(adapter) if (adapter / LIMITS_FILE).exists() else None
    return Models(base, base.config.grid, open_steered(run, base), limits)


def open_steered(run: RunFolder, base: PreTrainedModel) -> SteeredModel | None:
    """`base` with the adapter of `run`; None without an adapter folder."""
    adapter = run.path / "adapter"
    return SteeredModel.from_pretrained(base, adapter).eval() if adapter.exists() else None


def require_codes(run: RunFolder, steered: SteeredModel | None, controller: str) -> SteeredModel:
    """The steered model of `run`, which `controller`, "policy" or "prior", can choose codes for, or InternalRLError."""
    if steered is None or (controller == "policy" and steered.policy is None):
        what = "adapter" if steered is None else "policy"
        raise InternalRLError(
            f"Run {run.path} has no {what} to choose codes with; evaluate it with --controller off, or give a run that "
            "has been through all stages."
        )
    return steered


def run_task(run: RunFolder, grid: GridConfig) -> str:
    """The task that a run was made for; without one, the chain of transitions its demonstrations leave out.

    On the paper's grid that is the paper's post-training task, 0-1-2-3-4-5-6-7-0-1-2-3.
    """
    pairs = grid.colors // 2
    chain = [color for k in range(pairs + 2) for color in (2 * (k % pairs), 2 * (k % pairs) + 1)]
    return find(read_run(run.path)["config"], "task") or "-".join(map(str, chain))


def read_summary(run: RunFolder) -> dict[str, Any]:
    """The run's summary.json; empty while there is none."""
    file = run.path / "summary.json"
    summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return summary


def find(values: Mapping[str, Any], name: str) -> Any:
    """The value of `name` in nested mappings, the outermost one first; None where there is none.

    So a setting is found in the config of a single stage and in that of a whole demo alike.
    """
    if name in values:
        return values[name]
    inner = (find(value, name) for value in values.values() if isinstance(value, Mapping))
    return next((value for value in inner if value is not None), None)
