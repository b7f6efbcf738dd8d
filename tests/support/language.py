"""Tiny language models of many kinds that the tests share, and steered ones; see `tests.support.tiny` on weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from internalrl.controller.policy import Policy
from internalrl.controller.steered import SteeredModel
from internalrl.settings.stages import MetacontrollerConfig
from tests.support.tiny import N_Z, SIZES, widen

VOCABULARY, LM_WIDTH, DEPTH = 24, 32, 4
PAD, BOS, EOS = 0, 1, 2

_LLAMA = {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "gemma2": {**_LLAMA, "sliding_window": 4},
    "gemma3_text": {**_LLAMA, **_SLIDING},
    "gpt2": {"n_head": 4, "n_positions": 64},  # learned positions
    "gpt_neox": {"intermediate_size": 24, "num_attention_heads": 4},
    "phi3": _LLAMA,
    "olmo2": _LLAMA,
    "falcon": {"num_attention_heads": 4},  # its blocks return tuples
    "mixtral": {**_LLAMA, **_EXPERTS},
    "gpt_oss": {**_LLAMA, **_SLIDING, **_EXPERTS},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 8},
    "recurrent_gemma": {"intermediate_size": 48, "num_attention_heads": 4, "attention_window_size": 4},
    "falcon_h1": {**_LLAMA, **_MAMBA, "mamba_n_heads": 4, "mamba_d_ssm": 32},
    "bamba": {**_LLAMA, **_MAMBA, "attn_layer_indices": [1, 3]},
}


def language_model(kind: str = "llama", seed: int = 0, **options: Any) -> PreTrainedModel:
    """Four blocks of width 32 and a vocabulary of 24, random."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": LM_WIDTH, "num_hidden_layers": DEPTH}
    config = AutoConfig.for_model(
        kind, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, **sizes, **ARCHITECTURES[kind], **options
    )
    return from_config(config, seed)


def from_config(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model with matrices drawn from N(0, 0.15²); norms and the time scales of recurrences stay as they are."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def steered_language_model(kind: str = "llama", seed: int = 0, policy: bool = False, **options: Any) -> SteeredModel:
    """One whose switch fires at about every other token."""
    return steer(language_model(kind, seed, **options), seed, policy)


def steer(base: PreTrainedModel, seed: int = 0, policy: bool = False, layer: int = 2) -> SteeredModel:
    """A wide metacontroller on `base`, after block `layer`."""
    steered = SteeredModel.from_base(base, adapter_sizes(layer))
    randomise(steered, seed, policy)
    return steered


def adapter_sizes(layer: int = 2, n_z: int = N_Z) -> MetacontrollerConfig:
    return MetacontrollerConfig(**{**vars(SIZES), "layer": layer, "n_z": n_z})


def randomise(steered: SteeredModel, seed: int = 0, policy: bool = False) -> None:
    """Draw the active adapter wide."""
    meta, n_z = steered.metacontroller, steered.metacontroller.config.n_z
    widen(meta, 0.4, seed + 1)
    if policy:
        steered.policy = Policy(meta.width, n_z, hidden=6, initial_std=1.2)
        widen(steered.policy, 0.5, seed + 2)
    with torch.no_grad():
        x = meta.read(steered.residual(prompts(16, 8, seed)))
        held = torch.randn(16, 8, n_z, generator=torch.Generator().manual_seed(seed))
        logit = meta.segment(x, meta.summarise(x), held, "soft").logit
        meta.switch_head.bias -= logit.median()


def prompts(rows: int, length: int, seed: int = 0) -> Tensor:
    """(rows, length) tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def pad_left(rows: list[Tensor]) -> dict[str, Tensor]:
    """Prompts (n,) of several lengths as `input_ids` and `attention_mask`."""
    longest = max(map(len, rows))
    padded = [torch.cat([torch.full((longest - len(row),), PAD), row]) for row in rows]
    mask = [torch.cat([torch.zeros(longest - len(row)), torch.ones(len(row))]) for row in rows]
    return {"input_ids": torch.stack(padded), "attention_mask": torch.stack(mask).long()}
