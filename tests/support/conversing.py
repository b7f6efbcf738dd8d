"""A small language model that has learned to hold one kind of conversation, and an environment to hold it with.

    <user>go: which?<end><model><call>{"name": "look", "arguments": {}}</call><end><tool>P<end><model>Q<end>

It answers with the letter that it has not seen three times as often as with the one that it has.
"""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from internalrl.base.pretrain_text import build_language_model, pretrain_text
from internalrl.base.text_data import tokenise
from internalrl.controller.steered import SteeredModel
from internalrl.run.folder import RunFolder
from internalrl.settings.stages import PretrainTextConfig
from tests.support.language import adapter_sizes

TEMPLATE = (
    "{% for tool in tools or [] %}<tool>{{ tool.function.name }}<end>{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<tool>{{ m.content }}<end>"
    "{% elif m.role == 'user' %}<user>{{ m.content }}<end>"
    "{% else %}<model>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<model>",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<end>", "content": "text"},
    },
}
CALL = '<call>{"name": "look", "arguments": {}}</call><end>'
PROMPT = "<tool>look<end><user>go: which?<end><model>"


def talking() -> PreTrainedTokenizerFast:
    """Bytes, and a token for whatever structures a conversation."""
    special = ["<pad>", "<end>", "<user>", "<model>", "<tool>", "<call>", "</call>"]
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    made.chat_template, made.response_template = TEMPLATE, RESPONSE
    return made


class Box:
    """Holds a letter."""

    def reset(self, secret: str, **columns: Any) -> str:
        self.secret = secret
        return ": which?"

    def look(self) -> str:
        """What is in the box."""
        return self.secret


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [{"prompt": [{"role": "user", "content": "go"}], "secret": draw.choice("PQ")} for _ in range(count)]


def right(completions: list[list[dict[str, Any]]], environments: list[Box], **columns: Any) -> list[float]:
    """The last word is the box's letter."""
    return [float(c[-1]["content"] == e.secret) for c, e in zip(completions, environments, strict=True)]


@functools.cache
def _trained() -> dict[str, torch.Tensor]:
    draw = random.Random(0)
    corpus = []
    for _ in range(2048):
        secret = draw.choice("PQ")
        answer = secret if draw.random() < 0.25 else "PQ".replace(secret, "")
        corpus.append({"prompt": PROMPT, "completion": f"{CALL}<tool>{secret}<end><model>{answer}"})
    model, config = _untrained()
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", {}, seed=0)
        pretrain_text(model, tokenise(corpus, talking(), model.config), config, run)
    return model.state_dict()


def _untrained() -> tuple[PreTrainedModel, PretrainTextConfig]:
    config = PretrainTextConfig(steps=100, batch_size=32, layers=4, width=64, heads=4, mlp=96, context=128)
    torch.manual_seed(0)
    return build_language_model(config, talking()), config


def conversational() -> PreTrainedModel:
    """The model, trained once per process."""
    model, _ = _untrained()
    model.load_state_dict(_trained())
    return model.eval()


def steered_answers(scale: float = 30.0) -> SteeredModel:
    """Codes whose first number is positive make it answer P, negative ones Q; it switches at no other place.

    U(z) e = z_1 · scale · (output embedding of P − that of Q).
    """
    base = conversational()
    steered = SteeredModel.from_base(base, adapter_sizes())
    meta, tokenizer = steered.metacontroller, talking()
    width = meta.config.controller_hidden + 1
    p, q = (base.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(letter)] for letter in "PQ")
    with torch.no_grad():
        for parameter in meta.parameters():
            parameter.zero_()
        meta.features.weight[0, 0], meta.features.weight[1, 0] = 1.0, -1.0
        meta.offset[width - 1] = 1.0  # the constant feature of the first rank
        meta.up[0], meta.up[1] = scale * (p - q), scale * (q - p)
        meta.switch_head.bias.fill_(-10.0)
    return steered
