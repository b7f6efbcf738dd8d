"""Tokens as text, one by one: nothing is lost, broken or given too early."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from internalrl.players.engine.text import BROKEN, Detokenizer, Stops
from tests.support.served import byte_tokenizer

BYTES = byte_tokenizer()
END = 0


def pieces(tokens: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(BYTES, prompt or [])
    return [*map(detokenizer.add, tokens), detokenizer.rest()]


def test_a_character_comes_whole_with_its_last_byte() -> None:
    assert pieces(BYTES.encode("aé€😀")) == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=60), st.integers(0, 40))
def test_text_is_the_tokenizers_own_wherever_the_prompt_ends(text: str, cut: int) -> None:
    tokens = BYTES.encode(text)
    before = BYTES.decode(tokens[:cut]).rstrip(BROKEN)
    assert before + "".join(pieces(tokens[cut:], tokens[:cut])) == BYTES.decode(tokens).rstrip(BROKEN) or BROKEN in text


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 256), max_size=120))
def test_broken_bytes_are_shown_as_the_tokenizer_shows_them(tokens: list[int]) -> None:
    assert "".join(pieces(tokens)) == BYTES.decode(tokens, skip_special_tokens=True)


def test_broken_bytes_do_not_wait_for_ever() -> None:
    assert len("".join(pieces([BYTES.encode("é")[1]] * 200)[:-1])) > 190


def test_special_tokens_have_no_text() -> None:
    assert pieces([END, *BYTES.encode("a"), END]) == ["", "a", "", ""]


def test_words_keep_their_space() -> None:
    """A tokenizer that marks the beginning of words, and drops the first space of what it decodes."""
    words = Tokenizer(models.WordLevel({"▁Once": 0, "▁upon": 1, "▁a": 2, "time": 3}, unk_token="time"))
    words.decoder = decoders.Metaspace()
    detokenizer = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=words), [0, 1])
    assert [detokenizer.add(2), detokenizer.add(3)] == [" a", "time"]


def test_a_character_taken_back_is_no_error() -> None:
    """With byte tokens, a broken byte after a character turns the whole run of bytes into broken ones."""
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    fallback = Tokenizer(models.BPE(bytes_, [], byte_fallback=True))
    fallback.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    detokenizer = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=fallback), [])
    tokens = [*"é".encode(), 0x80]
    assert "".join([*map(detokenizer.add, tokens), detokenizer.rest()]) == f"é{BROKEN}"


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_stop_text_ends_the_answer_however_it_is_cut(size: int) -> None:
    text = "one, two; three END four"
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    stops, shown = Stops(["END", "ENDS", "nowhere"]), ""
    while not stops.found:
        shown += stops.add(parts.pop(0))
    assert shown == "one, two; three "


def test_text_that_only_begins_a_stop_text_is_given_late() -> None:
    stops = Stops(["abcd"])
    assert [stops.add("xabc"), stops.add("a"), stops.add("b"), stops.add("c"), stops.rest()] == [
        "x",
        "abc",
        "",
        "",
        "abc",
    ]
    assert not stops.found
