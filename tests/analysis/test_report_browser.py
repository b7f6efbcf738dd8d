"""The report in a real browser: it shows, and its script runs. Skipped where there is no chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import pytest

from internalrl.analysis.report import programs, report
from internalrl.settings.stages import ReportConfig
from tests.support.finished import finished_run
from tests.support.programs import finished_code_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")

DRIVE = """<script>
const slider = document.querySelector(".episode input");
slider.value = 1;
slider.dispatchEvent(new Event("input"));
document.querySelectorAll(".episode button")[1].click();
</script>"""
"""Sets the first episode to its step 1 by hand, and starts the second."""


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = finished_run(tmp_path_factory.mktemp("runs") / "run")
    report.main(ReportConfig(episodes=32), run)
    return run.path / "report.html"


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = finished_code_run(tmp_path_factory.mktemp("runs") / "code")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "LONGEST", 60)
        report.main(ReportConfig(episodes=8), run)
    return run.path / "report.html"


def browse(file: Path, *options: str) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    command += [f"--user-data-dir={file.parent / 'profile'}", "--virtual-time-budget=3000", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_script_runs_and_episodes_play(html: Path) -> None:
    driven = html.with_name("driven.html")
    driven.write_text(html.read_text(encoding="utf-8").replace("</body>", f"{DRIVE}</body>"), encoding="utf-8")
    dom = browse(driven, "--dump-dom")
    root = re.search(r"<html[^>]*>", dom)
    assert root
    assert 'data-ready="3"' in root[0]
    assert "data-error" not in root[0]
    states = re.findall(r'<p class="status">(.*?)</p>', dom)
    assert states[0].startswith("step 1 of ")
    assert re.match(r"step \d+ of \d+, segment", states[1]), "the second one was set in motion"
    assert states[2] == "&nbsp;", "the third one was left alone"
    assert dom.count('class="now"') == 2


def test_a_report_without_episodes_has_no_error(code: Path) -> None:
    dom = browse(code, "--dump-dom")
    root = re.search(r"<html[^>]*>", dom)
    assert root
    assert 'data-ready="0"' in root[0]
    assert "data-error" not in root[0]
    assert dom.count("<pre>") == 12


@pytest.mark.parametrize("kind", ["html", "code"])
@pytest.mark.parametrize("width", [500, 1280])
def test_report_is_not_blank(kind: str, tmp_path: Path, width: int, request: pytest.FixtureRequest) -> None:
    picture = tmp_path / "page.png"
    browse(request.getfixturevalue(kind), f"--window-size={width},900", f"--screenshot={picture}")
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape[1] == width
    white = (pixels > 0.99).all(-1).mean()
    assert 0.5 < white < 0.97
