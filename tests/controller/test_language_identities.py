"""What must hold exactly when a language model of any kind is steered: bare, cached, padded, or row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from internalrl.controller.metacontroller import held_code
from internalrl.controller.steered import SteeredModel
from internalrl.controller.trace import Trace
from internalrl.errors import InternalRLError
from tests.support.language import (
    ARCHITECTURES,
    DEPTH,
    VOCABULARY,
    adapter_sizes,
    pad_left,
    prompts,
    randomise,
    steered_language_model,
)
from tests.support.tiny import N_Z, close, tiny_steered

READS_PADDING = {"recurrent_gemma"}
"""Kinds whose own logits depend on what stands under the padding."""
PROMPT, NEW = 7, 9


@pytest.fixture(params=ARCHITECTURES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def generate(steered: SteeredModel, tokens: Tensor, seeds: range, **options: Any) -> tuple[Tensor, Tensor, Trace]:
    """Greedy tokens (B, NEW), their logits (B, NEW, V) and the trace; every row's codes have a seed of their own."""
    steered.base.generation_config.eos_token_id = None
    output, trace = steered.generate(
        tokens,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        max_new_tokens=NEW,
        return_trace=True,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return output.sequences[:, tokens.shape[1] :], torch.stack(output.logits, 1), trace


def varied(trace: Trace) -> bool:
    """Whether some tokens after the first open a segment and some do not."""
    return 0 < trace.switch[:, 1:].float().mean() < 1


# ---------------------------------------------------------------------------------- every kind of model


def test_zero_controller_is_the_base_to_the_bit(kind: str) -> None:
    steered, tokens = steered_language_model(kind), prompts(3, PROMPT)
    plain = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    base, decoded = steered.base(input_ids=tokens), steered.base.generate(tokens, **plain)
    assert (steered(input_ids=tokens).logits - base.logits).abs().mean() > 0.05
    nn.init.zeros_(steered.metacontroller.up)
    assert torch.equal(steered(input_ids=tokens).logits, base.logits)
    assert torch.equal(steered(input_ids=tokens, code=torch.ones(N_Z)).logits, base.logits)
    assert torch.equal(steered(steered.residual(tokens), torch.ones(N_Z)), base.logits)
    zero = steered.generate(tokens, **plain)
    assert torch.equal(zero.sequences, decoded.sequences)
    assert torch.equal(torch.stack(zero.logits), torch.stack(decoded.logits))


def test_cached_decoding_is_the_full_forward(kind: str) -> None:
    """The prompt unsteered, each code from where its segment begins; and the switch as it reads a whole sequence."""
    steered, tokens = steered_language_model(kind), prompts(3, PROMPT)
    chosen, logits, trace = generate(steered, tokens, range(3))
    assert varied(trace)
    seen = torch.cat([tokens, chosen[:, :-1]], 1)
    close(steered(input_ids=seen, **trace.along(PROMPT)).logits[:, PROMPT - 1 :], logits)
    residual, meta = steered.residual(seen), steered.metacontroller
    close(steered(residual, **trace.along(PROMPT))[:, PROMPT - 1 :], logits)
    x = meta.read(residual)
    opens = nn.functional.pad(trace.switch, (PROMPT - 1, 0)).float()
    held = meta.hold(x, meta.summarise(x), trace.along(PROMPT)["code"], opens)
    close(held.logit[:, PROMPT:], trace.logit[:, 1:])
    assert torch.equal(trace.switch[:, 1:], trace.logit[:, 1:] > 0)
    assert torch.equal(held_code(trace.code, trace.switch.float()), trace.code)
    assert trace.switch[:, 0].all()


def test_padded_prompts_are_continued_as_if_alone(kind: str) -> None:
    steered = steered_language_model(kind)
    rows = [prompts(1, length, seed=length)[0] for length in (3, 7, 5)]
    padded = pad_left(rows)
    if kind in READS_PADDING:
        with pytest.raises(InternalRLError, match="reads padding as if it were text"):
            generate(steered, padded["input_ids"], range(3), attention_mask=padded["attention_mask"])
        return
    together = generate(steered, padded["input_ids"], range(3), attention_mask=padded["attention_mask"])
    assert varied(together[2])
    for i, row in enumerate(rows):
        alone = generate(steered, row[None], range(i, i + 1))
        assert torch.equal(alone[0][0], together[0][i])
        close(alone[1][0], together[1][i])
        assert torch.equal(alone[2].switch[0], together[2].switch[i])
        assert torch.equal(alone[2].code[0], together[2].code[i])
        close(alone[2].logit[0], together[2].logit[i])


def test_padding_on_the_right_changes_no_real_token(kind: str) -> None:
    steered = steered_language_model(kind)
    rows = [prompts(1, length, seed=length)[0] for length in (3, 7, 5)]
    tokens = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    code = torch.randn(3, 7, N_Z, generator=torch.Generator().manual_seed(0))
    together = steered(input_ids=tokens, attention_mask=mask, code=code).logits
    for i, row in enumerate(rows):
        close(steered(input_ids=row[None], code=code[i : i + 1, : len(row)]).logits[0], together[i, : len(row)])


# ---------------------------------------------------------------------------------- one kind is enough


@pytest.mark.parametrize("policy", [False, True])
def test_forward_decides_as_generation_does(policy: bool) -> None:
    """With a prompt of one token, and the same random numbers, all decisions are the same."""
    steered, tokens = steered_language_model(policy=policy), prompts(3, 1)
    steered.base.generation_config.eos_token_id = None
    torch.manual_seed(3)
    output = steered.generate(tokens, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True)
    torch.manual_seed(3)
    close(steered(input_ids=output.sequences[:, :-1]).logits, torch.stack(output.logits, 1))
    torch.manual_seed(3)
    padded = pad_left([*output.sequences[:, :-1], prompts(1, 14)[0]])
    close(steered(**padded).logits[:3, -NEW:], torch.stack(output.logits, 1))


def test_history_passes_over_padding() -> None:
    """On the left, on the right and in between; a row of nothing but padding has no history."""
    meta = steered_language_model().metacontroller
    x = torch.randn(4, 6, meta.width, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0], [0] * 6]).bool()
    begun = torch.randn(4, meta.config.n_h, generator=torch.Generator().manual_seed(1))
    for before in (None, begun):
        found = meta.remember(x, before, mask)
        for row in range(4):
            history = torch.zeros(meta.config.n_h) if before is None else before[row]
            for t in range(6):
                if mask[row, t]:
                    history = meta.remember(x[row : row + 1, t : t + 1], history[None])[0, 0]
                close(found[row, t], history)
    close(meta.summarise(x, mask)[:, 1:], meta.remember(x, mask=mask)[:, :-1])
    assert not meta.summarise(x, mask)[:, 0].any()


