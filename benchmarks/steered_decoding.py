"""Tokens per second of a steered language model, beside the bare model and an unmerged LoRA of PEFT.

    python benchmarks/steered_decoding.py [--repeats R] [--new-tokens N] [--output FILE]

A random Llama of 134 million parameters, batch 8, greedy, whole calls of `generate`, the prompt included. Each repeat
times the three one after the other, in turn of order; ratios are taken within a repeat. The adapter has the default
sizes and a policy. The LoRA is PEFT's default for a Llama: rank 8 on the query and value projections.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from spread import spread
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from internalrl.controller.policy import Policy
from internalrl.controller.steered import SteeredModel
from internalrl.run.folder import environment
from internalrl.settings.stages import MetacontrollerConfig

BATCH, PROMPT = 8, 32
SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


def llama(device: str) -> PreTrainedModel:
    """The same random model at every call; in bfloat16 on a GPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0)).to(device, dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def contestants(device: str) -> tuple[SteeredModel, dict[str, Callable[..., Any]]]:
    """What is timed, by name."""
    base = llama(device)
    steered = SteeredModel.from_base(base, MetacontrollerConfig())
    width, n_z = steered.metacontroller.width, steered.metacontroller.config.n_z
    steered.policy = Policy(width, n_z, hidden=64, initial_std=1.0).to(device)
    lora = peft.get_peft_model(llama(device), peft.LoraConfig(task_type="CAUSAL_LM")).eval()
    return steered, {"bare": base.generate, "steered": steered.generate, "lora": lora.generate}


def seconds_of(generate: Callable[..., Any], tokens: torch.Tensor, count: int) -> float:
    began = time.perf_counter()
    length = generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count).shape[1]
    if tokens.is_cuda:
        torch.cuda.synchronize()
    assert length == PROMPT + count
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed repeats")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens per sequence")
    results = Path(__file__).parent / "results" / "steered_decoding.json"
    parser.add_argument("--output", type=Path, default=results, help="where the JSON goes")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    steered, calls = contestants(device)
    tokens = torch.randint(3, SIZES["vocab_size"], (BATCH, PROMPT)).to(device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for call in calls.values():  # untimed
        seconds_of(call, tokens, 4)
    for repeat in range(args.repeats):
        for name in (*names[repeat % 3 :], *names[: repeat % 3]):
            seconds[name].append(seconds_of(calls[name], tokens, args.new_tokens))

    rates = {name: BATCH * args.new_tokens / np.array(values) for name, values in seconds.items()}
    result = {
        "command": " ".join(["python", *sys.argv]),
        "device": device,
        "repeats": args.repeats,
        "batch_size": BATCH,
        "prompt_tokens": PROMPT,
        "new_tokens": args.new_tokens,
        "parameters": {
            "base": sum(p.numel() for p in steered.base.parameters()),
            "adapter": sum(p.numel() for p in steered.adapter.parameters()),
        },
        "tokens_per_second": {name: spread(values) for name, values in rates.items()},
        "ratio_to_bare": {name: spread(rates[name] / rates["bare"]) for name in ("steered", "lora")},
        "peft": peft.__version__,
        **environment(),
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("tokens_per_second", "ratio_to_bare")}, indent=2))


if __name__ == "__main__":
    main()
