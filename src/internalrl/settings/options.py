"""Options that all subcommands share, and the presets; what a stage itself can be told is in `stages`.

Values come from, each over the one before: the dataclasses' defaults (when resuming: the stored run),
`--preset`, a YAML file (`--config`), the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from internalrl.run.metrics import TrackerName
from internalrl.settings.ranges import Checked, Natural, Range

_PAPER: Mapping[str, Mapping[str, Any]] = {
    "pretrain": {
        "base": {"encoder": "one-hot", "layers": 6, "width": 256, "heads": 4, "mlp": 512},
        "steps": 256_000,
        "batch_size": 1024,
        "optimizer": "adamw",
        "lr": 3e-4,
        "weight_decay": 0.03,
        "decay": 0.0,
        "crop": 0.0,
    },
    "discover": {
        "metacontroller": {
            "n_s": 32,
            "encoder_hidden": 64,
            "encoder_gain": 1.0,
            "encoder_log_std": 0.0,
            "switch_bias": 0.0,
        },
        "consolidate": {"enabled": False},
        "form_steps": 0,
        "squeeze_steps": 0,
        "switch_steps": 64_000,
        "batch_size": 512,
        "crop": 0.0,
        "lr": 1e-3,
        "switch_lr": 1e-3,
        "decay": 0.0,
        "switch": "soft",
        "kl": "every-step",
        "kl_coef": 0.17,
        "switch_cost": 0.0,
        "hold_steps": 0,
        "rise_steps": 0,
    },
    "reinforce": {
        "episodes": 1_000_000,
        "lr": 3e-5,
        "initial_std": 1.0,
        "policy_hidden": 256,
        "forget": False,
    },
}
"""The paper's sizes, optimiser and schedules (C.1, C.4, C.5); the backbone's MLP stays gated."""

_TEXT: Mapping[str, Mapping[str, Any]] = {
    "discover": {
        "metacontroller": {"view": "following", "slow_features": 32, "horizon": 24},
        "slow_lag": 0,
        "crop": 0.0,
        "batch_size": 32,
        "batches": 60,
        "form_steps": 300,
        "squeeze_steps": 100,
        "switch_steps": 600,
        "hold_steps": 80,
        "rise_steps": 120,
        "consolidate": {
            "rehearse": {"rounds": 2, "steps": 150, "batch_size": 32, "batches": 60},
            "steps": 0,
        },
    },
    "reinforce": {"lr": 2e-3, "epochs": 8, "clip_coef": 1.0, "initial_std": 1.0, "replay": 64, "temperature": 0.3},
}
"""Texts: codes are proposed by the tokens that follow; few successes among many texts are enlarged; see docs/log.md."""

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {"paper": {**_PAPER, "demo": _PAPER}, "text": _TEXT}
"""Preset name -> subcommand -> option values, nested as in a YAML file."""


@dataclass(frozen=True)
class ToolOptions(Checked):
    """Options of a subcommand without a run folder."""

    json: bool = False
    """Print the results as one JSON object on stdout."""


@dataclass(frozen=True)
class CommonOptions(Checked):
    """Options of every subcommand that makes or reads a run folder."""

    seed: Natural = 0
    """Seed of all randomness."""
    threads: Annotated[int | None, Range(1)] = None
    """CPU threads; by default all cores. Resumed runs are bit-equal only with the same number."""
    json: bool = False
    """Print the results as one JSON object on stdout."""
    config: Path | None = None
    """YAML file of options, nested as their names are; options on the command line win."""


@dataclass(frozen=True)
class RunOptions(CommonOptions):
    """Options of a subcommand that makes a run folder."""

    run: Path = Path("runs/run")
    """Folder for config, metrics and checkpoints."""
    preset: str | None = None
    """Named set of options to start from: `paper` holds the paper's sizes and optimiser, `text` what texts need."""
    resume: bool = False
    """Continue the run in the folder from its last checkpoint, with its stored options."""
    overwrite: bool = False
    """Replace the run in the folder."""
    track: TrackerName | None = None
    """Who gets the metrics as well, to be looked at while the run works."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other; give one of them.")


@dataclass(frozen=True)
class ReadOptions(CommonOptions):
    """Options of a subcommand that reads a run folder made before."""

    run: Positional[Path] = Path("runs/demo")
    """Folder of the run."""
