"""Exploration in codes and in tokens: what is written when temperatures go up.

    python benchmarks/temperature.py --bases FOLDER --adapters FOLDER [--seeds 0 1 …] [--output FILE] [--plot FILE]

FOLDER/seedN are the models of `benchmarks/code_base.py --keep` and the adapters of `benchmarks/code_discovery.py
--keep`. Tokens of the bare base are sampled at temperature T; or codes from N(0, I), times a code temperature, steer
the base, whose tokens are greedy or sampled at a lower T. Each setting is sampled BLOCKS times with 1,000 programs:

    syntax      share that Python can parse
    runs        share that also runs on the tests' inputs
    chains      share that is a whole chain of idioms and nothing else: a valid composition
    distinct    different chains among the 1,000; `new`: those with a transition that the corpus never shows
    solved      of the 1,000, how many pass the tests of the default task of 2, 3, 4, 5 and 6 idioms

Seeds that are not asked for stay in the file as they are. The plot is drawn from the file; with no seeds, that is all
that is done. On one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch are imported

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from spread import spread
from transformers import PreTrainedTokenizerFast

from internalrl.base.fingerprint import base_fingerprint
from internalrl.base.loading import load_base
from internalrl.controller.steered import SteeredModel, bare
from internalrl.domains.code.grammar import PROMPT, CodeConfig, parse
from internalrl.domains.code.sandbox.sandbox import Outcome, Sandbox
from internalrl.domains.code.tasks import CodeTask, hidden_inputs, tasks
from internalrl.domains.code.tokenizer import load_tokenizer
from internalrl.players.stepwise import rollout
from internalrl.reinforce.completions import Completions
from internalrl.run.folder import environment
from internalrl.run.streams import Stream

TOKENS = (0.3, 0.7, 1.0, 1.5)
UNDER_CODES, CODES = (0.0, 0.3, 1.0), (0.5, 1.0, 1.5)
BLOCKS, BLOCK = 4, 1000
MOST = 200
"""Tokens of a completion."""
CODE = CodeConfig()


def write(
    steered: SteeredModel,
    tokenizer: PreTrainedTokenizerFast,
    code_temperature: float,
    temperature: float,
    count: int,
    generator: torch.Generator,
) -> list[str]:
    """`count` completions of `PROMPT` under codes from N(0, I) · code_temperature²."""
    n_z = steered.metacontroller.config.n_z

    def propose(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return code_temperature * torch.randn(len(rows), n_z, generator=generator)

    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    texts = Completions(np.tile(prompt, (count, 1)), [tokenizer.eos_token_id], MOST)
    result = rollout(steered, texts, propose, temperature, generator=generator)
    tokens = [row[:length] for row, length in zip(result.actions.tolist(), result.length.tolist(), strict=True)]
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def solved(outcomes: Sequence[Outcome], asked: dict[int, CodeTask]) -> dict[int, int]:
    """How many programs pass the tests of each task; all tasks have the same inputs."""
    given = [json.dumps(outcome.outputs) for outcome in outcomes if outcome.status == "ran"]
    return {length: given.count(json.dumps(task.outputs)) for length, task in asked.items()}


def judge(completions: list[str], sandbox: Sandbox) -> dict[str, Any]:
    """What there is to say of one block."""
    programs = [PROMPT + completion for completion in completions]
    outcomes = sandbox.run(programs, hidden_inputs())
    readings = [parse(CODE, program) for program in programs]
    chains = {reading.idioms for reading in readings if reading.complete}
    new = [chain for chain in chains if CODE.unseen[list(chain[:-1]), list(chain[1:])].any()]
    return {
        "syntax": np.mean([outcome.status != "syntax" for outcome in outcomes]).item(),
        "runs": np.mean([outcome.status == "ran" for outcome in outcomes]).item(),
        "chains": np.mean([reading.complete for reading in readings]).item(),
        "distinct": len(chains),
        "new": len(new),
        "solved": list(solved(outcomes, tasks(CODE)).values()),
    }


def study(base: Path, adapter: Path, seed: int) -> dict[str, Any]:
    """All settings on one base."""
    model, tokenizer = load_base(base), load_tokenizer(base, CODE)
    plain = bare(model)
    steered = SteeredModel.from_pretrained(model, adapter)
    settings = [(plain, 0.0, temperature) for temperature in TOKENS]
    settings += [(steered, code, temperature) for temperature in UNDER_CODES for code in CODES]
    found = []
    with Sandbox() as sandbox:
        for number, (writer, code, temperature) in enumerate(settings):
            blocks = []
            for block in range(BLOCKS):
                generator = Stream.EVALUATE.torch(seed, number * BLOCKS + block)
                blocks.append(judge(write(writer, tokenizer, code, temperature, BLOCK, generator), sandbox))
            found.append({"sampled": name_of(writer is steered, code), "temperature": temperature, "blocks": blocks})
            print(json.dumps(found[-1]), flush=True)
    return {"seed": seed, "base": base_fingerprint(model)[:16], "settings": found}


def name_of(steered: bool, code_temperature: float) -> str:
    return f"codes × {code_temperature:g}" if steered else "tokens"


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each setting, with the spread over the blocks of all seeds; `solved` in all of them together."""
    rows = []
    for same in zip(*(run["settings"] for run in runs), strict=True):
        blocks = [block for setting in same for block in setting["blocks"]]
        measured = {name: spread([block[name] for block in blocks]) for name in blocks[0] if name != "solved"}
        hits = np.sum([block["solved"] for block in blocks], 0).tolist()
        lengths = map(str, tasks(CODE))
        named = {name: same[0][name] for name in ("sampled", "temperature")}
        solved_of = {"solved": dict(zip(lengths, hits, strict=True)), "programs": len(blocks) * BLOCK}
        rows.append({**named, **measured, **solved_of})
    return rows


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """New compositions against validity: a line for the bare base's tokens, and one for each token temperature."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "internalrl", "font.size": 9, "font.family": "DejaVu Sans"}
    lines = {"tokens of the bare base": ("#D55E00", "s", (0, 6), [row for row in rows if row["sampled"] == "tokens"])}
    looks = ("#0072B2", "o", (-11, -9)), ("#009E73", "^", (8, 3)), ("#CC79A7", "D", (-10, 3))
    for temperature, look in zip(UNDER_CODES, looks, strict=True):
        name = f"codes, tokens at {temperature:g}" if temperature else "codes, greedy tokens"
        own = [row for row in rows if row["sampled"] != "tokens" and row["temperature"] == temperature]
        lines[name] = (*look, own)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for ax, (key, label) in zip(panels, (("syntax", "Python can parse"), ("chains", "are a whole chain of idioms")),
                                    strict=True):  # fmt: skip
            for name, (color, marker, offset, own) in lines.items():
                x, y = ([row[axis]["median"] for row in own] for axis in (key, "new"))
                ax.plot(x, y, color=color, marker=marker, ms=5, lw=1.2, label=name)
                for number, row in enumerate(own):
                    text = f"{row['temperature']:g}" if row["sampled"] == "tokens" else row["sampled"].split()[-1]
                    place = (0, -11) if row["sampled"] == "tokens" and number == 0 else offset
                    options = {"textcoords": "offset points", "size": 7, "color": color, "ha": "center"}
                    ax.annotate(text, (x[number], y[number]), place, **options)
            ax.margins(x=0.08, y=0.08)
            ax.set_xlabel(f"share of programs that {label}")
            ax.grid(color="#e7e9ee")
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("new compositions per 1,000 programs")
        panels[0].legend(frameon=False, loc="upper left")
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else {}, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=Path)
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    root = Path(__file__).parent
    parser.add_argument("--output", type=Path, default=root / "results" / "temperature.json")
    parser.add_argument("--plot", type=Path, default=root.parent / "docs" / "temperature.svg")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        began = time.monotonic()
        run = study(options.bases / f"seed{seed}", options.adapters / f"seed{seed}", seed)
        run |= {"seconds": round(time.monotonic() - began), **environment()}
        stored = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
        runs = sorted([run, *(old for old in stored if old["seed"] != seed)], key=lambda run: run["seed"])
        options.output.write_text(json.dumps({"table": summary(runs), "runs": runs}, indent=1) + "\n")
    plot(json.loads(options.output.read_text())["table"], options.plot)


if __name__ == "__main__":
    main()
