"""The report: everything a run has shown, in one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import time
from collections.abc import Callable
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from internalrl.analysis.report import markup, sections_code, sections_grid, sections_text
from internalrl.analysis.report.markup import flat, table
from internalrl.analysis.report.material import GridMaterial, Material
from internalrl.analysis.report.programs import ProgramMaterial, code_of, open_programs
from internalrl.analysis.report.runs import find, open_models, open_steered, read_summary
from internalrl.analysis.report.texts import TextMaterial
from internalrl.base.loading import load_base, load_tokenizer
from internalrl.base.trajectory import TrajectoryModel
from internalrl.run.files import write_atomic
from internalrl.run.folder import RunFolder, read_run
from internalrl.settings.stages import ReportConfig

Section = tuple[str, str, Callable[[Any], str]]
"""Id, title, and the function that makes the section, or nothing."""

SECTIONS = {GridMaterial: sections_grid, ProgramMaterial: sections_code, TextMaterial: sections_text}
"""What a run is about, and the module of its HEADLINE and SECTIONS."""


def main(config: ReportConfig, run: RunFolder) -> dict[str, Any]:
    """Write `run`/report.html from the run's metrics, summary and models; what was not run is left out."""
    began = time.monotonic()
    material = open_material(run, config.episodes)
    own = SECTIONS[type(material)]
    listed: list[Section] = [
        ("headline", "In short", lambda m: headline(m, own.HEADLINE)),
        *own.SECTIONS,
        ("settings", "Settings", settings),
    ]
    made = [(name, title, body) for name, title, make in listed if (body := make(material))]
    page = Template(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    html = page.substitute(
        title=escape(f"Internal RL: {run.path.resolve().name}"),
        lead=escape(material.lead),
        nav=" ".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in made),
        sections="\n".join(
            f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>' for name, title, body in made
        ),
    )
    file = run.path / "report.html"
    write_atomic(file, html.encode())
    return {"report": file, "sections": [name for name, _, _ in made], "seconds": time.monotonic() - began}


def open_material(run: RunFolder, episodes: int) -> Material:
    """A run of the grid world, of programs, or of other texts; InternalRLError for damaged files."""
    base, stored, summary = load_base(run.path / "base"), read_run(run.path), read_summary(run)
    if isinstance(base, TrajectoryModel):
        return GridMaterial(run, stored, summary, episodes, open_models(run))
    tokenizer, config = load_tokenizer(run.path / "base"), stored["config"]
    if code := code_of(config, tokenizer):
        return ProgramMaterial(run, stored, summary, episodes, open_programs(run, base, config, code))
    return TextMaterial(run, stored, summary, episodes, base, tokenizer, open_steered(run, base))


def headline(m: Material, items: tuple[markup.Headline, ...]) -> str:
    """The figures of summary.json, as far as they are there."""
    return markup.headline(items, {name: find(m.summary, name) for name, *_ in items}, m.summary.get("seconds"))


def settings(m: Material) -> str:
    """What it takes to repeat the run."""
    made_with = {name: m.stored.get(name) for name in ("seed", "git", "threads", "hardware", "versions")}
    return (
        table(flat(made_with))
        + f"<details><summary>All settings</summary>{table(flat(m.stored['config']))}</details>"
        + f"<details><summary>All results</summary>{table(flat(m.summary))}</details>"
    )
