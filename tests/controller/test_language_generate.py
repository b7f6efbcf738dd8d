"""`generate` with everything that transformers' own takes, and what it has beyond: codes, seeds, the trace."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from internalrl.base.caches import cache_input
from internalrl.controller.policy import PolicyActor
from internalrl.controller.steered import SteeredModel
from internalrl.controller.trace import Trace, before_end
from internalrl.errors import InternalRLError
from tests.support.language import EOS, PAD, VOCABULARY, pad_left, prompts, steered_language_model
from tests.support.tiny import N_Z, close

ROWS, PROMPT, NEW = 3, 5, 12


@pytest.fixture
def steered() -> SteeredModel:
    """With a policy, and no end of sequence."""
    steered = steered_language_model(policy=True)
    steered.base.generation_config.eos_token_id = None
    return steered


def tokenizer() -> PreTrainedTokenizerFast:
    """One letter per token."""
    letters = {"<pad>": PAD, "<s>": 1, "</s>": EOS, **{chr(ord("a") + i - 3): i for i in range(3, VOCABULARY)}}
    made = Tokenizer(BPE(letters, []))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def run(steered: SteeredModel, tokens: Tensor | None = None, seed: int = 0, **options: Any) -> tuple[Tensor, Trace]:
    """Generated tokens and the trace; everything that is random follows `seed`."""
    tokens = prompts(ROWS, PROMPT) if tokens is None else tokens
    torch.manual_seed(seed)
    sequences, trace = steered.generate(tokens, return_trace=True, **{"max_new_tokens": NEW, **options})
    assert torch.equal(sequences[:, : tokens.shape[1]], tokens.repeat_interleave(len(sequences) // len(tokens), 0))
    return sequences[:, tokens.shape[1] :], trace


# ---------------------------------------------------------------------------------- transformers' options


def test_sampling_follows_the_seed_and_the_temperature(steered: SteeredModel) -> None:
    sampled = {"do_sample": True, "temperature": 2.0, "top_k": 20, "top_p": 0.95}
    first, again, other = (run(steered, seed=seed, **sampled)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    greedy = [run(steered, seed=0, **options)[0] for options in ({}, {"do_sample": True, "temperature": 1e-6})]
    assert torch.equal(*greedy)


def test_settings_may_come_from_three_places(steered: SteeredModel) -> None:
    """Options over a GenerationConfig over the base's own; neither of these is changed."""
    steered.base.generation_config.max_new_tokens = 4
    assert steered.generate(prompts(ROWS, PROMPT)).shape[1] == PROMPT + 4
    config = GenerationConfig(max_new_tokens=6, num_return_sequences=2, do_sample=True)
    before = config.to_dict()
    assert steered.generate(prompts(ROWS, PROMPT), generation_config=config).shape == (2 * ROWS, PROMPT + 6)
    assert run(steered, generation_config=config, max_new_tokens=7, num_return_sequences=1)[0].shape == (ROWS, 7)
    assert config.to_dict() == before
    assert steered.base.generation_config.max_new_tokens == 4
    assert steered.base.generation_config.disable_compile is not True


