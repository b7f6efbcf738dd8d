"""Limits: which strategies may be used, what becomes of a code that may not, and what may not be written.

    strategies:                  # by name, from the adapter's library
      delete a file: deny
      open a file: review        # allowed, and put on record
    others: allow                # strategies that are not named
    unknown: review              # codes far from every strategy
    on_denied: project           # or: resample, off
    filters: [mypackage.checks:no_passwords]
    on_outcome: stop             # or: record

A code is denied where the nearest centroid is that of a denied strategy, however far away: the denied region is a union
of Voronoi cells. If `unknown` is denied, so is all that lies beyond the radii.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from internalrl.errors import InternalRLError
from internalrl.run.files import write_atomic
from internalrl.settings.ranges import Checked, Range
from internalrl.settings.schema import from_dict, load_yaml, to_dict
from internalrl.strategies.library import STRATEGIES_FILE, UNKNOWN, Library, load_library

LIMITS_FILE = "limits.yaml"
"""The limits that an adapter was trained with, in its folder."""

Rule = Literal["allow", "deny", "review"]

Filter = Callable[[str], str | None]
"""Reads a text; says what is wrong with it, or None."""

Redraw = Callable[[Tensor], Tensor]
"""New codes (K, n_z) in place of those at the indices (K,) among the codes asked about."""


@dataclass(frozen=True)
class LimitsConfig(Checked):
    """Content of a limits file."""

    strategies: dict[str, Rule] = field(default_factory=dict)
    """Name -> rule."""
    others: Rule = "allow"
    """For strategies that are not named."""
    unknown: Rule = "review"
    """For codes beyond the radius of a strategy that is not denied."""
    on_denied: Literal["project", "resample", "off"] = "project"
    """What becomes of a denied code: the nearest point in the region of a strategy that is not denied; a new draw, or
    the nearest point if `redraws` of them are denied too; or no steering for the segment."""
    redraws: Annotated[int, Range(0, 1000)] = 8
    """Most new draws for a denied code."""
    filters: tuple[str, ...] = ()
    """Functions over text, as package.module:function; each returns None or what is wrong."""
    on_outcome: Literal["stop", "record"] = "stop"
    """What to do with an answer that a filter objects to."""
    library: Path | None = None
    """The strategies, relative to the limits file; by default strategies.json in the adapter's folder."""


@dataclass(frozen=True)
class Decisions:
    """What the limits make of R codes.

    Attributes:
        codes: (R, n_z) to be put in force; those that were not denied are untouched.
        steer: (R,) bool, False where steering is to be off for the segment.
        strategies: name of each code's strategy; None where it is unknown, or steering is off.
        violations: None, or "review NAME", or "denied NAME: " and what was done, "project", "resample" or "off"; the
            name of codes far from every strategy is "unknown".
    """

    codes: Tensor
    steer: Tensor
    strategies: list[str | None]
    violations: list[str | None]


