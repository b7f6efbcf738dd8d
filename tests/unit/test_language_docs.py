"""The Python in docs/language.md runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "language.md"


def test_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    assert len(snippets) == 8
    assert (tmp_path / "runs" / "rl" / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "runs" / "boxes" / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "adapters" / "first" / "adapter_model.safetensors").exists()
    assert names["logits"].shape == (2, 17, 64)  # type: ignore[attr-defined]
