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
from internalrl.analysis.material import Material
from internalrl.analysis.runs import find, open_models, read_summary
from internalrl.files import write_atomic
from internalrl.runlog import RunFolder, read_run
from internalrl.stages import ReportConfig


def main(config: ReportConfig, run: RunFolder) -> dict[str, Any]:
    """Write `run`/report.html from the run's metrics, summary and models; what was not run is left out."""
    began = time.monotonic()
    material = Material(run, read_run(run.path), read_summary(run), open_models(run), config.episodes)
    made = [(name, title, body) for name, title, make in SECTIONS if (body := make(material))]
    page = Template(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    html = page.substitute(
        title=escape(f"Internal RL: {run.path.resolve().name}"),
        nav=" ".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in made),
        sections="\n".join(
            f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>' for name, title, body in made
        ),
    )
    file = run.path / "report.html"
    write_atomic(file, html.encode())
    return {"report": file, "sections": [name for name, _, _ in made], "seconds": time.monotonic() - began}


def headline(m: Material) -> str:
    """The figures of summary.json, as far as they are there."""
    seconds = m.summary.get("seconds")
    stages = seconds.items() if isinstance(seconds, Mapping) else ()
    spent = ", ".join(f"{stage} {duration(value)}" for stage, value in stages if stage != "total")
    items = []
    for name, label, text, form in HEADLINE:
        value = find(m.summary, name)
        shown = "not measured" if value is None else form(value)
        missing = ' class="missing"' if value is None else ""
        text = text or spent or "for all stages"
        items.append(f'<div{missing}><dd class="value">{shown}</dd><dt>{label}</dt><dd>{escape(text)}</dd></div>')
    return f'<dl class="headline">{"".join(items)}</dl>'


def settings(m: Material) -> str:
    """What it takes to repeat the run."""
    made_with = {name: m.stored.get(name) for name in ("seed", "git", "threads", "hardware", "versions")}
    return (
        table(flat(made_with))
        + f"<details><summary>All settings</summary>{table(flat(m.stored['config']))}</details>"
        + f"<details><summary>All results</summary>{table(flat(m.summary))}</details>"
    )


def _percent(value: float) -> str:
    return f"{100 * value:.{1 if 0 < value < 0.1 else 0}f} %"


HEADLINE: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
    ("success", "success of internal RL", "episodes that solve the whole task, which was never demonstrated", _percent),
    ("raw_action_success", "success of raw-action RL", "the same reward and as many episodes, but no codes", _percent),
    ("switch_f1", "switch F1", "agreement of switches with true changes of subgoal, within a step", "{:.3f}".format),
    ("unseen_pass_rate", "unseen transitions", "rate at which random codes pass what was never shown", "{:.2f}".format),
    ("probe_accuracy", "subgoal probe", "accuracy of a linear read-out where the metacontroller acts", "{:.2f}".format),
    ("bayes_gap_nats", "nats above Bayes", "what the base model loses per action to the exact filter", "{:.3f}".format),
    ("episodes", "episodes", "played since discovery, with or without reward", "{:,.0f}".format),
    ("seconds", "computing time", "", duration),
)
"""Name in the summary, what to call it, what it means (the time is told by stage), how to write it."""

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
"""Id, title, and the function that makes the section, or nothing."""
