"""`internalrl adapters`: the registry on the command line. A live server notices every change by itself."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, subcommand

from internalrl.errors import InternalRLError
from internalrl.run.files import read_file
from internalrl.settings.ranges import Checked

if TYPE_CHECKING:
    from internalrl.serving.registry.registry import Registry
    from internalrl.serving.registry.versions import Arm

LARGEST_METRICS = 2**20
"""Bytes of the largest file of metrics."""


@dataclass(frozen=True, kw_only=True)
class Where(Checked):
    """Options of every action."""

    registry: Path = Path("runs/registry")
    """Folder of the registry: the adapters and, without --database, an SQLite file."""
    database: str | None = None
    """URL of a database instead of that file: postgresql://USER@HOST/NAME."""


@dataclass(frozen=True, kw_only=True)
class List(Where):
    """Show all versions, or those of one adapter, and their share of the requests."""

    name: Positional[str | None] = None
    """Name of the adapter."""


@dataclass(frozen=True, kw_only=True)
class Add(Where):
    """Copy a trained adapter into the registry as the next version of a name."""

    name: Positional[str]
    """Name that requests call the adapter by."""
    adapter: Positional[Path]
    """Folder with adapter_config.json and adapter_model.safetensors."""
    metrics: Path | None = None
    """JSON file of what was measured on it, such as a run's summary.json."""
    promote: bool = False
    """Let it answer at once."""


@dataclass(frozen=True, kw_only=True)
class Promote(Where):
    """Let a version answer all requests for its name."""

    version: Positional[str]
    """NAME@NUMBER."""


@dataclass(frozen=True, kw_only=True)
class Rollback(Where):
    """Undo the last promotion or split: what was live before is live again."""

    name: Positional[str]
    """Name of the adapter."""


@dataclass(frozen=True, kw_only=True)
class Split(Where):
    """Divide the requests for a name among versions (A/B)."""

    name: Positional[str]
    """Name of the adapter."""
    weights: Positional[tuple[str, ...]]
    """NUMBER=WEIGHT for each version, in any unit: 3=90 4=10."""


@dataclass(frozen=True, kw_only=True)
class Remove(Where):
    """Delete a version that is not live."""

    version: Positional[str]
    """NAME@NUMBER."""


@dataclass(frozen=True, kw_only=True)
class Compare(Where):
    """Mean rewards of the versions of an adapter by the feedback on their answers, with 95 % intervals."""

    name: Positional[str]
    """Name of the adapter."""


@dataclass(frozen=True, kw_only=True)
class Move(Where):
    """Copy what an SQLite registry knows, and keys and feedback, into the empty --database; no server may run."""

    audit: Path | None = None
    """Folder of an audit that is copied as well."""


AdaptersConfig = (
    Annotated[List, subcommand("list")]
    | Annotated[Add, subcommand("add")]
    | Annotated[Promote, subcommand("promote")]
    | Annotated[Rollback, subcommand("rollback")]
    | Annotated[Split, subcommand("split")]
    | Annotated[Remove, subcommand("remove")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Move, subcommand("move")]
)


def main(config: List | Add | Promote | Rollback | Split | Remove | Compare | Move) -> dict[str, Any]:
    """Do what the action says; returns what is live then, or what was asked for."""
    from internalrl.serving.registry.registry import Registry

    in_files = config.database is None or isinstance(config, Move)
    if in_files and not isinstance(config, Add) and not (config.registry / "registry.db").exists():
        raise InternalRLError(f"There is no registry in {config.registry}; `internalrl adapters add` makes one.")
    if isinstance(config, Move):
        return {"copied": _moved(config)}
    registry = Registry(config.registry, config.database)
    try:
        match config:
            case List():
                return {"adapters": _table(registry, config.name)}
            case Add():
                version = registry.add(config.name, config.adapter, _metrics(config.metrics))
                if config.promote:
                    registry.promote(version.key)
                return {"added": version.key, "content": version.content_hash, "live": _live(registry, config.name)}
            case Promote():
                return {"live": {registry.promote(config.version).key: 1.0}}
            case Rollback():
                return {"live": _shares(registry.rollback(config.name))}
            case Split():
                return {"live": _shares(registry.split(config.name, _weights(config.weights)))}
            case Remove():
                return {"removed": registry.remove(config.version).key}
            case Compare():
                return _comparison(registry, config.name)
    finally:
        registry.close()


def _moved(config: Move) -> dict[str, int]:
    from internalrl.serving.moving import move

    if config.database is None:
        raise InternalRLError("Say where to with --database postgresql://USER@HOST/NAME.")
    if config.audit is not None and not (config.audit / "audit.db").exists():
        raise InternalRLError(f"There is no audit in {config.audit}; give the folder of one as --audit.")
    return move(config.registry, config.audit, config.database)


def _table(registry: Registry, name: str | None) -> list[dict[str, Any]]:
    versions = registry.versions(name)
    if name is not None and not versions:
        raise InternalRLError(f"There is no adapter {name!r} in the registry; `internalrl adapters list` shows all.")
    live = {name: _live(registry, name) for name in {version.name for version in versions}}
    return [
        {
            "version": version.key,
            "share": live[version.name].get(version.key, 0.0),
            "content": version.content_hash,
            "base": version.base_fingerprint,
            "added": datetime.fromtimestamp(version.added, UTC).isoformat(" ", "seconds"),
            "trained": ", ".join(version.provenance) or None,
            "metrics": dict(version.metrics),
        }
        for version in versions
    ]


def _live(registry: Registry, name: str) -> dict[str, float]:
    return _shares([arm for arms in registry.live(name).values() for arm in arms])


def _shares(arms: tuple[Arm, ...] | list[Arm]) -> dict[str, float]:
    return {arm.version.key: arm.share for arm in arms}


def _metrics(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        metrics = json.loads(read_file(file, LARGEST_METRICS))
    except (OSError, ValueError, RecursionError) as error:
        raise InternalRLError(f"Metrics {file} cannot be read as JSON ({error}).") from error
    if not isinstance(metrics, dict):
        raise InternalRLError(f"Metrics {file} must hold an object: name -> value.")
    return metrics


def _weights(texts: tuple[str, ...]) -> dict[int, float]:
    weights: dict[int, float] = {}
    for text in texts:
        found = re.fullmatch(r"([1-9]\d{0,8})=(\d+\.?\d*|\.\d+)", text)
        if not found or int(found[1]) in weights:
            raise InternalRLError(
                f"{text!r} is no share; write NUMBER=WEIGHT once for each version, such as 3=90 4=10."
            )
        weights[int(found[1])] = float(found[2])
    return weights


def _comparison(registry: Registry, name: str) -> dict[str, Any]:
    comparison = registry.compare(name)
    if not comparison.outcomes:
        raise InternalRLError(f"There is no feedback on {name!r} yet.")
    since = comparison.since and datetime.fromtimestamp(comparison.since, UTC).isoformat(" ", "seconds")
    return {
        "since": since,
        "outcomes": [asdict(outcome) for outcome in comparison.outcomes],
        "differences": [asdict(difference) for difference in comparison.differences],
    }
