"""A tokenizer of letters for the tiny language models, and one whose codes have a known answer."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from internalrl.controller.steered import SteeredModel
from tests.support.language import adapter_sizes, language_model

LETTERS = "abcdefghijklmnopqrst"


def letters() -> PreTrainedTokenizerFast:
    """24 tokens: padding, beginning and end of text, the letters a to t, and the unknown."""
    words = ["<pad>", "<bos>", "<eos>", *LETTERS, "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def steered_to_a(threshold: float = 2.5) -> SteeredModel:
    """One code per text; where its first number is above `threshold`, the text is "aaaa…", and otherwise the base's.

    U(z) e = relu(z_1 − threshold) · the output embedding of "a", far longer than e itself.
    """
    base = language_model()
    steered = SteeredModel.from_base(base, adapter_sizes())
    meta = steered.metacontroller
    with torch.no_grad():
        for parameter in meta.parameters():
            parameter.zero_()
        meta.features.weight[0, 0], meta.features.bias[0] = 1.0, -threshold
        features = meta.config.controller_hidden + 1
        meta.offset[features - 1] = 1.0  # the constant feature of the first rank
        meta.up[0] = 1e4 * base.get_output_embeddings().weight[letters().convert_tokens_to_ids("a")]
        meta.switch_head.bias.fill_(-10.0)
    return steered
