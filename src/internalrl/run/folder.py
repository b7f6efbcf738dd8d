"""Run folders: config.json, metrics.jsonl and checkpoints/, so that a kill at any moment harms nothing.

A run is one command. Its folder says everything needed to repeat it; `metrics.jsonl` holds one line per
logged step and stage, and a resumed run first rewinds it to its checkpoint, so that the curve is that of an
uninterrupted run. Importing this module loads no torch, so that the command line can read a run at once.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internalrl.errors import InternalRLError
from internalrl.run.files import PARTIAL, jsonable, write_atomic, write_errors
from internalrl.run.lock import LOCK_FILE, Lock, hold
from internalrl.run.metrics import Lines, Sink, TrackerName, find_tracker, read_metrics, require_finite

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RunFolder:
    """One run's folder; make one with `create`, or `open` a finished one."""

    path: Path
    """The folder: config.json, metrics.jsonl, checkpoints/ and what the stage adds."""
    seed: int = 0
    """The run's seed; all of a stage's randomness derives from it."""
    resumed: bool = False
    """True when the run continues from its checkpoints."""
    silent: bool = False
    """True in all but the first of several processes: nothing is written or shown."""
    tracker: Sink | None = None
    """Who gets the metrics beside metrics.jsonl."""
    lock: Lock | None = None
    """Keeps other processes from writing to the folder; None of a run that is only read."""

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        seed: int,
        resume: bool = False,
        overwrite: bool = False,
        track: TrackerName | None = None,
    ) -> RunFolder:
        """Make the folder with its config.json, or continue in it; `config` is the full config, JSON-able.

        A folder that is not empty is refused unless `resume` (config and seed must then be the stored ones)
        or `overwrite` (it must then be a run folder, and is emptied). `track` names who gets the metrics as well.
        InternalRLError says what failed.
        """
        tracker = find_tracker(track)
        path = Path(path)
        _require_free(path, resume, overwrite)
        with write_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        lock = hold(path)
        _require_free(path, resume, overwrite)  # another process may have begun and ended a run in the meantime
        run = cls(path, seed, resumed=resume, lock=lock)
        if resume:
            _require_same(path, {**config, "seed": seed})
            run._make_folders()
            Lines(path).mend()
            for leftover in path.rglob(f"{PARTIAL}*"):
                leftover.unlink()
        else:
            _empty(path)
            # The config comes first: a folder that holds anything else, but no config, is taken for someone else's.
            run.write_json("config.json", {"config": config, "seed": seed, **environment()})
            run._make_folders()
        return replace(run, tracker=tracker(path, config))

    @classmethod
    def open(cls, path: str | Path, seed: int = 0) -> RunFolder:
        """A run made before, to be read; refuses a folder that is none."""
        read_run(path)
        return cls(Path(path), seed)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def _make_folders(self) -> None:
        with write_errors(self.checkpoints):
            self.checkpoints.mkdir(exist_ok=True)

    def log(self, stage: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl: stage, step and values (numbers, tensors, arrays, lists, None).

        Raises InternalRLError naming the first number that is not finite. Times differ between a resumed and
        an uninterrupted run: keep them out, or log them as `seconds`.
        """
        require_finite(stage, step, values)
        for sink in self._sinks:
            sink.log(stage, step, values)

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """All logged lines in order, or those of one stage."""
        return [line for line in read_metrics(self.path) if stage in (None, line["stage"])]

    def rewind(self, stage: str, step: int) -> None:
        """Drop this stage's metrics after `step`, the last that the loaded checkpoint includes (-1: all)."""
        for sink in self._sinks:
            sink.rewind(stage, step)

    @property
    def _sinks(self) -> list[Sink]:
        return [] if self.silent else [Lines(self.path), *filter(None, [self.tracker])]

    def save_checkpoint(self, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write checkpoints/<name>.safetensors whole or not at all; see `checkpoint.save_checkpoint`."""
        from internalrl.run.checkpoint import save_checkpoint

        if not self.silent:
            save_checkpoint(self.checkpoints / f"{name}.safetensors", tensors, state)

    def load_checkpoint(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read checkpoints/<name>.safetensors; see `checkpoint.load_checkpoint`."""
        from internalrl.run.checkpoint import load_checkpoint

        return load_checkpoint(self.checkpoints / f"{name}.safetensors")

    def has_checkpoint(self, name: str) -> bool:
        """Whether checkpoints/<name>.safetensors exists."""
        return (self.checkpoints / f"{name}.safetensors").is_file()

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file (config.json, summary.json) into the folder, whole or not at all."""
        if not self.silent:
            write_atomic(self.path / name, (json.dumps(jsonable(content), indent=2) + "\n").encode())


def _require_free(path: Path, resume: bool, overwrite: bool) -> None:
    """InternalRLError unless a run may begin, or go on, in the folder."""
    if path.exists() and not path.is_dir():
        raise InternalRLError(f"Run folder {path} is a file; choose another --run.")
    in_use = path.is_dir() and any(not entry.name.startswith((PARTIAL, LOCK_FILE)) for entry in path.iterdir())
    if resume and not in_use:
        raise InternalRLError(f"There is no run to resume in {path}; start it without --resume.")
    if in_use and not (resume or overwrite):
        raise InternalRLError(
            f"Run folder {path} is not empty; add --resume to continue it, --overwrite to replace it, "
            "or choose another --run."
        )
    if in_use and overwrite:
        read_run(path)  # refuses to empty a folder that is no run


def _empty(path: Path) -> None:
    """Delete all that is in a folder, but for the lock that is held on it."""
    for entry in path.iterdir():
        with write_errors(entry):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK_FILE:
                entry.unlink()


def _require_same(path: Path, wanted: Mapping[str, Any]) -> None:
    stored = read_run(path)
    found = {**stored["config"], "seed": stored["seed"]}
    wanted = jsonable(wanted)
    changed = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if changed:
        raise InternalRLError(
            f"Run {path} was started with other values of {', '.join(changed)}; resume it with the values "
            "in its config.json, or start a new --run."
        )


def read_run(path: str | Path) -> dict[str, Any]:
    """The content of a run's config.json: `config`, `seed`, `versions`, ...; refuses a folder without one."""
    file = Path(path) / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InternalRLError(f"{path} is not a run folder: {file} is missing or unreadable.") from error
    if not (isinstance(content, dict) and {"config", "seed", "versions"} <= content.keys()):
        raise InternalRLError(f"{path} is not a run folder: {file} was not written by internalrl.")
    return content


def environment() -> dict[str, Any]:
    """Versions, hardware, threads and git commit, to be stored with results."""
    versions = {"python": platform.python_version()}
    for package in ("internalrl", "torch", "transformers", "numpy", "gymnasium"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    return {
        "versions": versions,
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "gpu": gpu,
            "platform": platform.platform(),
        },
        "threads": torch.get_num_threads() if torch else None,
        "git": _git_commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the checkout this package runs from, with -dirty; None when there is no checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "folder.py"], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