def test_prompt_in_chunks_is_the_prompt_whole() -> None:
    steered = steered_language_model()
    rows = [prompts(1, length, seed=length)[0] for length in (3, 7, 5)]
    padded = pad_left(rows)
    whole = generate(steered, padded["input_ids"], range(3), attention_mask=padded["attention_mask"])
    for size in (1, 3, 6):
        chunks = generate(
            steered, padded["input_ids"], range(3), attention_mask=padded["attention_mask"], prefill_chunk_size=size
        )
        assert torch.equal(chunks[0], whole[0])
        close(chunks[1], whole[1])
        close(chunks[2].logit, whole[2].logit)


def test_given_codes_steer_where_they_are_told_to() -> None:
    steered, tokens = steered_language_model(), prompts(3, PROMPT)
    code = torch.randn(3, PROMPT, N_Z, generator=torch.Generator().manual_seed(0))
    where = torch.arange(PROMPT) >= torch.tensor([0, 3, PROMPT])[:, None]
    found = steered(input_ids=tokens, code=code, where=where).logits
    base, whole = steered.base(input_ids=tokens).logits, steered(input_ids=tokens, code=code).logits
    close(found[0], whole[0])
    close(found[1, :3], base[1, :3])
    assert (found[1, 3:] - base[1, 3:]).abs().amin(-1).max() > 1e-3
    close(found[2], base[2])
    for same in (code[0, 0], code[:1, 0].expand(3, -1), code[:1, :1].expand(3, PROMPT, -1)):
        close(steered(input_ids=tokens, code=same).logits, steered(input_ids=tokens, code=code[0, 0]).logits)


def test_adapters_share_a_batch_row_by_row() -> None:
    """Of different layers and sizes, and the bare base: every row as if it were alone with its own."""
    steered = steered_language_model(policy=True)
    for name, layer, n_z in (("early", 1, 2), ("late", 3, 5)):
        other = SteeredModel.from_base(steered.base, adapter_sizes(layer, n_z))
        randomise(other, seed=layer)
        steered._add(name, other.adapter)
    names = ["late", None, "default", "early", "late"]
    rows = [prompts(1, length, seed=length)[0] for length in (3, 7, 5, 4, 2)]
    padded = pad_left(rows)
    mask = {"attention_mask": padded["attention_mask"]}
    tokens, logits, trace = generate(steered, padded["input_ids"], range(5), **mask, adapter_names=names)
    assert trace.code.shape == (5, NEW, 5)
    assert [len(segments) > 0 for segments in trace.segments] == [name is not None for name in names]
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        steered.set_adapter(name or "default")
        own = {"steering": "off"} if name is None else {}
        alone = generate(steered, row[None], range(i, i + 1), **own)
        assert torch.equal(alone[0][0], tokens[i])
        close(alone[1][0], logits[i])
        width = alone[2].code.shape[-1]
        assert torch.equal(alone[2].switch[0], trace.switch[i])
        close(alone[2].code[0], trace.code[i, :, :width])
        assert not trace.code[i, :, width:].any()
    whole = torch.stack([rows[1][:2]] * 5)
    given = steered(input_ids=whole, code=torch.zeros(5, 3), adapter_names=[None, "default", None, None, None]).logits
    steered.set_adapter("default")
    close(given[1], steered(input_ids=whole, code=torch.zeros(3)).logits[1])
    close(given[0], steered.base(input_ids=whole).logits[0])


def test_grid_models_keep_their_own_inputs() -> None:
    steered = tiny_steered()
    with pytest.raises(InternalRLError, match="does not generate tokens"):
        steered.generate(prompts(1, 3))
    with pytest.raises(InternalRLError, match="given no observations"):
        steered(input_ids=prompts(1, 3))


def test_what_forward_does_not_take() -> None:
    steered, tokens = steered_language_model(), prompts(1, 3)
    with pytest.raises(InternalRLError, match="given no input_ids; pass the inputs by their names"):
        steered(tokens)
    with pytest.raises(InternalRLError, match="with adapter_names, give tokens"):
        steered(steered.residual(tokens), torch.zeros(N_Z), adapter_names=["default"])


def test_several_residual_streams_are_refused() -> None:
    config = AutoConfig.for_model(
        "gemma3n_text",
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size=32,
        hidden_size_per_layer_input=4,
        intermediate_size=24,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=0,
        laurel_rank=2,
        layer_types=["full_attention"] * DEPTH,
        activation_sparsity_pattern=[0.0] * DEPTH,
        pad_token_id=0,
    )
    base = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InternalRLError, match="a single residual stream"):
        SteeredModel.from_base(base, adapter_sizes())
    assert not any(block._forward_hooks for block in base.model.layers)
