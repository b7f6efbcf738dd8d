"""Run the tests that are marked `versions` with the oldest and with the newest releases that pyproject.toml admits.

Each has an environment of its own in .versions, built once; without that folder they are built again, and newer
releases may be found. Both share the torch of the Python that runs this: other releases of it bring gigabytes of CUDA
libraries on some systems. With --torch they have their own, the oldest and the newest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterable, Sequence
from importlib.metadata import files, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("postgres", "serve")
"""Of the package, beside what it needs always: what the tests import."""
TOOLS = ("hypothesis", "pytest")
TESTS = ("tests/analysis", "tests/base", "tests/controller", "tests/players")


def main() -> int:
    """Both environments, one after the other; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", action="store_true", help="the oldest and newest torch as well: gigabytes")
    own_torch = parser.parse_args().torch
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"]]
    for name in EXTRAS:
        requirements += project["optional-dependencies"][name]
    failed = []
    for name, bounds in (("oldest", lowest(requirements)), ("newest", [])):
        folder = ROOT / ".versions" / (f"{name}-torch" if own_torch else name)
        if not own_torch:
            bounds = [bound for bound in bounds if not bound.startswith("torch==")] + [f"torch=={version('torch')}"]
        build(folder, requirements, bounds, share_torch=not own_torch)
        if not test(folder, requirements):
            failed.append(name)
    if failed:
        print(f"The tests fail with the {' and the '.join(failed)} releases.", file=sys.stderr)
    return len(failed)


def lowest(requirements: Iterable[str]) -> list[str]:
    """`name==version` of the oldest release that each requirement admits; ValueError where none is named."""
    found = []
    for requirement in map(Requirement, requirements):
        bounds = [specifier.version for specifier in requirement.specifier if specifier.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"{requirement} has {len(bounds)} lower bounds; name the one oldest release that works.")
        found.append(f"{requirement.name}=={bounds[0]}")
    return found


def build(folder: Path, requirements: Sequence[str], bounds: Sequence[str], share_torch: bool) -> None:
    """Install the project into `folder` under constraints, unless that was done for the same requirements."""
    record, wanted = folder / "installed.txt", "\n".join([*requirements, "", *bounds, ""])
    if record.exists() and record.read_text(encoding="utf-8") == wanted:
        return
    print(f"Installing {folder.relative_to(ROOT)}; once, some minutes")
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(bounds), encoding="utf-8")
    pip: list[str | Path] = [
        folder / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, "setuptools>=77"], check=True)  # the build below has no environment of its own
    if share_torch:
        link_torch(folder)
    project = ["--no-build-isolation", "--editable", f"{ROOT}[{','.join(EXTRAS)}]"]
    subprocess.run([*pip, *TOOLS, "--constraint", constraints, *project], check=True)
    record.write_text(wanted, encoding="utf-8")


def link_torch(folder: Path) -> None:
    """Let the environment in `folder` have the torch of this Python, which is the same release of Python."""
    source = Path(sysconfig.get_path("purelib"))
    target = next((folder / "lib").glob("python*/site-packages"))
    for part in {file.parts[0] for file in files("torch") or () if file.parts[0] != ".."}:
        if part != "__pycache__":
            (target / part).symlink_to(source / part)


def test(folder: Path, requirements: Sequence[str]) -> bool:
    """Whether the marked tests pass in an environment; what is installed there is said first."""
    python = folder / "bin" / "python"
    names = [Requirement(text).name for text in requirements]
    tell = (
        "import sys, importlib.metadata as m; print(*(f'{name} {m.version(name)}' for name in sys.argv[1:]), sep=', ')"
    )
    subprocess.run([python, "-c", tell, *names], check=True)
    # what is deprecated in other releases may be: the tests ask whether the results are the same
    options = ["-m", "versions", "-W", "default", "--disable-warnings", "-p", "no:cacheprovider", "-q"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([python, "-m", "pytest", *options, *TESTS], cwd=ROOT, env=environment, check=False)
    return ran.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
