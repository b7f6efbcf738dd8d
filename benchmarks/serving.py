"""Tokens per second of the serving engine: steered and unsteered, many streams and one; how fast adapters come.

    python benchmarks/serving.py [--repeats R] [--new-tokens N] [--output FILE]

A random Llama of 54 million parameters; 16 prompts of 32 tokens; whole answers, from the first request submitted to the
last event read, prompts included. The adapters have the default sizes and a policy, and a switch that opens a segment
at about every eighth token. Each repeat runs the kinds one after the other, forwards or backwards in turn, on the same
engine; ratios are taken within a repeat:

    steered     16 streams of one adapter
    unsteered   16 streams of the bare base
    mixed       16 streams, four adapters in turn
    alone       two streams, one after the other, an adapter each

Then, as many times, while 16 mixed streams are running, an adapter is loaded from its folder into the engine and
another one is taken away; the time is until requests can name the new one, and the old one no more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from spread import spread
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from internalrl.controller.policy import Policy
from internalrl.controller.steered import SteeredModel
from internalrl.players.engine.engine import Engine, EngineConfig
from internalrl.players.engine.requests import Request
from internalrl.run.folder import environment
from internalrl.settings.stages import MetacontrollerConfig

STREAMS, PROMPT, ADAPTERS, ALONE = 16, 32, 4, 2
SIZES = {
    "vocab_size": 16_000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
}
SWITCHES = 1 / 8


def llama(device: str) -> PreTrainedModel:
    """Random; in bfloat16 on a GPU. It never ends by itself."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=None, eos_token_id=None)).to(device, dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """A text for every token: bytes, and pairs of letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [*alphabet, *(a + b for a in alphabet for b in alphabet)][: SIZES["vocab_size"]]
    words = Tokenizer(models.WordLevel({text: number for number, text in enumerate(texts)}, texts[0]))
    words.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def save_adapter(base: PreTrainedModel, folder: Path, seed: int) -> None:
    """A random adapter whose switch opens a segment at a share `SWITCHES` of the tokens."""
    torch.manual_seed(seed)
    steered = SteeredModel.from_base(base, MetacontrollerConfig())
    meta = steered.metacontroller
    steered.policy = Policy(meta.width, meta.config.n_z, hidden=64, initial_std=1.0).to(base.device)
    with torch.no_grad():
        meta.switch_head.weight.normal_()
        x = meta.read(steered.residual(torch.randint(SIZES["vocab_size"], (16, 64), device=base.device)))
        held = torch.randn(16, 64, meta.config.n_z, device=base.device)
        logit = meta.segment(x, meta.summarise(x), held, "soft").logit
        meta.switch_head.bias -= logit.quantile(1 - SWITCHES)
    steered.save_pretrained(folder)


def requests(keys: list[str | None], count: int, tokens: int, seed: int) -> list[Request]:
    numbers = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (count, PROMPT)).tolist()
    return [
        Request(tuple(prompt), keys[row % len(keys)], max_tokens=tokens, seed=row) for row, prompt in enumerate(numbers)
    ]


def rate(engine: Engine, wanted: list[Request], together: bool) -> float:
    """Generated tokens per second."""
    began = time.perf_counter()
    groups = [wanted] if together else [[request] for request in wanted]
    for group in groups:
        for stream in [engine.submit(request) for request in group]:
            *events, _ = stream
            assert len(events) == stream.request.max_tokens
    return sum(request.max_tokens for request in wanted) / (time.perf_counter() - began)


def swap(engine: Engine, running: list[Request], folder: Path, new: str, old: str) -> float:
    """Milliseconds that it takes to exchange adapter `old` for that in `folder`, while requests are `running`."""
    streams = [engine.submit(request) for request in running]
    for stream in streams:
        next(iter(stream))
    began = time.perf_counter()
    engine.add_adapter(new, folder)
    engine.remove_adapter(old)
    milliseconds = 1000 * (time.perf_counter() - began)
    assert engine.stats().running == len(streams)
    for stream in streams:
        stream.cancel()
    while engine.stats().running:
        time.sleep(0.001)
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed repeats")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens per stream")
    results = Path(__file__).parent / "results" / "serving.json"
    parser.add_argument("--output", type=Path, default=results, help="where the JSON goes")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, keys = llama(device), [f"adapter-{number}" for number in range(ADAPTERS)]
    kinds: dict[str, tuple[list[str | None], int, bool]] = {
        "steered": ([keys[0]], STREAMS, True),
        "unsteered": ([None], STREAMS, True),
        "mixed": ([*keys], STREAMS, True),
        "alone": ([*keys], ALONE, False),
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    swaps: list[float] = []
    pointers = [parameter.data_ptr() for parameter in base.parameters()]
    with tempfile.TemporaryDirectory() as folder, Engine(base, tokenizer(), EngineConfig(slots=STREAMS)) as engine:
        for number, key in enumerate(keys):
            save_adapter(base, Path(folder) / key, number)
            engine.add_adapter(key, Path(folder) / key)
        engine.add_adapter("new--1", Path(folder) / keys[0])
        for who, count, together in kinds.values():  # untimed
            rate(engine, requests(who, count, 4, 0), together)
        before = engine.stats().segments
        for repeat in range(args.repeats):
            for name in list(kinds)[:: 1 if repeat % 2 else -1]:
                who, count, together = kinds[name]
                rates[name].append(rate(engine, requests(who, count, args.new_tokens, repeat), together))
        segments = engine.stats().segments - before
        for repeat in range(args.repeats):
            running, new, old = requests([*keys], STREAMS, 10_000, repeat), f"new-{repeat}", f"new-{repeat - 1}"
            swaps.append(swap(engine, running, Path(folder) / keys[0], new, old))
    assert [parameter.data_ptr() for parameter in base.parameters()] == pointers

    steered = [count for name, (_, count, _) in kinds.items() if name != "unsteered"]
    of = {name: np.array(values) for name, values in rates.items()}
    result = {
        "command": " ".join(["python", *sys.argv]),
        "device": device,
        "repeats": args.repeats,
        "streams": STREAMS,
        "adapters": ADAPTERS,
        "prompt_tokens": PROMPT,
        "new_tokens": args.new_tokens,
        "base_parameters": sum(parameter.numel() for parameter in base.parameters()),
        "segments_per_steered_token": round(segments / (args.repeats * args.new_tokens * sum(steered)), 4),
        "tokens_per_second": {name: spread(values) for name, values in of.items()},
        "ratio_to_unsteered": {name: spread(of[name] / of["unsteered"]) for name in ("steered", "mixed")},
        "ratio_to_alone": spread(of["mixed"] / of["alone"]),
        "adapter_swap_ms": spread(swaps),
        **environment(),
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    shown = ("tokens_per_second", "ratio_to_unsteered", "ratio_to_alone", "adapter_swap_ms")
    print(json.dumps({name: result[name] for name in shown}, indent=2))


if __name__ == "__main__":
    main()
