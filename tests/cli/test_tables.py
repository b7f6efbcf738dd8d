"""Printed results: nothing is cut, tables fit the terminal, pipes get lines, and whoever stops reading may."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internalrl import cli
from internalrl.serving.api.security import Keys
from internalrl.serving.registry.registry import Registry
from internalrl.tables import print_results
from tests.support.served import save_adapter, served_base

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=90)
CELLS = st.none() | st.floats(allow_nan=False) | st.lists(WORDS, min_size=1, max_size=12).map(" ".join)
NAMES = st.lists(st.from_regex("[a-z_]{1,24}", fullmatch=True), min_size=1, max_size=7, unique=True)
ROWS = NAMES.flatmap(lambda names: st.lists(st.fixed_dictionaries(dict.fromkeys(names, CELLS)), min_size=1, max_size=5))


def printed(results: dict[str, object], columns: int | None) -> list[str]:
    """What stands on a terminal of so many columns, or in a file, line by line."""
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda text: lines.extend(text.split("\n")))
        patch.setattr(sys.stdout, "isatty", lambda: columns is not None)
        patch.setenv("COLUMNS", str(columns))
        print_results("title", results)
    return lines


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, columns=st.sampled_from([None, 40, 80, 200]))
def test_no_word_is_cut(capsys: pytest.CaptureFixture[str], rows: list[dict[str, object]], columns: int | None) -> None:
    lines = printed({"rows": rows, **rows[0]}, columns)
    found = set(" ".join(lines).split())
    for value in (value for row in rows for value in row.values() if isinstance(value, str)):
        assert set(value.split()) <= found
    if columns is None:
        assert len(lines) == len(rows[0]) + 1 + 1 + len(rows), "values, an empty line, names, a line for each row"
    for line in lines if columns else []:
        longest = max(map(_width, line.split()), default=0)
        assert _width(line.rstrip()) <= max(columns or 0, 24 + 2 + longest)


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def test_texts_do_nothing_to_a_terminal() -> None:
    text = "[bold] a\x1b[31m b\nc \u202e d"
    for columns in (None, 80):
        out = "\n".join(printed({"text": text, "rows": [{"text": text}]}, columns))
        assert out.count("[bold] a\\x1b[31m b\\nc \\u202e d") == 2


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    """Runs a command on a terminal of 80 columns, or into a pipe, and returns what it printed."""

    def run(terminal: bool, *words: object) -> str:
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        assert cli.main(list(map(str, words))) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("terminal", [True, False])
def test_a_new_key_can_be_copied(at, tmp_path: Path, terminal: bool) -> None:  # type: ignore[no-untyped-def]
    options = ("--registry", tmp_path, "--requests-per-minute", 60)
    out = at(terminal, "keys", "create", "the support desk", *options)
    [key] = [word for word in out.split() if word.startswith("irl-")]
    assert max(map(len, out.splitlines())) <= 80
    with closing(Keys(tmp_path)) as keys:
        found = keys.find(key)
    assert found
    listed = at(terminal, "keys", "list", "--registry", tmp_path)
    assert found.id in listed.split()
    assert not terminal or max(map(len, listed.splitlines())) <= 80


@pytest.mark.parametrize("terminal", [True, False])
def test_versions_and_their_hashes_can_be_copied(at, tmp_path: Path, terminal: bool) -> None:  # type: ignore[no-untyped-def]
    with closing(Registry(tmp_path / "registry")) as registry:
        version = registry.add("a-name-of-an-adapter", save_adapter(served_base(), tmp_path / "a"), {"success": 0.5})
    out = at(terminal, "adapters", "list", "--registry", tmp_path / "registry")
    assert {version.key, version.content_hash, version.base_fingerprint} <= set(out.split())
    assert not terminal or max(map(len, out.splitlines())) <= 80


def test_json_is_one_line_of_the_same(at, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    created = json.loads(at(False, "keys", "create", "x", "--registry", tmp_path, "--json"))
    assert created["id"] == created["key"].split("-")[1]


COMMANDS = [["--help"], ["keys", "list", "--json"], ["keys", "list"], ["keys", "--help"]]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_has_left(tmp_path: Path, words: list[str], unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = ended(words, tmp_path, write, unbuffered)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("words", COMMANDS[1:3], ids=" ".join)
def test_a_full_disk_under_the_results(tmp_path: Path, words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = ended(words, tmp_path, full.fileno())
    assert done.returncode == 2
    assert done.stderr == "internalrl: The disk is full, and results could not be printed; free some space.\n"


def ended(words: list[str], registry: Path, stdout: int, unbuffered: str = "") -> subprocess.CompletedProcess[str]:
    where = ["--registry", str(registry)] if "list" in words else []
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "internalrl.cli", *words, *where]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)
