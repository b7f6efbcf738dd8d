"""The joint cache: rows come and go, and each of them continues as if it were alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, PreTrainedModel

from internalrl.errors import InternalRLError
from internalrl.players.engine.batch import JointCache, check_base, plain_cache
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
CONTEXT = 64


def prefilled(base: PreTrainedModel, prompt: Tensor) -> DynamicCache:
    cache = plain_cache(base, CONTEXT)
    base(prompt[None], attention_mask=torch.ones_like(prompt)[None], past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in REFUSED])
def test_rows_that_come_and_go_continue_as_if_alone(kind: str) -> None:
    """Longer ones come after shorter ones, the memory is moved and grows, and gaps are filled by the last row."""
    base = language_model(kind)
    check_base(base, CONTEXT)
    coming = {0: [3], 1: [7, 2], 4: [20], 9: [1, 30]}
    leaving = {3: [1], 6: [0], 12: [2, 0]}
    texts = iter(prompts(8, 60, seed=4))
    joint, rows = JointCache(base, 4, CONTEXT), list[Tensor]()
    capacities = set()
    for step in range(42):
        for length in coming.get(step, []):
            rows.append(next(texts)[:length])
            joint.add(prefilled(base, rows[-1]))
        if step in leaving:
            order = joint.drop(leaving[step])
            rows = [rows[row] for row in order]
        tokens = torch.tensor([[3 + (step + 5 * row) % 20] for row in range(len(rows))])
        logits = base(tokens, use_cache=True, **joint.inputs()).logits[:, -1]
        joint.grow()
        capacities.add(joint.capacity)
        rows = [torch.cat([row, token]) for row, token in zip(rows, tokens, strict=True)]
        alone = [base(row[None], attention_mask=torch.ones_like(row)[None]).logits[0, -1] for row in rows]
        assert_close(logits, torch.stack(alone), atol=2e-4, rtol=2e-4)
    assert len(capacities) > 1


@torch.no_grad()
def test_what_is_left_of_a_row_that_went_wrong_hurts_nobody() -> None:
    """nan in the place of a row that has gone, and in columns that come into view again."""
    base = language_model()
    texts = prompts(3, 40, seed=1)
    joint = JointCache(base, 2, CONTEXT)
    joint.add(prefilled(base, texts[0][:20]))
    joint.add(prefilled(base, texts[1][:12]))
    for layer in joint.layers:
        layer.keys[0], layer.values[0] = float("nan"), float("nan")
    joint.drop([0])
    for layer in joint.layers:  # what lies outside the window is anybody's
        layer.keys[:, :, : joint.first], layer.values[:, :, : joint.first] = float("nan"), float("nan")
    joint.add(prefilled(base, texts[2][:18]))
    tokens = torch.tensor([[5], [6]])
    logits = base(tokens, use_cache=True, **joint.inputs()).logits[:, -1]
    for row, text in enumerate((texts[1][:12], texts[2][:18])):
        whole = torch.cat([text, tokens[row]])[None]
        assert_close(logits[row], base(whole).logits[0, -1], atol=1e-5, rtol=1e-5)


def test_memory_stays_within_a_few_times_the_longest_row() -> None:
    base = language_model()
    joint = JointCache(base, 2, None)
    short = prefilled(base, prompts(1, 6)[0])
    for _ in range(40):  # 200 columns go by
        joint.add(short)
        for _ in range(5):
            joint.inputs()
            for layer in joint.layers:
                layer.update(*[torch.zeros(len(joint), 2, 1, 8)] * 2)
            joint.grow()
        joint.drop([0])
    assert joint.capacity <= 100


@pytest.mark.parametrize("kind", REFUSED)
def test_bases_whose_rows_cannot_be_joined_are_refused(kind: str) -> None:
    with pytest.raises(InternalRLError, match=f"cannot be served: .*{REFUSED[kind]}"):
        check_base(language_model(kind), CONTEXT)


@torch.no_grad()
def test_a_window_wider_than_the_context_never_slides() -> None:
    base = language_model("mistral", sliding_window=CONTEXT)
    check_base(base, CONTEXT)
    with pytest.raises(InternalRLError, match=f"last {CONTEXT} tokens"):
        check_base(base, CONTEXT + 1)
