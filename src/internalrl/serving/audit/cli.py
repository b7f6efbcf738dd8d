"""`internalrl audit`: what the served models decided, by request, adapter, strategy, violation and time."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from internalrl.errors import InternalRLError
from internalrl.settings.ranges import Checked, Range

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True)
class AuditConfig(Checked):
    """Options of `internalrl audit`."""

    request: Positional[str | None] = None
    """Show this request alone, from its beginning."""
    audit: Path = Path("runs/audit")
    """Folder of the audit: its journal and, without --database, an SQLite file."""
    database: str | None = None
    """URL of the database instead of that file: postgresql://USER@HOST/NAME."""
    adapter: str | None = None
    """Version of an adapter, such as support@3, or a name for all of its versions."""
    strategy: str | None = None
    """Nearest named strategy."""
    violation: str | None = None
    """Text that the violation contains; an empty one finds every violation."""
    since: str | None = None
    """Not before this time, such as 2026-05-31 or 2026-05-31T12:00 (UTC), or not longer ago than 90s, 15m, 2h or 7d."""
    until: str | None = None
    """Before this time, or longer ago."""
    limit: Annotated[int, Range(1, 100_000)] = 50
    """Most segments, the newest ones."""


def main(config: AuditConfig) -> dict[str, Any]:
    """The segments that were asked for; what a killed server left in its journal is stored first."""
    from internalrl.serving.audit.journal import Journal
    from internalrl.serving.audit.store import AuditStore, Query

    if config.database is None and not (config.audit / "audit.db").exists():
        raise InternalRLError(f"There is no audit in {config.audit}; give the folder of one as --audit.")
    store = AuditStore(config.audit, config.database)
    try:
        for lines in Journal(config.audit / "journal").take():
            store.insert(lines)
        query = Query(
            config.request,
            config.adapter,
            config.strategy,
            config.violation,
            _moment(config.since, "since"),
            _moment(config.until, "until"),
            config.limit,
        )
        found = store.find(query)
    finally:
        store.close()
    rows = [asdict(segment) for segment in found]
    for row in rows:
        row["time"] = datetime.fromtimestamp(row["time"], UTC).isoformat(" ", "milliseconds")
    return {"count": len(rows), "segments": rows}


def _moment(text: str | None, option: str) -> float | None:
    """Seconds since 1970 of a time or an age."""
    if text is None:
        return None
    if age := re.fullmatch(r"(\d{1,9})([smhd])", text):
        return time.time() - int(age[1]) * _SECONDS[age[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InternalRLError(
            f"--{option} is {text!r}; give a time such as 2026-05-31T12:00, or an age such as 2h."
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
