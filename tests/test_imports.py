"""Imports run strictly downward, and the command line starts without the heavy libraries."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import internalrl

PACKAGE = Path(internalrl.__file__).parent

LAYERS = (
    {"errors", "tables"},
    {"extras"},
    {"domains", "pages", "settings.ranges", "run.files", "run.streams"},
    {"settings.schema", "run.checkpoint", "run.processes"},
    {"run"},
    {"settings"},
    {"base"},
    {"controller"},
    {"strategies.library"},
    {"strategies.limits"},
    {"players.stepwise"},
    {"players.threads"},
    {"discovery", "reinforce"},
    {"players", "strategies", "analysis"},
    {"serving"},
    {"demo", "demo_code"},
    {"__init__"},
    {"cli"},
)
"""From the bottom up: a module imports only from layers below its own, or from its own package."""

LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}


def part_of(module: str) -> str:
    """The layer's member that a module of the package belongs to: internalrl.base.residual -> base."""
    names = module.split(".")[1:]
    finer = ".".join(names[:2])
    return finer if finer in LAYER_OF else names[0] if names else "__init__"


def imported_parts(file: Path) -> Iterator[str]:
    """The members that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: import by full name"
            modules = [node.module or ""]
            if node.module == "internalrl":  # `from internalrl import base` is an import of base
                modules = [f"internalrl.{alias.name}" for alias in node.names if alias.name in LAYER_OF] or modules
        else:
            continue
        yield from (part_of(module) for module in modules if module.split(".")[0] == "internalrl")


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_downward(file: Path) -> None:
    own = part_of(".".join(("internalrl", *file.relative_to(PACKAGE).with_suffix("").parts)))
    assert own in LAYER_OF, f"give {own} a place in LAYERS"
    for other in imported_parts(file):
        assert other == own or LAYER_OF[other] < LAYER_OF[own], f"{own} must not import {other}"


def test_domains_know_nothing_of_the_method() -> None:
    for file in (PACKAGE / "domains").rglob("*.py"):
        assert set(imported_parts(file)) <= {"domains", "errors"}


def test_command_line_knows_stages_by_name_only() -> None:
    assert set(imported_parts(PACKAGE / "cli.py")) <= {
        "__init__",
        "errors",
        "run",
        "run.files",
        "settings",
        "settings.schema",
        "tables",
    }


def test_importing_the_package_loads_no_torch() -> None:
    code = "import internalrl, internalrl.cli, sys; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("order", ["gymnasium, internalrl", "internalrl, gymnasium"])
def test_importing_the_package_registers_the_environments(order: str) -> None:
    code = f"import {order}; print(gymnasium.spec('internalrl/Grid-v0').id)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "internalrl/Grid-v0"


def test_public_names_resolve() -> None:
    for name in internalrl.__all__:
        assert getattr(internalrl, name) is not None
        assert name in dir(internalrl)
    assert importlib.metadata.version("internalrl") == internalrl.__version__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        internalrl.nonsense  # noqa: B018
