"""A tokenizer for the code domain: one token per word of the grammar, spaces and line breaks included.

Operators and keywords carry the spaces around them, and a line break carries the indentation after it (and the colon
before it), so a program's tokens, put together, are the program. An idiom ends with a line break, a token of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from internalrl.domains.code.grammar import END, PROMPT, CodeConfig, parse
from internalrl.domains.code.idioms import variants
from internalrl.errors import InternalRLError

PAD, END_OF_TEXT, UNKNOWN = "<pad>", "<eos>", "<unk>"

_WORD = Regex(
    r":?\n *"  # a line break, with the indentation of the next line
    r"| (?:for|in|if|else|not in|[^\s\w]+) |, |: |(?:for|while|if|def|return|lambda) "  # what has spaces around it
    r"|\[\]|\.?[a-z_]+\(|[a-z_]+|."  # calls, names, anything else
)


def build_tokenizer(config: CodeConfig) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is what programs of `config` need; it adds no special tokens by itself."""
    texts = [PROMPT, END, *(v.text for idiom in config.idioms for written in variants(idiom) for v in written)]
    split = pre_tokenizers.Split(_WORD, "isolated")
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate([PAD, END_OF_TEXT, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str | Path, config: CodeConfig) -> PreTrainedTokenizerFast:
    """The tokenizer that `save_pretrained` wrote to a folder.

    InternalRLError where it is missing or damaged, or programs of `config` do not survive it.
    """
    if not (Path(path) / "tokenizer.json").is_file():
        raise InternalRLError(f"There is no tokenizer in {path}; give the folder that save_pretrained wrote.")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the libraries raise bare Exception for what they cannot read
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InternalRLError(f"The tokenizer in {path} is damaged ({why}); build and save it again.") from error
    check_tokenizer(tokenizer, config)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, config: CodeConfig) -> None:
    """InternalRLError unless every variant of every idiom becomes tokens and the same text again."""
    for idiom in config.idioms:
        for variant in (variant for written in variants(idiom) for variant in written):
            program = PROMPT + variant.text + END
            numbers = tokenizer(program, add_special_tokens=False)["input_ids"]
            if tokenizer.unk_token_id in numbers or tokenizer.decode(numbers) != program:
                raise InternalRLError(
                    f"The tokenizer does not match these programs: it loses a part of the idiom {idiom!r}; use the one "
                    "that build_tokenizer makes for the same idioms."
                )


def boundaries(config: CodeConfig, tokenizer: PreTrainedTokenizerFast, programs: Sequence[str]) -> list[list[int]]:
    """Where idioms end, for evaluation only: per program, the positions of the tokens that terminate its idioms.

    Positions count in the tokens of the whole program. A switch is due where the model reads such a token: what it
    predicts next begins another idiom or, after the last one, the program's end.
    """
    encoded = tokenizer(list(programs), add_special_tokens=False, return_offsets_mapping=True)
    found = []
    for program, offsets in zip(programs, encoded["offset_mapping"], strict=True):
        ends = {end: position for position, (_, end) in enumerate(offsets)}
        found.append([ends[end] for end in parse(config, program).ends])
    return found
