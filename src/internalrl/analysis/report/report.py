"""The report: everything a run has shown, in one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from internalrl.analysis.report import sections_code, sections_grid, sections_text
from internalrl.analysis.report.formats import duration, flat
from internalrl.analysis.report.material import GridMaterial, Material
from internalrl.analysis.report.page import Headline, Number, Section, Table, render
from internalrl.analysis.report.programs import ProgramMaterial, code_of, open_programs
from internalrl.analysis.report.runs import find, open_models, open_steered, read_summary
from internalrl.analysis.report.sections import Result
from internalrl.analysis.report.texts import TextMaterial
from internalrl.base.loading import load_base, load_tokenizer
from internalrl.base.trajectory import TrajectoryModel
from internalrl.run.files import write_atomic
from internalrl.run.folder import RunFolder, read_run
from internalrl.settings.stages import ReportConfig

SECTIONS = {GridMaterial: sections_grid, ProgramMaterial: sections_code, TextMaterial: sections_text}
"""What a run is about, and the module of its HEADLINE and SECTIONS."""


def main(config: ReportConfig, run: RunFolder) -> dict[str, Any]:
    """Write `run`/report.html from the run's metrics, summary and models; what was not run is left out."""
    began = time.monotonic()
    material = open_material(run, config.episodes)
    own = SECTIONS[type(material)]
    made = [headline(material, own.HEADLINE), *(make(material) for make in own.SECTIONS), settings(material)]
    sections = [section for section in made if section]
    file = run.path / "report.html"
    write_atomic(file, render(f"Internal RL: {run.path.resolve().name}", material.lead, sections).encode())
    names = [section.name for section in sections]
    return {"report": file, "sections": names, "seconds": time.monotonic() - began}


def open_material(run: RunFolder, episodes: int) -> Material:
    """A run of the grid world, of programs, or of other texts; InternalRLError for damaged files."""
    base, stored, summary = load_base(run.path / "base"), read_run(run.path), read_summary(run)
    if isinstance(base, TrajectoryModel):
        return GridMaterial(run, stored, summary, episodes, open_models(run))
    tokenizer, config = load_tokenizer(run.path / "base"), stored["config"]
    if code := code_of(config, tokenizer):
        return ProgramMaterial(run, stored, summary, episodes, open_programs(run, base, config, code))
    return TextMaterial(run, stored, summary, episodes, base, tokenizer, open_steered(run, base))


def headline(m: Material, results: Sequence[Result]) -> Section:
    """The figures of summary.json, as far as they are there; the computing time is told by stage."""
    seconds = m.summary.get("seconds")
    stages = seconds.items() if isinstance(seconds, Mapping) else ()
    spent = ", ".join(f"{stage} {duration(value)}" for stage, value in stages if stage != "total")
    numbers: list[Number] = []
    for name, label, text, form in results:
        value = find(m.summary, name)
        numbers.append((None if value is None else form(value), label, text or spent or "for all stages"))
    return Section("headline", "In short", parts=[Headline(numbers)])


def settings(m: Material) -> Section:
    """What it takes to repeat the run."""
    made_with = {name: m.stored.get(name) for name in ("seed", "git", "threads", "hardware", "versions")}
    tables = [
        Table([*flat(made_with)]),
        Table([*flat(m.stored["config"])], folded="All settings"),
        Table([*flat(m.summary)], folded="All results"),
    ]
    return Section("settings", "Settings", parts=tables)
