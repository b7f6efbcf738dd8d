"""Stage 1 on the code domain: small language models against the exact entropy of their corpus, on one thread.

    python benchmarks/code_base.py [--seeds 0 1 …] [--steps S] [--keep FOLDER] [--bases FOLDER] [--output FILE]

For each seed a Llama of 4 × 128 learns fresh programs. Measured on programs that it has not seen: its NLL per program
above the grammar's own on the same programs (`gap_nats`), which is the KL divergence between the two; and, of programs
sampled at a temperature, how many parse and run on a task's inputs (`run`), and how many are a chain of idioms and
nothing else (`idioms`). `--keep` saves models and tokenizers as FOLDER/seed0 and so on. With `--bases` models that were
trained before, as by `internalrl demo code`, are measured instead. Seeds that are not asked for stay in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch are imported

import numpy as np
import torch
from scipy.stats import sem
from spread import spread
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from internalrl.base.fingerprint import base_fingerprint
from internalrl.base.loading import load_base
from internalrl.base.pretrain_text import build_language_model, completion_nll, pretrain_text, save_language_model
from internalrl.base.text_data import Examples, tokenise
from internalrl.domains.code.grammar import PROMPT, CodeConfig, Programs, entropy, log_prob, parse, sample_programs
from internalrl.domains.code.sandbox.sandbox import Sandbox
from internalrl.domains.code.tasks import hidden_inputs
from internalrl.domains.code.tokenizer import build_tokenizer, load_tokenizer
from internalrl.run.folder import RunFolder, environment
from internalrl.run.streams import Stream
from internalrl.settings.stages import PretrainTextConfig

HELD_OUT, SAMPLES = 2048, 2048
TEMPERATURES = (0.3, 0.7, 1.0)


def examples_of(programs: Programs, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Examples:
    rows = [{"prompt": PROMPT, "completion": completion} for completion in programs.completions]
    return tokenise(rows, tokenizer, model.config)


def train(config: PretrainTextConfig, code: CodeConfig, seed: int, keep: Path | None) -> dict[str, Any]:
    """Train one model, save it to `keep`, and measure it."""
    tokenizer = build_tokenizer(code)
    torch.manual_seed(seed)
    model = build_language_model(config, tokenizer)
    corpus = sample_programs(code, config.steps * config.batch_size, Stream.PRETRAIN.numpy(seed))
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", {}, seed=seed)
        loop = pretrain_text(model, examples_of(corpus, model, tokenizer), config, run)
    if keep is not None:
        save_language_model(model, tokenizer, keep / f"seed{seed}")
    return {"seconds": round(loop.seconds), **measure(model, tokenizer, code, seed)}


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, code: CodeConfig, seed: int) -> dict[str, Any]:
    """On programs that the model has not seen, and on those that it writes."""
    held_out = sample_programs(code, HELD_OUT, Stream.HELD_OUT.numpy(seed))
    nll = completion_nll(model, examples_of(held_out, model, tokenizer))
    gap = nll + [log_prob(code, program) for program in held_out.texts]
    return {
        "base": base_fingerprint(model)[:16],
        "nll_nats": round(float(nll.mean()), 4),
        "gap_nats": round(float(gap.mean()), 4),
        "gap_standard_error": round(float(sem(gap)), 4),
        "sampled": {str(temperature): sampled(model, tokenizer, code, temperature) for temperature in TEMPERATURES},
    }


def sampled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, code: CodeConfig, temperature: float
) -> dict[str, float]:
    """How many sampled programs run, and how many are idioms alone."""
    prompts = torch.tensor([tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]).expand(SAMPLES, -1)
    options = {"do_sample": True, "temperature": temperature, "top_k": 0, "max_new_tokens": 200}
    tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    programs = tokenizer.decode(tokens, skip_special_tokens=True)
    with Sandbox() as sandbox:
        outcomes = sandbox.run(programs, hidden_inputs())
    return {
        "run": np.mean([outcome.status == "ran" for outcome in outcomes]).item(),
        "idioms": np.mean([parse(code, program).complete for program in programs]).item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=PretrainTextConfig.steps)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--bases", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "code_base.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config, code = PretrainTextConfig(steps=options.steps), CodeConfig()
    for seed in options.seeds:
        began = time.monotonic()
        if options.bases is None:
            found = {"config": vars(config), **train(config, code, seed, options.keep)}
        else:
            folder = options.bases / f"seed{seed}"
            found = measure(load_base(folder), load_tokenizer(folder, code), code, seed)
        run = {"seed": seed, "command": " ".join(["python", *sys.argv]), **found, **environment()}
        print(json.dumps({**run, "all_seconds": round(time.monotonic() - began)}), flush=True)
        stored = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
        runs = sorted([run, *(old for old in stored if old["seed"] != seed)], key=lambda run: run["seed"])
        result = {
            "entropy_nats": round(entropy(code), 4),
            "gap_nats": spread([run["gap_nats"] for run in runs]),
            "runs_at_0.7": spread([run["sampled"]["0.7"]["run"] for run in runs]),
            "runs": runs,
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
