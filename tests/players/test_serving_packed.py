"""Passes over many sequences: rows come and go, and each of them continues as if it were alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from internalrl.errors import InternalRLError
from internalrl.players.engine.bases import check_base
from internalrl.players.engine.packed import Pass
from internalrl.players.engine.trays import Row, Shape, Trays, capacity
from tests.support.language import ARCHITECTURES, language_model, prompts

REFUSED = {
    "gemma2": "last 4 tokens",
    "gemma3_text": "last 4 tokens",
    "gpt_oss": "last 4 tokens",
    "mamba2": "LinearAttentionLayer",
    "recurrent_gemma": "LinearAttentionLayer",
    "falcon_h1": "LinearAttentionAndFullAttentionLayer",
    "bamba": "LinearAttentionLayer",
}
SEPARATE = ("falcon",)
"""Bases whose attention cannot be taken over."""
CONTEXT = 64


class Texts:
    """Texts that a base reads together, and rows that they are in."""

    def __init__(self, base: PreTrainedModel, slots: int, context: int | None = CONTEXT):
        self.base = base
        self.way, self.shape = check_base(base, context)
        self.trays = Trays(self.shape, slots, context)
        self.texts: dict[Row, list[int]] = {}

    def begin(self, room: int = 1) -> Row:
        row = self.trays.row(room)
        self.texts[row] = []
        return row

    def end(self, row: Row) -> None:
        self.trays.free(row)
        del self.texts[row]

    def read(self, new: dict[Row, list[int]]) -> Tensor:
        """The logits behind each text that got `new` tokens."""
        for row, tokens in new.items():
            self.trays.make_room(row, row.length + len(tokens))
            self.texts[row] += tokens
        logits = []
        for pieces in [list(new.items())] if self.way.joint else [[piece] for piece in new.items()]:
            read = Pass(pieces, self.base.device)
            logits.append(self.way(read, range(len(pieces))))
            read.keep()
        return torch.cat(logits)

    def alone(self, rows: dict[Row, list[int]]) -> Tensor:
        """The same logits, of the base itself."""
        return torch.stack([self.base(torch.tensor([self.texts[row]])).logits[0, -1] for row in rows])


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in REFUSED])
def test_rows_that_come_and_go_continue_as_if_alone(kind: str) -> None:
    """Parts of prompts beside next tokens; rows that outgrow their trays; gaps that are filled by other rows."""
    texts = Texts(language_model(kind), slots=3)
    assert texts.way.joint == (kind not in SEPARATE)
    coming = {0: [3], 1: [7, 2], 4: [20], 9: [1, 30], 20: [5]}
    leaving = {3: [1], 6: [0], 12: [2, 0]}
    source = iter(prompts(8, 60, seed=4).tolist())
    rows: list[Row] = []
    unread: dict[Row, list[int]] = {}
    for step in range(30):
        for length in coming.get(step, []):
            rows.append(texts.begin())
            unread[rows[-1]] = next(source)[:length]
        for place in leaving.get(step, []):
            row = rows.pop(place)
            unread.pop(row, None)
            texts.end(row)
        new = {}
        for number, row in enumerate(rows):
            waiting = unread.pop(row, [])
            if len(waiting) > 6:  # a prompt is read in parts
                unread[row] = waiting[6:]
            new[row] = waiting[:6] or [3 + (step + 5 * number) % 20]
        if step % 7 == 6:
            new.pop(rows[0])  # it reads nothing in this pass
        assert_close(texts.read(new), texts.alone(new), atol=2e-4, rtol=2e-4)


@pytest.mark.versions
@torch.no_grad()
def test_a_row_that_outgrows_its_tray_is_the_same_text() -> None:
    texts = Texts(language_model(max_position_embeddings=512), slots=4, context=512)
    long, other = texts.begin(), texts.begin()
    [words] = prompts(1, 300, seed=1).tolist()
    for begin in range(0, 300, 50):
        new = {long: words[begin : begin + 50], other: [4]}
        assert_close(texts.read(new), texts.alone(new), atol=2e-4, rtol=2e-4)
    assert long.tray.capacity == 512
    assert other.tray.capacity == 64


@pytest.mark.versions
@torch.no_grad()
def test_what_is_left_of_a_row_that_went_wrong_hurts_nobody() -> None:
    """nan in the place of a row that has gone, and behind the ends of the others."""
    texts = Texts(language_model(), slots=3)
    source = prompts(3, 40, seed=1).tolist()
    broken, kept = texts.begin(), texts.begin()
    texts.read({broken: source[0][:20], kept: source[1][:12]})
    tray = kept.tray
    tray.keys[:, broken.place], tray.values[:, broken.place] = float("nan"), float("nan")
    texts.end(broken)
    new = {texts.begin(): source[2][:18], kept: [5]}
    assert_close(texts.read(new), texts.alone(new), atol=1e-5, rtol=1e-5)


SHAPE = Shape(2, 1, 4, 4, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("slots", [4, 64])
def test_a_long_row_costs_its_own_tokens_alone(slots: int) -> None:
    trays = Trays(SHAPE, slots, 4096)
    short = [trays.row(40) for _ in range(slots)]
    before = trays.tokens
    assert before <= 2048 * max(1, slots // 32)
    long = trays.row(2000)
    assert trays.tokens - before == 2048
    trays.free(long)
    assert trays.tokens == before
    for row in short[::2] + short[1::2]:
        trays.free(row)
    assert trays.tokens == 0


@pytest.mark.parametrize(("length", "context", "expected"), [(1, None, 64), (65, None, 128), (65, 100, 100)])
def test_capacities(length: int, context: int | None, expected: int) -> None:
    assert capacity(length, context) == expected


@pytest.mark.parametrize("kind", REFUSED)
def test_bases_whose_rows_cannot_be_joined_are_refused(kind: str) -> None:
    with pytest.raises(InternalRLError, match=f"cannot be served: .*{REFUSED[kind]}"):
        check_base(language_model(kind), CONTEXT)


@torch.no_grad()
def test_attention_that_does_more_is_left_to_the_base() -> None:
    base = language_model("gemma2", layer_types=["full_attention"] * 4, attn_logit_softcapping=0.1)
    way, _ = check_base(base, CONTEXT)
    assert not way.joint


@torch.no_grad()
def test_a_window_wider_than_the_context_never_slides() -> None:
    base = language_model("mistral", sliding_window=CONTEXT)
    check_base(base, CONTEXT)
    with pytest.raises(InternalRLError, match=f"last {CONTEXT} tokens"):
        check_base(base, CONTEXT + 1)


def test_the_base_is_left_as_it_was() -> None:
    base = language_model()
    texts = Texts(base, slots=2)
    before = base.config._attn_implementation
    with torch.no_grad():
        texts.read({texts.begin(): [3, 4]})
    assert base.config._attn_implementation == before