class Limits:
    """Rules over the strategies of one library. One thread at a time may call it.

    Attributes:
        library: of the adapter whose codes are decided on.
        on_outcome: "stop" ends an answer that a filter objects to, "record" only puts it on record.
        counts: violation -> how often.

    Raises:
        InternalRLError: rules name strategies that the library lacks, deny all codes that a denied one could become,
            or a filter cannot be imported.
    """

    def __init__(self, library: Library, config: LimitsConfig):
        self.library, self.config, self.on_outcome = library, config, config.on_outcome
        self.counts: Counter[str] = Counter()
        if missing := [name for name in config.strategies if name not in library.names]:
            raise InternalRLError(
                f"The limits name a strategy {missing[0]!r} that the library lacks; it has {', '.join(library.names)}."
            )
        self._rules = [config.strategies.get(name, config.others) for name in library.names]
        self._open = [k for k, rule in enumerate(self._rules) if rule != "deny"]
        if not self._open and config.on_denied != "off":
            raise InternalRLError(
                f"The limits deny every strategy, and on_denied: {config.on_denied} needs one that is left; allow one, "
                "or write on_denied: off."
            )
        self._filters = {name: _imported(name) for name in config.filters}

    def decide(self, codes: Tensor, redraw: Redraw | None = None) -> Decisions:
        """Say what becomes of the codes (R, n_z) of R segments that begin.

        A row's result depends on its own code and draws alone.

        Args:
            redraw: for `on_denied: resample`. Without it, as where codes were chosen beforehand, denied codes are
                projected.
        """
        found, way = self._judge(codes), self.config.on_denied
        denied = [row for row, (rule, _) in enumerate(found) if rule == "deny"]
        done = dict.fromkeys(denied, way)
        if denied and way != "off":
            codes, projected = self._mended(codes, denied, redraw)
            done |= dict.fromkeys(projected, "project")
        steer = torch.tensor([done.get(row) != "off" for row in range(len(found))], device=codes.device)
        violations = [
            f"denied {name}: {done[row]}" if rule == "deny" else f"review {name}" if rule == "review" else None
            for row, (rule, name) in enumerate(found)
        ]
        self.counts.update(violation for violation in violations if violation is not None)
        names = [name for _, name in (self._judge(codes) if denied else found)]
        strategies = [None if name == UNKNOWN or done.get(row) == "off" else name for row, name in enumerate(names)]
        return Decisions(codes, steer, strategies, violations)

    def allows(self, codes: Tensor) -> Tensor:
        """(R,) bool: which of the codes (R, n_z) are not denied."""
        return torch.tensor([rule != "deny" for rule, _ in self._judge(codes)], device=codes.device)

    def require_codes(self) -> None:
        """InternalRLError if a denied code becomes none at all: only the engine can leave a segment unsteered."""
        if self.config.on_denied == "off":
            raise InternalRLError(
                "The limits switch steering off for denied codes (on_denied: off); serving can do that, but training "
                "cannot: write on_denied: project, or resample."
            )

    def save(self, adapter: Path) -> None:
        """Write library and limits into an adapter's folder, from which `limits_of` reads them again.

        Without filters: they are the server's, and an adapter must not say which functions are called.
        """
        self.library.save(adapter / STRATEGIES_FILE)
        values = {name: value for name, value in to_dict(self.config).items() if name not in ("library", "filters")}
        write_atomic(adapter / LIMITS_FILE, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())

    def objection(self, text: str) -> str | None:
        """What a filter has against the answer so far, "outcome: " and its words; None if nothing.

        A filter that fails objects: what it could not read must not pass for read.
        """
        for name, check in self._filters.items():
            try:
                said = check(text)
            except Exception as error:
                said = f"{name} failed ({type(error).__name__})"
            if said is not None:
                objection = f"outcome: {said}"
                self.counts[objection] += 1
                return objection
        return None

    def _judge(self, codes: Tensor) -> list[tuple[Rule, str]]:
        """The rule that each code (R, n_z) falls under, and the name of its strategy."""
        judged: list[tuple[Rule, str]] = []
        for k, known in zip(*self.library.nearest(_numbers(codes)), strict=True):
            rule, name = self._rules[k], self.library.names[k]
            judged.append((rule, name) if known or rule == "deny" else (self.config.unknown, UNKNOWN))
        return judged

    def _mended(self, codes: Tensor, denied: list[int], redraw: Redraw | None) -> tuple[Tensor, list[int]]:
        """The codes with those in the rows `denied` replaced, and which rows were projected."""
        asked, codes, left = _numbers(codes), codes.clone(), denied
        if redraw is not None and self.config.on_denied == "resample":
            for _ in range(self.config.redraws):
                if not left:
                    break
                codes[left] = redraw(torch.tensor(left, device=codes.device)).to(codes)
                left = [
                    row for row, allowed in zip(left, self.allows(codes[left]).tolist(), strict=True) if not allowed
                ]
        for row in left:
            codes[row] = torch.from_numpy(self.library.project(asked[row], self._open)).to(codes)
        return codes, left


def load_limits(file: str | Path, adapter: str | Path) -> Limits:
    """The limits in the YAML `file`, for the adapter in the folder `adapter`.

    Raises:
        InternalRLError: file or library is missing, damaged, or does not fit the adapter; one sentence says how.
    """
    config = _read(file)
    library = Path(adapter) / STRATEGIES_FILE if config.library is None else Path(file).parent / config.library
    try:
        return Limits(load_library(library, adapter), config)
    except InternalRLError as error:
        raise InternalRLError(f"{file}: {error}") from error


def limits_of(adapter: str | Path, file: str | Path | None = None) -> Limits | None:
    """The limits that the adapter in a folder is to be used within.

    Those in `file`, or else those that it was trained with. Without either, its library alone: everything is allowed,
    and strategies are called by their names. None where there is none of these.
    """
    trained = Path(adapter) / LIMITS_FILE
    if file is not None:
        return load_limits(file, adapter)
    if trained.exists():
        if (config := _read(trained)).filters or config.library is not None:
            raise InternalRLError(
                f"{trained} names filters or a library, which no adapter may: it can come from anywhere, and must not "
                "say which functions are called; name them in limits of your own."
            )
        return load_limits(trained, adapter)
    library = Path(adapter) / STRATEGIES_FILE
    return Limits(load_library(library, adapter), LimitsConfig(unknown="allow")) if library.exists() else None


def _read(file: str | Path) -> LimitsConfig:
    values = load_yaml(file)
    if values.get("on_denied") is False:  # how YAML 1.1 reads `off`
        values["on_denied"] = "off"
    return from_dict(LimitsConfig, values, where=str(file))


def _numbers(codes: Tensor) -> NDArray[np.float64]:
    return codes.detach().cpu().double().numpy()


def _imported(name: str) -> Filter:
    module, colon, attribute = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute) if colon else None
    except (Exception, SystemExit) as error:  # a module may do whatever it likes
        raise InternalRLError(
            f"The filter {name!r} cannot be imported ({type(error).__name__}: {error}); give "
            "package.module:function, on the Python path."
        ) from error
    if not callable(found):
        raise InternalRLError(f"The filter {name!r} is no function; give package.module:function.")
    return found
