"""The report: everything a run has shown, in one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from internalrl.analysis import sections
from internalrl.analysis.markup import duration, flat, table
from internalrl.analysis.runs import open_models, read_summary
from internalrl.analysis.sections import Material
from internalrl.files import write_atomic
from internalrl.runlog import RunFolder, read_run
from internalrl.stages import ReportConfig


def main(config: ReportConfig, run: RunFolder) -> dict[str, Any]:
    """Write `run`/report.html from the run's metrics and models; a stage that was not run is left out."""
    began = time.monotonic()
    material = Material(run, read_run(run.path), read_summary(run), open_models(run), config.episodes)
    sections = [(name, title, body) for name, title, make in SECTIONS if (body := make(material))]
    name = run.path.resolve().name
    page = Template(files(__package__).joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"Internal RL: {name}"),
        lead="A sequence model learned to imitate an expert whose goals it is never told. What it worked out about them "
        "was then made into actions of a higher order, and reinforcement learning was done on those.",
        nav=" ".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections),
        sections="\n".join(
            f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>' for name, title, body in sections
        ),
    )
    file = run.path / "report.html"
    write_atomic(file, page.encode())
    return {
        "report": file,
        "sections": [name for name, _, _ in sections],
        "seconds": time.monotonic() - began,
    }


def headline(material: Material) -> str:
    """The figures of summary.json, as far as they are there."""

    def percent(value: float) -> str:
        return f"{100 * value:.{1 if 0 < value < 0.1 else 0}f} %"

    cards: list[tuple[str, str, str, Callable[[Any], str]]] = [
        ("success", "success of internal RL", "episodes of the post-training task that the trained policy solves", percent),
        ("raw_action_success", "success of raw-action RL", "the same reward and number of episodes, without codes", percent),
        ("switch_f1", "switch F1", "switches against true changes of subgoal, ±1 step, found without labels", "{:.3f}".format),
        ("unseen_pass_rate", "unseen transitions", "how often random codes pass one that no demonstration shows", "{:.2f}".format),
        ("probe_accuracy", "subgoal probe", "accuracy of a linear read-out at the controlled layer", "{:.2f}".format),
        ("bayes_gap_nats", "above Bayes", "nats per action that the base model loses to the exact filter", "{:.3f}".format),
        ("episodes", "episodes", "played since discovery", "{:,.0f}".format),
        ("seconds", "time", _stages_text(material.summary.get("seconds")), duration),
    ]  # fmt: skip
    items = []
    for key, label, text, form in cards:
        value = material.summary.get(key)
        shown = "not measured" if value is None else form(value)
        missing = ' class="missing"' if value is None else ""
        items.append(f'<div{missing}><dd class="value">{shown}</dd><dt>{label}</dt><dd>{text}</dd></div>')
    return f'<dl class="headline">{"".join(items)}</dl>'


def settings(material: Material) -> str:
    stored = material.stored
    told = {name: stored.get(name) for name in ("seed", "git", "threads", "hardware", "versions")}
    return (
        table(flat(told))
        + f"<details><summary>All settings</summary>{table(flat(stored['config']))}</details>"
        + f"<details><summary>summary.json</summary>{table(flat(material.summary))}</details>"
    )


def _stages_text(seconds: float | Mapping[str, float] | None) -> str:
    stages = seconds.items() if isinstance(seconds, Mapping) else ()
    return ", ".join(f"{escape(stage)} {duration(value)}" for stage, value in stages) or "for training"


SECTIONS: tuple[tuple[str, str, Callable[[Material], str]], ...] = (
    ("headline", "In short", headline),
    ("pretrain", "Stage 1: the base model", sections.pretraining),
    ("discover", "Stage 2: discovery", sections.discovery),
    ("consolidate", "Stage 2b: consolidation", sections.consolidation),
    ("codes", "What the codes do", sections.codes),
    ("reinforce", "Stage 3: internal RL", sections.reinforcement),
    ("episodes", "Episodes", sections.pictures),
    ("settings", "Settings", settings),
)
