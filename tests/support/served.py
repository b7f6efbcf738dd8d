"""A tiny language model with a byte-level tokenizer and adapters on the disk, as a server finds them."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from tests.support.language import from_config, steer

END = "<end>"
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, an end of text, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({END: 0, **{byte: i for i, byte in enumerate(alphabet, 1)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT
    return fast


def served_base(seed: int = 0, **options: int) -> PreTrainedModel:
    """A random Llama of four blocks and width 32 that takes the tokenizer's tokens."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 512, "vocab_size": len(byte_tokenizer()), **options}
    return from_config(AutoConfig.for_model("llama", eos_token_id=0, bos_token_id=None, **sizes), seed)


def save_base(folder: Path, seed: int = 0) -> PreTrainedModel:
    """`served_base` and its tokenizer in `folder`."""
    base = served_base(seed)
    base.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return base


def save_adapter(base: PreTrainedModel, folder: Path, seed: int = 0, policy: bool = True) -> Path:
    """A random adapter of `base` in `folder`, whose switch fires at about every other token."""
    steer(base, seed, policy).save_pretrained(folder, {"made": {"seed": seed}})
    return folder


def not_ascii(text: str) -> str | None:
    """A filter for limits."""
    return None if text.isascii() else "not ascii"
