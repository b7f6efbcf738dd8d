"""What a run tells while it works: lines of metrics.jsonl, the same numbers to a tracker, and how far it is.

A tracker is off by default. It gets numbers only, so whatever it loses or cannot show is in metrics.jsonl still.
"""

from __future__ import annotations

import atexit
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from internalrl.errors import InternalRLError
from internalrl.extras import extra
from internalrl.run.files import jsonable, write_atomic, write_errors

_SECONDS_BETWEEN_LINES = 10.0

TrackerName = Literal["tensorboard", "wandb"]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line torn by a kill is left out."""
    file = Path(path) / "metrics.jsonl"
    texts = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    try:
        return [json.loads(text) for text in texts if text.endswith("\n")]
    except ValueError as error:
        raise InternalRLError(f"{file} holds a line that is not JSON; remove that line, or the run.") from error


def require_finite(stage: str, step: int, values: Mapping[str, Any]) -> None:
    """Raises InternalRLError naming the first number, tensor or array of one that is not finite."""
    for name, value in values.items():
        if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            raise InternalRLError(
                f"{stage} stopped at step {step}: {name} is {value}; "
                "lower the learning rate or check the data, then resume from the last checkpoint."
            )


class Sink(Protocol):
    """What takes the metrics of a run."""

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Take the values of a step: numbers, tensors, arrays, lists, None."""

    def rewind(self, stage: str, step: int) -> None:
        """Forget this stage's values after `step`, which will be computed again."""


class Lines:
    """The file metrics.jsonl of a run's folder."""

    def __init__(self, path: Path):
        self._path, self._file = path, path / "metrics.jsonl"

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        with write_errors(self._file), open(self._file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(jsonable({"stage": stage, "step": step, **values})) + "\n")

    def rewind(self, stage: str, step: int) -> None:
        self._keep(lambda line: line["stage"] != stage or line["step"] <= step)

    def mend(self) -> None:
        """Drop a last line that a kill tore."""
        self._keep(lambda line: True)

    def _keep(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        if self._file.exists():
            lines = [json.dumps(line) + "\n" for line in read_metrics(self._path) if keep(line)]
            write_atomic(self._file, "".join(lines).encode())


class TensorBoard:
    """Writes event files to the run's folder tensorboard/, one folder per stage: each counts its own steps."""

    def __init__(self, module: ModuleType, path: Path, config: Mapping[str, Any]):
        self._open, self._folder = module.SummaryWriter, path / "tensorboard"
        self._writers: dict[str, Any] = {}

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        writer = self._writers.get(stage) or self._writers.setdefault(stage, self._open(str(self._folder / stage)))
        for name, number in _numbers(values).items():
            writer.add_scalar(name, number, step)
        writer.flush()  # so that a kill loses nothing

    def rewind(self, stage: str, step: int) -> None:
        if writer := self._writers.pop(stage, None):
            writer.close()
        if (self._folder / stage).exists():
            self._writers[stage] = self._open(str(self._folder / stage), purge_step=step + 1)


class WeightsAndBiases:
    """Sends to a Weights & Biases run of the project "internalrl", and goes on with that run when resumed.

    It cannot forget: steps that a kill made a run do twice are there twice, at the same place.
    """

    def __init__(self, module: ModuleType, path: Path, config: Mapping[str, Any]):
        file = path / "wandb-id"
        known = file.read_text(encoding="utf-8") if file.exists() else None
        name = path.resolve().name
        try:
            self._run = module.init(
                project="internalrl", name=name, dir=path, config=dict(config), id=known,
                resume="allow" if known else None, reinit="finish_previous",
            )  # fmt: skip
        except module.Error as error:
            raise InternalRLError(
                f"Weights & Biases does not take the run ({error}); call `wandb login`, or leave --track out."
            ) from error
        write_atomic(file, self._run.id.encode())
        atexit.register(self._run.finish)  # what wandb finishes itself is told on stdout, where results belong
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        if stage not in self._stages:  # each stage counts its own steps
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/{name}": number for name, number in {"step": step, **_numbers(values)}.items()})

    def rewind(self, stage: str, step: int) -> None:
        pass


_TRACKERS: Mapping[TrackerName, tuple[str, Callable[[ModuleType, Path, Mapping[str, Any]], Sink]]] = {
    "tensorboard": ("torch.utils.tensorboard", TensorBoard),
    "wandb": ("wandb", WeightsAndBiases),
}


def find_tracker(name: TrackerName | None) -> Callable[[Path, Mapping[str, Any]], Sink | None]:
    """What opens the tracker of this name for a run's folder and config; None opens none.

    Raises InternalRLError where its package is missing.
    """
    if name is None:
        return lambda path, config: None
    module, kind = _TRACKERS[name]
    with extra(name):
        return partial(kind, importlib.import_module(module))


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among `values`; those of a list by their places, such as unseen/0."""
    found: dict[str, float] = {}
    for name, value in jsonable(values).items():
        entries = {f"{name}/{k}": entry for k, entry in enumerate(value)} if isinstance(value, list) else {name: value}
        found |= {key: float(entry) for key, entry in entries.items() if isinstance(entry, (int, float))}
    return found


@contextmanager
def progress(label: str, total: int, done: int = 0, silent: bool = False) -> Iterator[Callable[..., None]]:
    """Show progress on stderr, if not `silent`: a bar with ETA on a terminal, else a line about every ten seconds.

    Yields `advance(steps=1, **shown)`; `shown` numbers, such as loss=0.31, stand beside the bar.
    """
    began, first = time.monotonic(), done

    def text(shown: Mapping[str, float]) -> str:
        return " ".join(f"{name} {value:.4g}" for name, value in shown.items())

    if silent:
        yield lambda steps=1, **shown: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[shown]}"), console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total, completed=done, shown="")
            yield lambda steps=1, **shown: bar.update(task, advance=steps, shown=text(shown))
        return

    last = began

    def advance(steps: int = 1, **shown: float) -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES or done == total:
            last = now
            left = (now - began) / max(done - first, 1) * (total - done)
            print(
                f"{label} {done}/{total}, {left:.0f} s left {text(shown)}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    yield advance
