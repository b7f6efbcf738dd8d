"""The audit's pages in a real browser: coloured, readable on light and dark, and deaf to what hostile texts say."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from markupsafe import escape

from internalrl.serving.audit.audit import Audit
from internalrl.serving.audit.page import POLICY, audit_list, audit_page
from internalrl.serving.audit.store import AuditStore, Query
from tests.support.auditing import record, request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")

HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "</span></a></p></main><h1>Another page</h1><style>body { display: none }</style>",
    "\" onmouseover=\"document.title = 'owned'",
    "&lt;b&gt; \u202etxt.exe\u2066 \x1b[31m",
    "{{ title }} {% raw %} {{ 7 * 7 }} {# policy #}",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AuditStore]:
    folder = tmp_path_factory.mktemp("audit")
    with closing(Audit(folder)) as audit:
        parts = [
            ("greet", "Hello Maria,\nthank you for writing to us. "),
            ("apologise", "I am sorry that the parcel arrived damaged; that should not have happened. "),
            ("ask", "Could you tell me the order number? "),
            (None, "Meanwhile "),
            ("offer", "we can send a replacement today, or return the full amount to your card. "),
        ]
        for index, (strategy, text) in enumerate(parts):
            violation = "'apologise' needs review" if strategy == "apologise" else None
            audit.segment(request("plain"), record(index, text, strategy=strategy, violation=violation))
        audit.segment(request("plain"), record(5, "Kind regards", strategy=None, code=()))
        for index, text in enumerate(HOSTILE):
            audit.segment(request(HOSTILE[0]), record(index, text, strategy=text, violation=text))
        audit.segment(request("no-text"), record(0, code=(float("nan"),), switch_probability=float("nan")))
    with closing(AuditStore(folder)) as store:
        yield store


def page(store: AuditStore, request_id: str) -> str:
    found = audit_page(store, request_id)
    assert found is not None
    return found


def browse(file: Path, text: str, *options: str) -> str:
    file.write_text(text, encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    command += [f"--user-data-dir={file.parent / 'profile'}", "--virtual-time-budget=2000", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_pages_name_everything(store: AuditStore) -> None:
    text = page(store, "plain")
    for expected in (
        "support@3",
        "tokens 3–5",
        "0.750",
        "apologise",
        "not steered",
        "&#39;apologise&#39; needs review",
    ):
        assert expected in text
    assert text.count('<tr id="s') == 6
    assert f'http-equiv="Content-Security-Policy" content="{escape(POLICY)}"' in text
    assert not re.search(r"https?://|<script|<img|<link|@import|url\(", text), "nothing from elsewhere"
    assert audit_page(store, "unknown") is None
    listed = audit_list(store)
    assert 'href="audit/plain"' in listed
    assert escape(HOSTILE[0]) in listed
    assert "1 violation<" in listed
    assert "No answer fits" in audit_list(store, Query(adapter="nobody"))


@in_browser
@pytest.mark.parametrize("shown", ["answer", "list"])
def test_hostile_texts_do_not_run(store: AuditStore, tmp_path: Path, shown: str) -> None:
    text = page(store, HOSTILE[0]) if shown == "answer" else audit_list(store, Query(violation="owned"))
    without_policy = re.sub(r"<meta http-equiv.*?>", "", text)
    assert without_policy != text
    for version in (text, without_policy):  # escaped, and were it not, still not run
        dom = browse(tmp_path / "page.html", version, "--dump-dom")
        assert "<title>owned" not in dom
        for element in ("script", "img", "style>body"):
            assert f"<{element}" not in dom
        assert dom.count("<h1") == 1
        assert not re.search(r"<[^>]* onmouseover", dom)
        for unseen in "\u202e\u2066\x1b":
            assert unseen not in dom
    assert "⟨U+202E⟩" in text
    assert "{{ title }} {% raw %} {{ 7 * 7 }} {# policy #}" in text


PROBE = """<script>
const first = document.querySelectorAll(".segment")[1], card = first.querySelector(".card");
const before = getComputedStyle(card).display;
first.focus();
const box = card.getBoundingClientRect();
document.body.insertAdjacentHTML("beforeend", `<p id=probe>${document.hasFocus()} ` +
  `${before} ${getComputedStyle(card).display} ` +
  `${box.left >= 0 && box.right <= innerWidth && box.bottom <= innerHeight} ` +
  `${document.documentElement.scrollWidth <= innerWidth} ` +
  `${new Set([...document.querySelectorAll(".answer a")].map(s => getComputedStyle(s).backgroundColor)).size}</p>`);
</script>"""


@in_browser
@pytest.mark.parametrize("width", [500, 1280])
def test_cards_show_and_fit(store: AuditStore, tmp_path: Path, width: int) -> None:
    text = re.sub(r"<meta http-equiv.*?>", "", page(store, "plain")).replace("</body>", f"{PROBE}</body>")
    for _ in range(5):
        dom = browse(tmp_path / "page.html", text, "--dump-dom", f"--window-size={width},900")
        found = re.search('<p id="probe">(\\w+) (.*?)</p>', dom)
        assert found
        if found[1] == "true":  # on a busy machine the window may not have the focus yet, and nothing in it then has
            break
    assert found[2] == "none block true true 6", "hidden, shown on focus, in view, no sideways scrolling, six colours"


@in_browser
@pytest.mark.parametrize(("scheme", "dark"), [("1", False), ("0", True)])
def test_pages_are_readable_on_light_and_dark(store: AuditStore, tmp_path: Path, scheme: str, dark: bool) -> None:
    for name, text in {"answer": page(store, "plain"), "list": audit_list(store)}.items():
        picture = tmp_path / f"{name}.png"
        options = [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1000,1000"]
        browse(tmp_path / "page.html", text, *options, f"--screenshot={picture}")
        pixels = matplotlib.image.imread(picture)[..., :3]
        light = pixels @ np.array([0.2126, 0.7152, 0.0722])
        ground = float(np.median(light))
        assert ground < 0.2 if dark else ground > 0.95
        assert float((np.abs(light - ground) > 0.5).mean()) > 0.005, "its writing stands out"
        assert float((np.ptp(pixels, axis=2) > 0.06).mean()) > 0.005, "colours"
