"""How often do random codes solve a task, and how often would the bare base's own tokens?

    python benchmarks/code_chance.py --bases FOLDER --adapters FOLDER [--seeds 0 1 …] [--chain IDIOM …] [--output FILE]

FOLDER/seedN are the models of `benchmarks/code_base.py --keep` and the adapters of `benchmarks/code_discovery.py
--keep`. For each of the default tasks, of 2 to 6 idioms, or of those that the beginnings of another chain make:

    tokens      the bare base's probability to write a program that passes the task's tests, at several temperatures:
                summed over all chains of up to six idioms that do what the task's chain does (`solves`), and over the
                task's own chain alone (`chain`), in all forms and names
    codes       the probability that codes from N(0, I) make the steered base write the task's own chain (`chain`),
                by multilevel splitting, the mean of REPEATS independent estimates; and of PLAIN programs that were
                simply sampled, how many pass the tests (`hits`)
    ratio       codes' `chain` to tokens' `solves` at temperature 1, with a 95 % interval; and `ratio_chain`, to `chain`

`check` compares importance sampling, which long chains need, with the exact sum on chains of 2 to 5 idioms. One thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch are imported

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from spread import spread
from temperature import CODE, solved, write
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from internalrl.base.fingerprint import base_fingerprint
from internalrl.base.loading import load_base
from internalrl.base.scoring import completion_log_probs
from internalrl.base.text_data import tokenise
from internalrl.controller.steered import SteeredModel
from internalrl.domains.code.chance import Chance, Score, chain_chance, equivalents
from internalrl.domains.code.grammar import END, PROMPT
from internalrl.domains.code.idioms import variants
from internalrl.domains.code.sandbox.sandbox import Sandbox
from internalrl.domains.code.tasks import CHAINS, CodeTask, hidden_inputs, make_task
from internalrl.domains.code.tokenizer import load_tokenizer
from internalrl.reinforce.splitting import Tokens, write_chances
from internalrl.run.folder import environment
from internalrl.run.streams import Stream

TEMPERATURES = (0.3, 0.7, 1.0, 1.5)
CODE_TOKENS = (0.0, 0.3)
"""Temperatures of the tokens under codes."""
LONGEST = 6
"""Idioms of the longest programs that are looked for."""
REPEATS, TOGETHER, PLAIN = 6, 512, 4096


def scorer(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Score:
    """Log-probabilities (N, len(TEMPERATURES)) of completions when tokens are sampled at each temperature."""

    def score(completions: Sequence[str]) -> NDArray[np.float64]:
        rows = [{"prompt": PROMPT, "completion": completion} for completion in completions]
        return completion_log_probs(base, tokenise(rows, tokenizer, base.config), TEMPERATURES)

    return score


def by_tokens(score: Score, asked: dict[int, CodeTask], seed: int) -> dict[int, dict[str, Any]]:
    """For each task, the chance of its own chain and of all that solve it, and how many chains those are."""
    rng, found = Stream.EVALUATE.numpy(seed), {}
    for length, task in asked.items():
        chains = equivalents(CODE, task, LONGEST)
        chances = {chain: chain_chance(CODE, chain, score, rng) for chain in chains}
        by_chain = sorted(chances, key=lambda chain: -chances[chain].value[TEMPERATURES.index(1.0)])
        found[length] = {
            "solves": Chance.total(list(chances.values())),
            "chain": chances[task.chain],
            "chains": len(chains),
            "likeliest": by_chain[0],
        }
    return found


def check(score: Score, asked: dict[int, CodeTask], seed: int) -> dict[int, dict[str, float]]:
    """Importance sampling of the tasks' own chains against the sums, at temperature 1."""
    rng, column, found = Stream.EVALUATE.numpy(seed, 1), TEMPERATURES.index(1.0), {}
    for length in (2, 3, 4, 5):
        chain = asked[length].chain
        exact = chain_chance(CODE, chain, score, rng, most=100_000)
        estimate = chain_chance(CODE, chain, score, rng, most=0)
        found[length] = {
            "exact": exact.value[column],
            "estimate": estimate.value[column],
            "standard_error": estimate.error[column],
        }
    return found


