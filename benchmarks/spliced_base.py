"""The base finetuned on the texts that consolidation learns from, so that token-level RL has what internal RL had.

    python benchmarks/spliced_base.py --base FOLDER --adapter FOLDER --keep FOLDER [--steps S] [--seed S]

The texts are those of rehearsal: half of them programs of the corpus, half spliced from segments that the adapter cuts,
kept if they run. The loop is stage 1's. Measured before and after, on programs sampled at T = 1: how many run, how many
are idioms alone, and how many of the transitions between idioms are unseen in the corpus. On one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch are imported

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from internalrl.base.pretrain_text import pretrain_text, save_language_model
from internalrl.base.text_data import Examples, tokenise
from internalrl.controller.steered import SteeredModel
from internalrl.discovery.programs import CodeDomain
from internalrl.discovery.text import TextMaterial
from internalrl.domains.code.grammar import PROMPT, CodeConfig, parse, sample_programs
from internalrl.domains.code.sandbox.sandbox import Sandbox
from internalrl.domains.code.tasks import hidden_inputs
from internalrl.run.folder import RunFolder, environment
from internalrl.run.streams import Stream
from internalrl.settings.stages import PretrainTextConfig, RehearseConfig

CODE, SAMPLES = CodeConfig(), 1024
REHEARSE = RehearseConfig(batches=60, batch_size=128)
"""7,680 programs, as the preset for texts has them."""


def spliced(steered: SteeredModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> Examples:
    """Whole and spliced programs, as rehearsal has them."""
    corpus = sample_programs(CODE, REHEARSE.batches * REHEARSE.batch_size * 10 // 9, Stream.DISCOVER.numpy(seed))
    examples = tokenise(corpus.rows, tokenizer, steered.base.config)
    material = TextMaterial(examples, seed, CodeDomain(CODE, tokenizer))
    completions = [
        tokenizer.decode(tokens[mask].tolist(), skip_special_tokens=True)
        for rehearsal in material.rehearsals(steered, REHEARSE, steered.metacontroller)
        for tokens, mask in zip(rehearsal.episodes.actions, rehearsal.episodes.mask, strict=True)
    ]
    rows = [{"prompt": PROMPT, "completion": completion} for completion in completions]
    return tokenise(rows, tokenizer, steered.base.config)


def sampled(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, float]:
    """What the model writes at T = 1."""
    torch.manual_seed(seed)
    prompts = torch.tensor([tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]).expand(SAMPLES, -1)
    tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=160)
    programs = tokenizer.decode(tokens, skip_special_tokens=True)
    with Sandbox() as sandbox:
        outcomes = sandbox.run(programs, hidden_inputs())
    readings = [parse(CODE, program) for program in programs]
    steps = [CODE.unseen[a, b] for reading in readings for a, b in pairwise(reading.idioms)]
    return {
        "run": sum(outcome.status == "ran" for outcome in outcomes) / SAMPLES,
        "idioms": sum(reading.complete for reading in readings) / SAMPLES,
        "unseen_transitions": round(float(sum(steps) / len(steps)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "spliced_base.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = AutoModelForCausalLM.from_pretrained(options.base)
    result: dict[str, Any] = {"seed": options.seed, "steps": options.steps, "before": sampled(model, tokenizer, 0)}
    steered = SteeredModel.from_pretrained(AutoModelForCausalLM.from_pretrained(options.base), options.adapter)
    with torch.no_grad():
        examples = spliced(steered, tokenizer, options.seed)
    config = PretrainTextConfig(steps=options.steps, lr=1e-3, muon_lr=0.005)
    with tempfile.TemporaryDirectory() as folder:
        loop = pretrain_text(model, examples, config, RunFolder.create(Path(folder) / "run", {}, seed=options.seed))
    save_language_model(model, tokenizer, options.keep)
    result |= {"programs": len(examples), "seconds": round(loop.seconds), "after": sampled(model, tokenizer, 0)}
    options.output.write_text(json.dumps({**result, "config": vars(config), **environment()}, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
