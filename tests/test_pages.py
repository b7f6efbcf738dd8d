"""Pages escape what they are given, refuse names that are not there, and can be made from the installed package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup, escape

import internalrl
from internalrl.analysis.report.episodes import Player, Segment
from internalrl.analysis.report.page import Figure, Headline, Part, Passages, Section, Table, render
from internalrl.pages import templates

PACKAGE = Path(internalrl.__file__).parent
PROJECT = PACKAGE.parents[1]
WITH_PAGES = ("internalrl.analysis.report", "internalrl.serving.audit")
HOSTILE = "</script></style></title><img src=x onerror='own()'>\"{{ 7 * 7 }}&lt;"


def test_every_text_of_a_report_is_escaped() -> None:
    given: list[str] = []

    def hostile() -> str:
        given.append(f"{HOSTILE} {len(given)}.")
        return given[-1]

    way, key = [(20, 20), (60, 20)], [(hostile(), hostile(), hostile())]
    parts: list[Part] = [
        Headline([(hostile(), hostile(), hostile()), (None, hostile(), hostile())]),
        Table([[hostile(), hostile()]], head=[hostile(), hostile()], folded=hostile()),
        Passages(hostile(), hostile(), [(hostile(), [(hostile(), hostile(), hostile())], hostile())]),
        Player(1, hostile(), 1, [(hostile(), 3)], way, [Segment(0, 1, way, ())]),
    ]
    assert {type(part) for part in parts} == set(Part.__subclasses__())
    figure = Figure(hostile(), [(hostile(), hostile(), hostile())], Markup("<svg/>"), hostile())
    html = render(hostile(), hostile(), [Section(hostile(), hostile(), hostile(), [None, figure], key, parts)])
    assert [text for text in given if str(escape(text)) not in html] == []
    assert HOSTILE not in html
    assert "<img" not in html
    assert html.count("</script>") == html.count("</style>") == html.count("</title>") == 1


def test_an_empty_section_is_not_shown() -> None:
    assert not Section("a", "A", "text", [None], key=[("■", "red", "b")])
    assert Section("a", "A", parts=[Table([["b", "c"]])])


@pytest.mark.parametrize("package", WITH_PAGES)
def test_what_a_page_is_not_given_is_an_error(package: str) -> None:
    found = templates(package)
    assert found.autoescape
    with pytest.raises(UndefinedError, match="nobody"):
        found.from_string("{{ nobody }}").render()


def test_the_installed_package_has_its_templates(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "src" / "internalrl", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    installed = tmp_path / "installed"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(installed)
    for package in WITH_PAGES:
        folder = Path(*package.split("."))
        assert templates(package).list_templates() == sorted(
            path.name for path in (installed / folder / "templates").iterdir()
        )
    code = (
        "import internalrl; from internalrl.analysis.report.page import Section, Table, render;"
        "print(internalrl.__file__, render('Title', 'lead', [Section('a', 'A', parts=[Table([['b', 'c']])])]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert found.stdout.startswith(str(installed)), found.stderr
    assert "<title>Title</title>" in found.stdout