def by_codes(
    steered: SteeredModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: dict[int, CodeTask],
    temperature: float,
    seed: int,
) -> dict[int, dict[str, Any]]:
    """For each task, what splitting estimates, and the hits among plain samples."""

    def encode(text: str) -> Tokens:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    parts = [{encode(variant.text) for form in variants(name) for variant in form} for name in asked[LONGEST].chain]
    last = (*encode(END), tokenizer.eos_token_id)
    generators = [Stream.FREE_PLAY.torch(seed, 1 + repeat) for repeat in range(REPEATS)]
    estimates = np.array(
        [write_chances(steered, encode(PROMPT), parts, last, TOGETHER, own, temperature) for own in generators]
    )
    generator, hits = Stream.FREE_PLAY.torch(seed), Counter[int]()
    with Sandbox() as sandbox:
        for _ in range(PLAIN // 1024):
            completions = write(steered, tokenizer, 1.0, temperature, 1024, generator)
            outcomes = sandbox.run([PROMPT + text for text in completions], hidden_inputs())
            hits.update(solved(outcomes, asked))
    return {
        length: {
            "chain": estimates[:, length - 1].mean(),
            "standard_error": stats.sem(estimates[:, length - 1]),
            "estimates": estimates[:, length - 1].tolist(),
            "hits": hits[length],
            "of": PLAIN,
        }
        for length in asked
    }


def ratio(codes: dict[str, Any], tokens: Chance) -> list[float]:
    """Lower end, estimate and upper end, 95 %, of codes' chance over tokens' at temperature 1.

    Errors are taken as those of logarithms, and those of the few repeats by Student's t.
    """
    column = TEMPERATURES.index(1.0)
    if not codes["chain"]:
        return [0.0, 0.0, math.inf]
    relative = math.hypot(codes["standard_error"] / codes["chain"], tokens.error[column] / tokens.value[column])
    middle, reach = codes["chain"] / tokens.value[column], stats.t.ppf(0.975, REPEATS - 1) * relative
    return [middle * math.exp(-reach), middle, middle * math.exp(reach)]


def compare(base: Path, adapter: Path, chain: Sequence[str], seed: int) -> dict[str, Any]:
    """Tokens and codes on one base."""
    model, tokenizer = load_base(base), load_tokenizer(base, CODE)
    score = scorer(model, tokenizer)
    asked = {length: make_task(CODE, chain[:length]) for length in range(2, LONGEST + 1)}
    tokens, checked = by_tokens(score, asked, seed), check(score, asked, seed)
    steered, found = SteeredModel.from_pretrained(model, adapter), {}
    codes = {temperature: by_codes(steered, tokenizer, asked, temperature, seed) for temperature in CODE_TOKENS}
    for length, own in tokens.items():
        kinds = ("solves", "chain")
        found[length] = {
            "tokens": {
                **{kind: dict(zip(TEMPERATURES, own[kind].value.tolist(), strict=True)) for kind in kinds},
                **{f"{kind}_error": own[kind].error[TEMPERATURES.index(1.0)] for kind in kinds},
                "chains": own["chains"],
                "likeliest": own["likeliest"],
            },
            "codes": {temperature: codes[temperature][length] for temperature in CODE_TOKENS},
            "ratio": {temperature: ratio(codes[temperature][length], own["solves"]) for temperature in CODE_TOKENS},
            "ratio_chain": {
                temperature: ratio(codes[temperature][length], own["chain"]) for temperature in CODE_TOKENS
            },
        }
    return {
        "seed": seed,
        "chain": list(chain),
        "base": base_fingerprint(model)[:16],
        "lengths": found,
        "check": checked,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--chain", nargs=LONGEST, default=CHAINS[CODE.idioms])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "code_chance.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        began = time.monotonic()
        run = compare(options.bases / f"seed{seed}", options.adapters / f"seed{seed}", options.chain, seed)
        run |= {"seconds": round(time.monotonic() - began), **environment()}
        stored = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
        others = [old for old in stored if (old["chain"], old["seed"]) != (run["chain"], seed)]
        runs = json.loads(json.dumps([*others, run]))  # numbers that are names become text
        runs.sort(key=lambda run: (run["chain"], run["seed"]))
        ratios = {" ".join(chain): summary(list(same)) for chain, same in groupby(runs, lambda run: run["chain"])}
        options.output.write_text(json.dumps({"ratios": ratios, "runs": runs}, indent=1) + "\n")


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Both ratios by length and token temperature, with their spread over seeds."""
    return {
        name: {
            length: {
                temperature: spread([run["lengths"][length][name][temperature][1] for run in runs], 0)
                for temperature in map(str, CODE_TOKENS)
            }
            for length in runs[0]["lengths"]
        }
        for name in ("ratio", "ratio_chain")
    }


if __name__ == "__main__":
    main()
