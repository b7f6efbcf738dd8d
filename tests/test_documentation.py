"""The Python in README.md and docs runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from internalrl.base.pretrain import build
from internalrl.controller.steered import SteeredModel
from internalrl.domains.grid.layouts import GridConfig
from internalrl.settings.stages import BaseConfig, MetacontrollerConfig
from tests.support.programs import finished_code_run
from tests.support.served import save_adapter, save_base

ROOT = Path(__file__).parents[1]


def run(page: str, *numbers: int) -> dict[str, object]:
    """Run the page's snippets, or those numbered, in order; returns the names that they leave."""
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for number in numbers or range(len(snippets)):
        exec(compile(snippets[number], page, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With untrained models in place of those that the demos leave."""
    grid = build(BaseConfig(layers=2, width=32, heads=2, mlp=32), GridConfig())
    grid.save_pretrained(tmp_path / "runs" / "demo" / "base")
    SteeredModel.from_base(grid, MetacontrollerConfig()).save_pretrained(tmp_path / "runs" / "demo" / "adapter")
    finished_code_run(tmp_path / "runs" / "demo-code")
    names = run("README.md")
    assert "colours done" in capsys.readouterr().out
    assert len(names["trace"].segments) == 8  # type: ignore[attr-defined]


def test_language(tmp_path: Path) -> None:
    names = run("docs/language.md")
    for folder in ("runs/rl/adapter", "runs/boxes/adapter", "adapters/first"):
        assert (tmp_path / folder / "adapter_model.safetensors").exists()
    assert names["logits"].shape == (2, 17, 64)  # type: ignore[attr-defined]


def test_code(capsys: pytest.CaptureFixture[str]) -> None:
    run("docs/code.md")
    assert "[0.0, 1.0, 1.0, 1.0]" in capsys.readouterr().out


def test_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine from Python; the first snippet needs a server and the third is a part of one."""
    base = save_base(tmp_path / "models" / "base")
    save_adapter(base, tmp_path / "adapters" / "support")
    run("docs/serving.md", 1)
    assert "SegmentRecord" in capsys.readouterr().out