class Words(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.heard.append(value)

    def end(self) -> None:
        self.ended = True


def test_streamers_hear_every_token(steered: SteeredModel) -> None:
    words, tokens = Words(), prompts(1, PROMPT)
    chosen, _ = run(steered, tokens, streamer=words)
    assert words.ended
    assert torch.equal(words.heard[0], tokens)
    assert torch.equal(torch.cat(words.heard[1:]), chosen[0])


def test_streaming_from_a_thread(steered: SteeredModel) -> None:
    """The usual way: generation runs elsewhere while its text is read here."""
    arrived: queue.Queue[Tensor | None] = queue.Queue()
    words = Words()
    words.put = arrived.put  # type: ignore[method-assign]
    words.end = lambda: arrived.put(None)  # type: ignore[method-assign]
    options = {"max_new_tokens": 3, "streamer": words, "code_temperature": 0.0}
    thread = threading.Thread(target=steered.generate, args=(prompts(1, PROMPT),), kwargs=options)
    thread.start()
    heard = list(iter(lambda: arrived.get(timeout=60), None))
    thread.join()
    chosen, _ = run(steered, prompts(1, PROMPT), max_new_tokens=3, code_temperature=0.0)
    assert [int(token) for token in heard[1:]] == chosen[0].tolist()


class Only(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.where(torch.arange(scores.shape[1]) == 5, scores, -torch.inf)


class Longer(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= PROMPT + 4)


def test_processors_and_stopping_criteria(steered: SteeredModel) -> None:
    found, trace = run(
        steered,
        logits_processor=LogitsProcessorList([Only()]),
        stopping_criteria=StoppingCriteriaList([Longer()]),
    )
    assert torch.equal(found, torch.full((ROWS, 4), 5))
    assert trace.switch.shape == (ROWS, 4)


def test_stop_strings(steered: SteeredModel) -> None:
    free, _ = run(steered, tokenizer=tokenizer())
    word = tokenizer().decode(free[0, 3])
    steered.base.generation_config.eos_token_id = EOS
    found, trace = run(steered, prompts(ROWS, PROMPT), stop_strings=[word], tokenizer=tokenizer())
    first = free[0].tolist().index(int(free[0, 3]))
    assert int(trace.mask[0].sum()) == first + 1
    assert torch.equal(found[0, : first + 1], free[0, : first + 1])


@pytest.mark.versions
@pytest.mark.parametrize("cache", ["static", StaticCache, DynamicCache])
def test_any_cache_gives_the_same_text(steered: SteeredModel, cache: Any) -> None:
    padded = pad_left([prompts(1, length, seed=length)[0] for length in (3, 7, 5)])
    options: dict[str, Any] = {"cache_implementation": cache}
    if cache is StaticCache:
        options = cache_input(steered.base, StaticCache(config=steered.base.config, max_cache_len=40))
    if cache is DynamicCache:
        options = cache_input(steered.base, DynamicCache(config=steered.base.config))
    plain, expected = run(steered, padded["input_ids"], attention_mask=padded["attention_mask"])
    found, trace = run(steered, padded["input_ids"], attention_mask=padded["attention_mask"], **options)
    assert torch.equal(found, plain)
    close(trace.logit, expected.logit)


def test_pads_are_known_by_their_number(steered: SteeredModel) -> None:
    """Without a mask, as in transformers."""
    padded = pad_left([prompts(1, length, seed=length)[0] for length in (3, 7, 5)])
    plain, _ = run(steered, padded["input_ids"], attention_mask=padded["attention_mask"])
    assert torch.equal(run(steered, padded["input_ids"])[0], plain)
    ones = torch.ones_like(padded["attention_mask"])
    assert not torch.equal(run(steered, padded["input_ids"], attention_mask=ones)[0], plain)


def test_several_sequences_per_prompt_differ_in_their_codes(steered: SteeredModel) -> None:
    """Greedy tokens too; and a prompt's sequences are the same whatever else is in the batch."""
    tokens, own = prompts(ROWS, PROMPT), [torch.Generator().manual_seed(seed) for seed in range(ROWS)]
    found, trace = run(steered, tokens, num_return_sequences=4, generator=own)
    assert len(found) == 4 * ROWS
    assert len({tuple(row.tolist()) for row in trace.code[:4, 0]}) == 4
    assert len({tuple(row.tolist()) for row in found[:4]}) > 1
    again, alone = run(steered, tokens[1:2], num_return_sequences=4, generator=[torch.Generator().manual_seed(1)])
    assert torch.equal(again, found[4:8])
    close(alone.code, trace.code[4:8])


UNSUITED = {
    "beam search": {"num_beams": 2},
    "beam sample": {"num_beams": 2, "do_sample": True},
    "assisted generation": {"prompt_lookup_num_tokens": 2},
    "use_cache=False": {"use_cache": False},
    "guidance_scale": {"guidance_scale": 1.5},
    "token_healing": {"token_healing": True},
    "a paged cache": {"cache_implementation": "paged"},
    "inputs_embeds": {"inputs_embeds": torch.zeros(ROWS, PROMPT, 32)},
    "custom_generate": {"custom_generate": "somebody/something"},
    "dola generation": {"dola_layers": "high"},
}


@pytest.mark.parametrize("what", UNSUITED)
def test_what_steering_cannot_follow_is_refused(steered: SteeredModel, what: str) -> None:
    with pytest.raises(InternalRLError, match=f"does not work with {what}: every row must grow"):
        run(steered, **UNSUITED[what])


@pytest.mark.versions
def test_assistants_and_used_caches_are_refused(steered: SteeredModel) -> None:
    with pytest.raises(InternalRLError, match="assisted generation"):
        run(steered, assistant_model=steered.base)
    cache = DynamicCache(config=steered.base.config)
    steered.base(input_ids=prompts(ROWS, PROMPT), **cache_input(steered.base, cache))
    recurrent = steered_language_model("mamba2").base(input_ids=prompts(ROWS, PROMPT), use_cache=True)
    silent = SimpleNamespace()  # as a cache that cannot tell what it holds
    for name in ("cache", "past_key_values", "cache_params"):
        for used in (cache, recurrent["cache_params"], silent):
            with pytest.raises(InternalRLError, match="a cache that is not empty"):
                run(steered, **{name: used})
            with pytest.raises(InternalRLError, match="forward was given a cache"):
                steered(input_ids=prompts(ROWS, 1), **{name: used})


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "right padding": ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 3)}, "padding_side='left'"),
    "no prompt": ({"tokens": torch.zeros(ROWS, 0, dtype=torch.long)}, r"shape \(3, 0\)"),
    "one row": ({"tokens": torch.zeros(PROMPT, dtype=torch.long)}, r"shape \(5,\)"),
    "another tokenizer's": ({"tokens": torch.full((ROWS, PROMPT), VOCABULARY)}, "vocabulary has 24; use the tokenizer"),
    "too long": ({"tokens": torch.full((1, 2049), 3)}, "2049 tokens long, but the base's context is 2048"),
    "mask of another shape": ({"attention_mask": torch.ones(ROWS, 2)}, r"shape \(3, 2\), expected that of input_ids"),
    "codes of another size": ({"codes": torch.zeros(N_Z + 1)}, "codes have 4 numbers each, but the adapter's have"),
    "codes of other rows": ({"codes": torch.zeros(2, N_Z)}, r"shape \(2, 1, 3\) for 3 prompts"),
    "codes for no segment": ({"codes": torch.zeros(ROWS, 0, N_Z)}, "for 3 prompts; give finite numbers"),
    "codes that are no numbers": ({"codes": torch.full((N_Z,), torch.nan)}, "give finite numbers"),
    "temperature": ({"code_temperature": -1.0}, "code_temperature is -1.0"),
    "steering": ({"steering": "polite"}, "steering is 'polite'"),
    "adapter": ({"adapter_names": ["default", "other", None]}, "There is no adapter 'other'; known are default"),
    "adapters": ({"adapter_names": ["default"]}, "1 adapter_names for 3 rows"),
    "generators": ({"generator": [torch.Generator()]}, "1 generators for 3 rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_sentence(steered: SteeredModel, name: str) -> None:
    options, why = BAD[name]
    with pytest.raises(InternalRLError, match=why) as refusal:
        steered.generate(
            options.get("tokens", prompts(ROWS, PROMPT)), **{k: options[k] for k in options if k != "tokens"}
        )
    assert "\n" not in str(refusal.value)
    assert sum(len(block._forward_hooks) for block in steered.tap.blocks) == 0


def test_a_policy_that_is_not_there(steered: SteeredModel) -> None:
    steered.policy = None
    with pytest.raises(InternalRLError, match="has no policy yet"):
        run(steered, steering="policy")


# ---------------------------------------------------------------------------------- who chooses the codes


def test_policy_is_the_default_and_prior_where_there_is_none(steered: SteeredModel) -> None:
    asked = {name: run(steered, steering=name)[1].code for name in (None, "policy", "prior")}
    assert torch.equal(asked[None], asked["policy"])
    assert not torch.equal(asked["policy"], asked["prior"])
    steered.policy = None
    assert torch.equal(run(steered)[1].code, asked["prior"])


def test_steering_off_is_the_base(steered: SteeredModel) -> None:
    plain = steered.base.generate(prompts(ROWS, PROMPT), max_new_tokens=NEW)[:, PROMPT:]
    found, trace = run(steered, steering="off")
    assert torch.equal(found, plain)
    assert trace.segments == [[], [], []]
    torch.manual_seed(0)
    sampled = steered.base.generate(prompts(ROWS, PROMPT), max_new_tokens=NEW, do_sample=True)[:, PROMPT:]
    assert torch.equal(run(steered, steering="off", do_sample=True)[0], sampled)
    assert not torch.equal(run(steered)[0], plain)
    with steered.disable_adapter():
        assert torch.equal(run(steered)[0], plain)
        assert torch.equal(run(steered, adapter_names=["default"] * ROWS)[0], plain)


def test_prior_codes_are_standard_normal(steered: SteeredModel) -> None:
    steered.metacontroller.switch_head.bias.data.fill_(1e3)  # a segment per token
    _, trace = run(steered, prompts(64, 2), steering="prior", max_new_tokens=70)
    assert len(trace.code.flatten()) == 64 * 70 * N_Z
    assert trace.code.unique().numel() > 0.99 * trace.code.numel()
    assert abs(float(trace.code.mean())) < 0.03
    assert abs(float(trace.code.std()) - 1) < 0.03


def test_policy_reads_its_switches_in_order(steered: SteeredModel) -> None:
    """At temperature 0 the codes are the means of the policy on what stood at each switch of the row."""
    tokens = prompts(ROWS, PROMPT)
    found, trace = run(steered, tokens, code_temperature=0.0)
    x = steered.metacontroller.read(steered.residual(torch.cat([tokens, found[:, :-1]], 1)))[:, PROMPT - 1 :]
    assert (trace.switch.sum(1) > 1).sum() > 1
    for row in range(ROWS):
        opened = trace.switch[row]
        assert steered.policy is not None
        close(trace.code[row, opened], steered.policy(x[row : row + 1, opened]).mean[0])
    hotter = [run(steered, code_temperature=t)[1].code[:, 0] - trace.code[:, 0] for t in (0.5, 1.0)]
    close(2 * hotter[0], hotter[1])


def test_actors_of_internal_rl_may_choose(steered: SteeredModel) -> None:
    """What a policy's actor saw and chose at the switches is what the trace tells."""
    assert steered.policy is not None
    actor = PolicyActor(steered.policy, ROWS, torch.Generator().manual_seed(0))
    tokens = prompts(ROWS, PROMPT)
    found, trace = run(steered, tokens, steering=actor)
    seen, chosen, mask = actor.segments()
    assert torch.equal(mask.sum(1), trace.switch.sum(1))
    assert torch.equal(chosen[mask], trace.code[trace.switch])
    x = steered.metacontroller.read(steered.residual(torch.cat([tokens, found[:, :-1]], 1)))[:, PROMPT - 1 :]
    close(seen[mask], x[trace.switch])


def test_fixed_codes_stay_in_force(steered: SteeredModel) -> None:
    one, per_row = torch.tensor([1.0, -1.0, 0.5]), torch.randn(ROWS, N_Z)
    for codes, expected in ((one, one.expand(ROWS, NEW, -1)), (per_row, per_row[:, None].expand(-1, NEW, -1))):
        found, trace = run(steered, codes=codes)
        assert torch.equal(trace.code, expected)
        assert trace.switch[:, 1:].any()  # the switch still says where it would have ended
        assert torch.equal(run(steered, seed=1, codes=codes, code_temperature=3.0)[0], found)
    repeated, _ = run(steered, codes=per_row, num_return_sequences=2)
    assert torch.equal(repeated, found.repeat_interleave(2, 0))


def test_codes_per_segment_follow_the_switches(steered: SteeredModel) -> None:
    codes = torch.randn(ROWS, 3, N_Z)
    _, trace = run(steered, codes=codes)
    numbers = (trace.switch.cumsum(1) - 1).clamp(max=2)
    assert numbers.max() == 2
    assert torch.equal(trace.code, codes[torch.arange(ROWS)[:, None], numbers])


def test_codes_depend_on_the_rows_own_seed(steered: SteeredModel) -> None:
    """One generator for all gives a row the same codes whoever comes after it, and however long they go on."""
    tokens = prompts(ROWS, PROMPT)
    for steering in ("policy", "prior"):
        whole, trace = run(steered, tokens, steering=steering, generator=torch.Generator().manual_seed(5))
        two, fewer = run(steered, tokens[:2], steering=steering, generator=torch.Generator().manual_seed(5))
        assert torch.equal(two, whole[:2])
        close(fewer.code, trace.code[:2])
        _, longer = run(
            steered, tokens, steering=steering, generator=torch.Generator().manual_seed(5), max_new_tokens=70
        )
        close(longer.code[:, :NEW], trace.code)
    state = torch.Generator().manual_seed(5).get_state()
    torch.manual_seed(0)
    steered.generate(tokens, max_new_tokens=2, generator=(own := torch.Generator().manual_seed(5)))
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(0).get_state())
    assert not torch.equal(own.get_state(), state)


