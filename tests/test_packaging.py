"""The wheel: what it needs is in it or is declared, and what an installation lacks is told in a sentence."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "internalrl"
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "serve": ("fastapi", "h11", "prometheus_client", "pydantic", "pydantic_core", "sqlalchemy", "starlette", "uvicorn"),
    "postgres": ("psycopg",),
}
"""Extras of the package, and the modules that it imports from each."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked, as it is built from the files that are in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(SOURCE, folder / "src" / "internalrl", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    built = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(folder / built.stdout.split()[-1]) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    wanted = {str(file.relative_to(SOURCE)) for file in SOURCE.rglob("*") if file.is_file() and file.suffix != ".pyc"}
    found = {
        str(file.relative_to(wheel / "internalrl")) for file in (wheel / "internalrl").rglob("*") if file.is_file()
    }
    assert found == wanted
    assert {entry.name for entry in wheel.iterdir()} == {"internalrl", "internalrl-0.1.0.dist-info"}


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"}


def test_the_metadata(wheel: Path) -> None:
    [found] = importlib.metadata.distributions(path=[str(wheel)])
    assert (found.name, found.version) == ("internalrl", "0.1.0")
    assert {(entry.name, entry.value) for entry in found.entry_points} == {("internalrl", "internalrl.cli:main")}
    assert found.metadata["Requires-Python"] == ">=3.11"
    assert set(EXTRAS) < set(found.metadata.get_all("Provides-Extra") or ())


def test_everything_that_is_imported_is_declared(wheel: Path) -> None:
    """By the package that it comes from, and an optional one by the extra that the sentence names."""
    declared: dict[str, set[str]] = {"": set()}
    [found] = importlib.metadata.distributions(path=[str(wheel)])
    for line in found.requires or ():
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"](\w+)", line)
        assert name
        declared.setdefault(extra[1] if extra else "", set()).add(normal(name[0]))
    homes = importlib.metadata.packages_distributions()
    for file in sorted((wheel / "internalrl").rglob("*.py")):
        for module in imported(file):
            extra = next((extra for extra, modules in EXTRAS.items() if module in modules), "")
            assert {normal(home) for home in homes[module]} & declared[extra], f"{file.name} imports {module}"
    for extra, modules in EXTRAS.items():
        assert {normal(homes[module][0]) for module in modules} == declared[extra] - {"internalrl"}


def imported(file: Path) -> Iterator[str]:
    """The modules of other packages that a file imports, but for those that it only needs for types."""
    nodes: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"internalrl"}


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


BARE = """
import contextlib, importlib, io, json, os, pkgutil, sys

class Blocked:
    # An installation in which these packages are not.
    names = set()

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import tyro, internalrl, internalrl.cli, internalrl.settings.options

assert internalrl.__file__.startswith(sys.argv[1]), internalrl.__file__

def forked(work):
    # What `work` returns in a process of its own, in which nothing was imported yet.
    read, write = os.pipe()
    if not os.fork():
        with open(write, "w") as file:
            json.dump(work(), file)
        os._exit(0)
    os.close(write)
    with open(read) as file:
        return json.load(file)

def run(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = internalrl.cli.main(words)
        except SystemExit as stop:
            code = stop.code or 0
    return [code, err.getvalue()]

def load(name):
    try:
        importlib.import_module(name)
    except internalrl.InternalRLError as error:
        return str(error)
    return ""

def loaded():
    names = [m.name for m in pkgutil.walk_packages(internalrl.__path__, "internalrl.", onerror=lambda name: None)]
    return {name: load(name) for name in names}

def without(names, work, *arguments):
    Blocked.names = set(names)
    return forked(lambda: work(*arguments))
"""
"""What a process needs in which packages are missing; forks are cheap, as nothing heavy is imported before them."""


def in_bare_installation(wheel: Path, code: str, cases: object) -> list[list[object]]:
    """What `code` prints as JSON in a process that has the wheel and no other copy of the package."""
    command = [sys.executable, "-c", BARE + code, str(wheel), json.dumps(cases)]
    environment = {"PYTHONPATH": str(wheel), "PATH": "", "HOME": str(wheel)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    answer: list[list[object]] = json.loads(done.stdout)
    return answer


def test_commands_without_an_optional_package(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "registry.db").touch()
    (tmp_path / "audit.db").touch()
    where = ["--registry", str(tmp_path)]
    commands = {
        "adapters": [["adapters", action, *words, *where] for action, words in ADAPTERS.items()],
        "keys": [["keys", action, *words, *where] for action, words in KEYS.items()],
        "audit": [["audit", "--audit", str(tmp_path)]],
        "serve": [["serve", str(tmp_path), *where]],
    }
    missing = {name: ["sqlalchemy"] for name in ("adapters", "audit")}
    missing |= {name: [package for package in EXTRAS["serve"] if package != "h11"] for name in ("keys", "serve")}
    cases = [
        (package, words)
        for name, every in commands.items()
        for words in every
        for package in missing[name]
        if package == "sqlalchemy" or words in (commands["serve"][0], commands["keys"][0])
    ]
    code = "print(json.dumps([without([package], run, words) for package, words in json.loads(sys.argv[2])]))"
    for (package, words), answer in zip(cases, in_bare_installation(wheel, code, cases), strict=True):
        said = f"internalrl: This needs more packages (No module named '{package}'); pip install 'internalrl[serve]'.\n"
        assert answer == [2, said], words


ADAPTERS: Mapping[str, list[str]] = {
    "list": [], "add": ["a", "b"], "promote": ["a@1"], "rollback": ["a"], "split": ["a", "1=1"], "remove": ["a@1"],
    "compare": ["a"], "move": ["--database", "postgresql://x/y"],
}  # fmt: skip
KEYS: Mapping[str, list[str]] = {"create": ["a"], "list": [], "revoke": ["a"]}


def test_a_database_without_its_driver(wheel: Path, tmp_path: Path) -> None:
    words = ["--registry", str(tmp_path), "--database", "postgresql://me@localhost/models"]
    cases = [["adapters", "list", *words], ["keys", "list", *words], ["audit", *words[2:]]]
    code = "print(json.dumps([without(['psycopg'], run, words) for words in json.loads(sys.argv[2])]))"
    for code_, said in in_bare_installation(wheel, code, cases):
        assert code_ == 2
        assert said == (
            "internalrl: This needs more packages (No module named 'psycopg'); pip install 'internalrl[postgres]'.\n"
        )


def test_modules_and_help_without_any_extra(wheel: Path) -> None:
    """Every module can be imported, or says which extra it needs; help needs none."""
    optional = [package for packages in EXTRAS.values() for package in packages if package != "h11"]  # others need it
    tools = ("serve", "adapters", "audit", "keys", "strategies")
    helps = [["--help"], ["--version"], *([tool, "--help"] for tool in tools)]
    code = (
        "optional, helps = json.loads(sys.argv[2])\n"
        "print(json.dumps([without(optional, loaded), [without(optional, run, words) for words in helps]]))"
    )
    loaded, answers = in_bare_installation(wheel, code, [optional, helps])
    assert isinstance(loaded, dict)
    refused = {name: said for name, said in loaded.items() if said}
    assert all(said.endswith("pip install 'internalrl[serve]'.") for said in refused.values())
    assert {name.split(".")[1] for name in refused} == {"serving"}
    needing = ("registry.registry", "registry.live", "audit.store", "audit.audit", "api", "database")
    assert {f"internalrl.serving.{name}" for name in needing} <= set(refused)
    assert answers == [[0, ""]] * len(helps)
