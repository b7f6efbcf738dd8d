"""Stage 1 on text: a small Llama learns the next token, in the loop of the grid's base model.

A language model that is already trained needs no stage 1: give it to `SteeredModel.from_base`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from internalrl.base.pretrain import train_base
from internalrl.base.text_data import Examples, TextBatch, pad_token, text_batches
from internalrl.run.files import write_errors
from internalrl.run.folder import RunFolder
from internalrl.run.loop import Loop
from internalrl.run.streams import Stream
from internalrl.settings.stages import PretrainTextConfig


def build_language_model(config: PretrainTextConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new Llama with the tokenizer's vocabulary; every block starts as the identity."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.mlp,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.context,
            pad_token_id=pad_token(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    return model


def pretrain_text(model: PreTrainedModel, examples: Examples, config: PretrainTextConfig, run: RunFolder) -> Loop:
    """Train on the completions of `examples`; returns the finished loop, for its times."""

    def loss(batch: TextBatch) -> tuple[Tensor, dict[str, float]]:
        nll = token_nll(model, batch)[batch.mask].mean()
        return nll, {"nll": nll.item()}

    return train_base(
        model,
        config,
        run,
        lambda step: text_batches(examples, config.batch_size, run.seed, Stream.PRETRAIN, step),
        loss,
    )


def token_nll(model: PreTrainedModel, batch: TextBatch) -> Tensor:
    """−log p of each token (B, T) given those before, in nats; 0 for the first one. What is padded means nothing."""
    logits = model(input_ids=batch.tokens, use_cache=False).logits
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), batch.tokens[:, 1:], reduction="none")
    return F.pad(nll, (1, 0))


@torch.no_grad()
def completion_nll(model: PreTrainedModel, examples: Examples, size: int = 128) -> NDArray[np.float64]:
    """(N,): −log p of each completion, its end included, in nats."""
    order = np.argsort(examples.lengths, kind="stable")  # short with short
    found = np.zeros(len(examples))
    for begin in range(0, len(order), size):
        rows = order[begin : begin + size]
        batch = examples.batch(rows)
        found[rows] = (token_nll(model, batch) * batch.mask).sum(1).numpy()
    return found


def save_language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write model and tokenizer to `folder` as Hugging Face does; InternalRLError where that fails."""
    with write_errors(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(str(folder))