# ---------------------------------------------------------------------------------- the trace


def test_segments_are_the_text_between_switches(steered: SteeredModel) -> None:
    found, trace = run(steered, tokenizer=tokenizer())
    for row, segments in enumerate(trace.segments):
        assert [segment.start for segment in segments] == trace.switch[row].nonzero().squeeze(-1).tolist()
        assert [s.stop for s in segments] == [*(s.start for s in segments[1:]), NEW]
        assert "".join(str(segment.text) for segment in segments) == tokenizer().decode(found[row])
        for segment in segments:
            assert torch.equal(
                trace.code[row, segment.start : segment.stop], segment.code.expand(segment.stop - segment.start, -1)
            )
    assert run(steered)[1].segments[0][0].text is None


def test_trace_ends_where_a_row_ends(steered: SteeredModel) -> None:
    """Decisions after it, while others go on, are none: reward would be given to them."""
    free, whole = run(steered)
    end = int(free[0, 2])
    steered.base.generation_config.eos_token_id = end
    found, trace = run(steered)
    lengths = [row.index(end) + 1 if end in row else NEW for row in free.tolist()]
    assert min(lengths) < max(lengths) == found.shape[1]
    assert trace.mask.sum(1).tolist() == lengths
    for row, length in enumerate(lengths):
        assert torch.equal(trace.switch[row, :length], whole.switch[row, :length])
        assert not trace.switch[row, length:].any()
        assert trace.segments[row][-1].stop == length


def test_end_of_a_row() -> None:
    tokens = torch.tensor([[5, 2, 0, 0], [5, 2, 2, 2], [5, 6, 0, 0], [5, 0, 6, 7], [2, 0, 0, 0]])
    padded = before_end(tokens, GenerationConfig(eos_token_id=[2], pad_token_id=0))
    assert padded.sum(1).tolist() == [2, 2, 2, 4, 1]
    same = before_end(tokens, GenerationConfig(eos_token_id=2, pad_token_id=2))
    assert same.sum(1).tolist() == [2, 2, 4, 4, 1]
    assert before_end(tokens, GenerationConfig(pad_token_id=0)).all()


def test_trace_of_outputs_in_full(steered: SteeredModel) -> None:
    output, trace = steered.generate(
        prompts(ROWS, PROMPT), max_new_tokens=NEW, return_trace=True, return_dict_in_generate=True, output_scores=True
    )
    assert len(output.scores) == trace.switch.shape[1] == NEW
    assert isinstance(steered.generate(prompts(ROWS, PROMPT), max_new_tokens=2), Tensor)
