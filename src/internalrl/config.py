"""Options that all subcommands share, and the presets; what a stage itself can be told is in `stages`.

Values come from, each over the one before: the dataclasses' defaults (when resuming: the stored run),
`--preset`, a YAML file (`--config`), the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {"paper": {}}
"""Preset name -> subcommand -> option values, nested as in a YAML file."""


@dataclass(frozen=True)
class CommonOptions:
    """Options of every subcommand."""

    seed: int = 0
    """Seed of all randomness."""
    threads: int | None = None
    """CPU threads; by default all cores. Resumed runs are bit-equal only with the same number."""
    json: bool = False
    """Print the results as one JSON object on stdout."""
    config: Path | None = None
    """YAML file of options, nested as their names are; options on the command line win."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; give a whole number from 0 up.")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads is {self.threads}; give 1 or more.")


@dataclass(frozen=True)
class RunOptions(CommonOptions):
    """Options of a subcommand that makes a run folder."""

    run: Path = Path("runs/run")
    """Folder for config, metrics and checkpoints."""
    preset: str | None = None
    """Named set of options to start from: `paper` holds the paper's sizes and optimiser."""
    resume: bool = False
    """Continue the run in the folder from its last checkpoint, with its stored options."""
    overwrite: bool = False
    """Replace the run in the folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other; give one of them.")


@dataclass(frozen=True)
class ReadOptions(CommonOptions):
    """Options of a subcommand that reads a run folder made before."""

    run: Positional[Path] = Path("runs/demo")
    """Folder of the run."""
