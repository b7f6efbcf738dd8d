"""Internal RL: find abstract actions inside a frozen sequence model, and do reinforcement learning on them.

Public names are imported when first used, so that `import internalrl` loads no torch. The environments of
`internalrl.domains` are registered with Gymnasium on import.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "GridConfig": "internalrl.domains.grid.world",
    "InternalEnvironment": "internalrl.reinforce.gym",
    "InternalRLConfig": "internalrl.settings.stages",
    "InternalRLError": "internalrl.errors",
    "InternalRLTrainer": "internalrl.reinforce.trainer",
    "MetacontrollerConfig": "internalrl.settings.stages",
    "ResidualTap": "internalrl.base.residual",
    "RunFolder": "internalrl.run.folder",
    "SteeredModel": "internalrl.controller.steered",
    "TrajectoryConfig": "internalrl.base.trajectory",
    "TrajectoryModel": "internalrl.base.trajectory",
}
"""Public name -> the module it is imported from."""

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'internalrl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


# Registering loads Gymnasium (0.2 s), which the command line's `--help` should not wait for.
if Path(sys.argv[0] if sys.argv else "").name != "internalrl":
    from internalrl.domains import register_environments

    register_environments()
