"""The base model to steer: one that is given, or one from the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from internalrl.base.residual import ResidualTap
from internalrl.base.trajectory import TrajectoryConfig, load_trajectory_model
from internalrl.errors import InternalRLError

Base = PreTrainedModel | str | Path
"""A model, the folder of a saved one, or the name of a language model that is in Hugging Face's cache."""


def load_base(base: Base) -> PreTrainedModel:
    """The decoder to be steered. Nothing is downloaded, unpickled, or run from the folder.

    Of a PEFT model it is the model inside, which the PEFT adapters stay part of.

    Raises InternalRLError when there is no whole model, or one that cannot be steered: an encoder or encoder-decoder,
    one that torch.compile has wrapped, one with several residual streams, one that loses its past while it generates,
    a PEFT model whose adapter is a learned prompt. A language model is run on a few tokens to find out, and left in
    evaluation mode.
    """
    model: Any = _read(base) if isinstance(base, str | Path) else base
    if hasattr(model, "get_base_model"):  # of PEFT, which need not be installed
        if model.active_peft_config.is_prompt_learning:
            raise InternalRLError(
                "This PEFT model learns a prompt, which its inner model does not know; give one whose adapter is in "
                "the weights, such as LoRA."
            )
        model = model.get_base_model()
    if hasattr(model, "_orig_mod"):
        raise InternalRLError(
            "The base was wrapped by torch.compile, which does not see the tap; give the model itself, uncompiled."
        )
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        raise InternalRLError(
            f"{type(model).__name__} is no Hugging Face decoder; give a causal language model or a TrajectoryModel."
        )
    if model.main_input_name == "input_ids":
        _require_single_stream(model.eval())
        _require_past(model)
    return model


def load_tokenizer(base: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a saved language model; InternalRLError where there is none. Nothing is downloaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # many kinds, as for models
        raise InternalRLError(f"{base} has no tokenizer; save it beside the model.") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


@torch.no_grad()
def _require_single_stream(model: PreTrainedModel) -> None:
    """InternalRLError unless all that a language model knows half-way is one causal residual stream."""
    tap, tokens = ResidualTap(model), torch.tensor([[0] + [1] * 7, [0] * 8], device=model.device)
    residual = tap.read(model, input_ids=tokens, use_cache=False)
    logits = model(input_ids=tokens, use_cache=False).logits
    with tap.skipping_lower_blocks(residual):
        continued = model(inputs_embeds=residual.clone(), use_cache=False).logits
    tolerance = 0.05 * logits.std()
    if (logits[0, 0] - logits[1, 0]).abs().max() > tolerance:
        raise InternalRLError(
            f"What {type(model).__name__} says of a token depends on later ones; give a causal language model."
        )
    if (logits - continued).abs().max() > tolerance:
        raise InternalRLError(
            f"The upper blocks of {type(model).__name__} read more than what the lower ones hand on: a metacontroller "
            "needs a decoder with a single residual stream."
        )


@torch.no_grad()
def _require_past(model: Any) -> None:
    """InternalRLError unless a language model generates from all that it has read, whatever it keeps that in."""
    if not model.can_generate():
        return
    prompt = torch.tensor([[1, 0, 0, 1, 0]], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    whole = model(input_ids=written.sequences, use_cache=False).logits[:, prompt.shape[1] - 1 : -1]
    if not (torch.stack(written.logits, 1) - whole).abs().max() <= 0.05 * whole.std():
        raise InternalRLError(
            f"{type(model).__name__} generates as if it had not read all that came before; give another base, or use "
            "another release of transformers."
        )


def _read(name: str | Path) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        if isinstance(config, TrajectoryConfig):
            return load_trajectory_model(name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        model, report = loaded
        if missing := report["missing_keys"]:
            raise ValueError(f"{len(missing)} tensors are missing, such as {min(missing)}")
    except InternalRLError:
        raise
    except Exception as error:  # many kinds: Hugging Face's, JSON's, those of wrong sizes
        why = f"{type(error).__name__}, {str(error).splitlines()[0]}"
        if not Path(name).exists():
            why = "No such file or directory, and no model of that name in the cache"
        raise InternalRLError(
            f"{name} holds no whole model ({why}); give the folder of a causal language model with its safetensors "
            "files, or the one that `pretrain` saved."
        ) from error
    return model
