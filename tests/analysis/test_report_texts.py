"""The report on a run of any texts, of a tiny untrained model."""

from __future__ import annotations

import json
import re
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from internalrl.analysis.report import report
from internalrl.analysis.report.texts import TextMaterial
from internalrl.base.pretrain_text import save_language_model
from internalrl.base.text_data import encode_prompts
from internalrl.run.folder import RunFolder
from internalrl.settings.stages import ReportConfig
from tests.support.language import steered_language_model
from tests.support.written import letters


def finished(path: Path, policy: bool = True, **config: Any) -> RunFolder:
    """A run whose prompts are "ab" and "cd"; with `policy` through internal RL, else through discovery."""
    rows = path.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt, "completion": "c"}) + "\n" for prompt in ("ab", "cd")))
    own = {"prompts": str(rows), "max_completion_length": 6, "temperature": 0.5} if policy else {"data": str(rows)}
    run = RunFolder.create(path, {**own, **config}, seed=5)
    steered = steered_language_model(policy=policy)
    save_language_model(steered.base, letters(), path / "base")
    steered.save_pretrained(path / "adapter")
    for step in range(0, 30, 10):
        if policy:
            rewards = {"reward": 0.5, "rewards/short/mean": 0.25, "rewards/polite & kind/mean": 0.75}
            run.log("reinforce", step, episodes=8 * (step + 1), decisions=3.0, **rewards, success=0.5)
        else:
            run.log("discover", step, nll=2.0, kl=3.0, switches=2.0, bimodality=0.5, hard_nll=2.1)
    return run


def sections(run: RunFolder) -> list[str]:
    found: list[str] = report.main(ReportConfig(), run)["sections"]
    return found


def completions(run: RunFolder) -> list[tuple[str, list[str]]]:
    """The page's prompts with the segments written after them."""
    html = (run.path / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r"<figure><pre>(.*?)</pre></figure>", html, re.DOTALL)
    return [(unescape(f.split("<span")[0]), [*map(unescape, re.findall(r">(.*?)</span>", f))]) for f in figures]


def test_internal_rl(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    assert sections(run) == ["headline", "reinforce", "texts", "settings"]
    html = (run.path / "report.html").read_text(encoding="utf-8")
    for part in ("weighted sum", "short", escape("polite & kind"), "The bare model", "The trained policy"):
        assert part in html
    assert [prompt for prompt, _ in completions(run)] == ["ab", "cd"] * 3


def test_segments_are_those_of_generation(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    sections(run)
    material = report.open_material(run, 8)
    assert isinstance(material, TextMaterial)
    assert material.steered is not None
    tokens = torch.tensor(encode_prompts(["cd"], material.tokenizer))
    torch.manual_seed(run.seed)
    sequences, trace = material.steered.generate(
        tokens, steering="policy", return_trace=True, tokenizer=letters(), max_new_tokens=6, do_sample=True,
        temperature=0.5,
    )  # fmt: skip
    assert len(trace.segments[0]) > 1
    assert completions(run)[-1] == ("cd", [segment.text for segment in trace.segments[0]])
    assert "".join(completions(run)[-1][1]) == material.tokenizer.decode(sequences[0, tokens.shape[1] :])


def test_discovery(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", policy=False)
    assert sections(run) == ["headline", "discover", "texts", "settings"]
    assert [prompt for prompt, _ in completions(run)] == ["ab", "cd"] * 2
    html = (run.path / "report.html").read_text(encoding="utf-8")
    assert "switch F1" not in html
    assert "The trained policy" not in html


@pytest.mark.parametrize("how", ["gone", "environment"])
def test_what_cannot_be_completed_is_left_out(how: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", **({"environment": "a.Box"} if how == "environment" else {}))
    if how == "gone":
        (tmp_path / "rows.jsonl").unlink()
    assert sections(run) == ["headline", "reinforce", "settings"]
