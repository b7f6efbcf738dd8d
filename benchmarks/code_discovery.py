"""Stage 2 on the code domain: do switches fall where idioms end, and does a code write its idiom after any other?

    python benchmarks/code_discovery.py [--bases FOLDER] [--seeds 0 1] [--variant NAME] [--keep FOLDER] [--output FILE]

FOLDER/seedN is the language model of seed N, as `benchmarks/code_base.py --keep FOLDER` leaves it; without --bases it
is trained first. `base` in the file is the beginning of its fingerprint, so that runs on the same model can be told.
--keep saves the adapters as FOLDER/seedN. Discovery and consolidation are those of `internalrl discover --preset text
--domain code`. Each run is measured before and after consolidation on held-out programs; a run that the file has
already is replaced, others are kept. Variants:

    text        the preset
    inferred    the encoder sees slow features of what the base has inferred, as on the grid; discovery alone
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch are imported

import numpy as np
import torch
from code_base import train
from spread import spread

from internalrl.base.fingerprint import base_fingerprint
from internalrl.base.loading import load_base
from internalrl.base.pretrain_text import completion_nll
from internalrl.base.text_data import tokenise
from internalrl.controller.steered import SteeredModel
from internalrl.discovery.consolidate import consolidate
from internalrl.discovery.programs import CodeDomain
from internalrl.discovery.text import TextMaterial
from internalrl.discovery.train import discover
from internalrl.domains.code.grammar import PROMPT, CodeConfig, log_prob, sample_programs
from internalrl.domains.code.tokenizer import load_tokenizer
from internalrl.run.folder import RunFolder, environment
from internalrl.run.streams import Stream
from internalrl.settings.options import PRESETS
from internalrl.settings.schema import from_dict
from internalrl.settings.stages import DiscoverConfig, PretrainTextConfig

PROGRAMS, HELD_OUT = 6000, 1024
VARIANTS: dict[str, dict[str, Any]] = {
    "text": {},
    "inferred": {
        "metacontroller": {"view": "inferred", "slow_features": 8},
        "slow_lag": 4,
        "consolidate": {"enabled": False},
    },
}
SPREAD = ("switch_f1", "forced_corpus", "forced_unseen", "forced_whole", "random_runs")


def learn(base: Path, variant: str, seed: int, keep: Path | None) -> dict[str, Any]:
    """Discover and consolidate on one base; what was measured, and the seconds."""
    preset = from_dict(DiscoverConfig, PRESETS["text"]["discover"])
    config, code = from_dict(DiscoverConfig, VARIANTS[variant], base=preset), CodeConfig()
    model, tokenizer = load_base(base), load_tokenizer(base, code)
    programs = sample_programs(code, PROGRAMS, Stream.DISCOVER.numpy(seed)).completions
    rows = [{"prompt": PROMPT, "completion": completion} for completion in programs]
    material = TextMaterial(tokenise(rows, tokenizer, model.config), seed, CodeDomain(code, tokenizer))
    torch.manual_seed(seed)
    steered = SteeredModel.from_base(model, config.metacontroller)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", {}, seed=seed)
        seconds = {"discover": discover(steered, material, config, run).seconds}
        found = {"discovered": material.measure(steered)}
        if config.consolidate.enabled:
            seconds |= consolidate(steered, material, config.consolidate, run)
            found["consolidated"] = material.measure(steered)
        if keep is not None:
            steered.save_pretrained(keep / f"seed{seed}", {"discover": {"seed": seed, "variant": variant}})
        codes = run.metrics("rehearse" if config.consolidate.enabled else "discover")[-1]
    held_out = sample_programs(code, HELD_OUT, Stream.HELD_OUT.numpy(seed))
    rows = [{"prompt": PROMPT, "completion": completion} for completion in held_out.completions]
    nll = completion_nll(model, tokenise(rows, tokenizer, model.config))
    return {
        "variant": variant,
        "seed": seed,
        "base": base_fingerprint(model)[:16],
        "base_gap_nats": float(np.mean(nll + [log_prob(code, program) for program in held_out.texts])),
        **found,
        "last_step": codes,
        "seconds": seconds,
        **environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variant", choices=VARIANTS, default="text")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "code_discovery.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            bases = options.bases or Path(folder)
            if options.bases is None:
                train(PretrainTextConfig(), CodeConfig(), seed, keep=bases)
            run = learn(bases / f"seed{seed}", options.variant, seed, options.keep)
        print(json.dumps({**run, "all_seconds": round(time.monotonic() - began)}), flush=True)
        stored = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
        others = [old for old in stored if (old["variant"], old["seed"]) != (options.variant, seed)]
        runs = sorted([*others, run], key=lambda run: (run["variant"], run["seed"]))
        last = [r["consolidated"] for r in runs if r["variant"] == "text"]
        result = {**{name: spread([found[name] for found in last]) for name in SPREAD if last}, "runs": runs}
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
