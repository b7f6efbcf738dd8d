"""The engine: what is asked for together is answered as if alone, and nothing that goes wrong hurts anybody else."""

from __future__ import annotations

import asyncio
import copy
import gc
import itertools
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from internalrl.controller.steered import SteeredModel
from internalrl.errors import InternalRLError
from internalrl.players.engine.engine import Busy, Engine, EngineConfig
from internalrl.players.engine.requests import Request, SegmentRecord
from internalrl.strategies.library import Library, Strategy
from internalrl.strategies.limits import Limits, LimitsConfig
from tests.support.answers import Answer, prompt, read, same, wait_until
from tests.support.forgetting import LOSSES, make_forgetful
from tests.support.language import adapter_sizes, language_model, randomise, steer
from tests.support.served import byte_tokenizer, save_adapter, served_base

TOKENIZER = byte_tokenizer()
BROKEN_CODE = ((-1e30,) * 3,)
END = 0


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return served_base()


@pytest.fixture(scope="module")
def models(base: PreTrainedModel) -> dict[str, SteeredModel]:
    """With a policy; without; and at another layer, with longer codes."""
    other = SteeredModel.from_base(base, adapter_sizes(layer=3, n_z=5))
    randomise(other, 3)
    return {"policy": steer(base, 1, policy=True), "prior": steer(base, 2), "other": other}


@pytest.fixture
def engine(base: PreTrainedModel, models: dict[str, SteeredModel]) -> Iterator[Engine]:
    with engine_of(base, models, slots=4, queue=100) as engine:
        yield engine


def engine_of(base: PreTrainedModel, models: dict[str, SteeredModel], on_segment: Any = None, **sizes: int) -> Engine:
    engine = Engine(base, TOKENIZER, EngineConfig(**sizes), on_segment)
    for key, model in models.items():
        engine.add_adapter(key, model.adapter)
    return engine


# -- the same answer, whatever else is in the batch ---------------------------------------------------------


def mixed(count: int) -> list[Request]:
    """Of every kind, with prompts of 1 to 40 tokens."""
    dice, made = random.Random(0), []
    for number in range(count):
        adapter = dice.choice(["policy", "policy", "prior", "other", None])
        options: dict[str, Any] = {"steering": dice.choice([None, None, "off"])}
        if adapter is not None and dice.random() < 0.2:
            n_z = 5 if adapter == "other" else 3
            codes = tuple(tuple(dice.gauss(0, 2) for _ in range(n_z)) for _ in range(dice.randint(1, 3)))
            options = {"codes": codes}
        made.append(
            Request(
                prompt(dice.randint(1, 40), number),
                adapter,
                max_tokens=dice.randint(1, 24),
                temperature=dice.choice([0, 0.5, 1, 1.3]),
                top_p=dice.choice([1, 1, 0.8]),
                top_k=dice.choice([0, 0, 20]),
                seed=number,
                code_temperature=dice.choice([0, 1, 2]),
                **options,
            )
        )
    return made


@pytest.fixture(scope="module")
def alone(base: PreTrainedModel, models: dict[str, SteeredModel]) -> list[Answer]:
    """Answers to 64 requests, one after the other."""
    with engine_of(base, models, slots=1) as engine:
        return [read(engine.submit(request)) for request in mixed(64)]


@pytest.mark.parametrize(("slots", "prefill"), [(1, 7), (8, 256), (8, 5), (64, 100)])
def test_answers_do_not_depend_on_what_else_is_running(
    base: PreTrainedModel, models: dict[str, SteeredModel], alone: list[Answer], slots: int, prefill: int
) -> None:
    """They arrive now and then, and requests between them are cancelled after some tokens."""
    streams, between = [], []
    with engine_of(base, models, slots=slots, queue=200, prefill=prefill) as engine:
        for number, request in enumerate(mixed(64)):
            streams.append(engine.submit(request))
            if number % 4 == 0:
                between.append(engine.submit(replace(request, seed=1000 + number, max_tokens=60)))
            if number % 16 == 15:
                next(iter(between[-3]))
                between[-3].cancel()
        for stream in between:
            stream.cancel()
        for stream, expected in zip(streams, alone, strict=True):
            same(read(stream), expected)


def test_some_answers_have_many_segments_and_differ(alone: list[Answer]) -> None:
    """Else the tests above would prove little."""
    assert sum(len(answer.end.segments) > 3 for answer in alone) > 10
    assert len({tuple(answer.numbers[:6]) for answer in alone if len(answer.numbers) > 5}) > 30


@pytest.mark.parametrize(
    ("adapter", "how"),
    [
        (None, {}),
        *itertools.product(
            ["policy", "prior", "other"],
            [{}, {"steering": "prior"}, {"steering": "off"}, {"codes": True}, {"code_temperature": 0.5}],
        ),
    ],
)
def test_greedy_answers_are_those_of_generate(
    engine: Engine, models: dict[str, SteeredModel], adapter: str | None, how: dict[str, Any]
) -> None:
    model, how = models[adapter or "prior"], dict(how)
    given = dict(how) if adapter else {"steering": "off"}
    if how.pop("codes", None):
        codes = torch.randn(3, model.metacontroller.config.n_z)
        how["codes"], given["codes"] = tuple(map(tuple, codes.tolist())), codes[None]
    text = prompt(9, 5)
    streams = [
        engine.submit(Request(text, adapter, max_tokens=30, temperature=0, seed=seed, **how)) for seed in range(3)
    ]
    answers = list(map(read, streams))  # the base is the engine's until all are there
    for seed, answer in enumerate(answers):
        sequence, trace = model.generate(
            torch.tensor([text]),
            max_new_tokens=30,
            do_sample=False,
            generator=torch.Generator().manual_seed(seed),
            return_trace=True,
            tokenizer=TOKENIZER,
            **given,
        )
        assert answer.numbers == sequence[0, len(text) :].tolist()
        assert [(s.start, s.stop) for s in answer.end.segments] == [(s.start, s.stop) for s in trace.segments[0]]
        for record, segment in zip(answer.end.segments, trace.segments[0], strict=True):
            assert record.code == pytest.approx(segment.code.tolist(), abs=1e-4)
            expected = trace.logit[0, segment.start].sigmoid().item()
            assert record.switch_probability == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi3", "olmo2", "falcon", "qwen3", "mixtral"])
def test_other_architectures(kind: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None  # the base has its own
    model = steer(language_model(kind), policy=True)
    rows = [tuple(row[:length].tolist()) for row, length in zip(torch.randint(3, 24, (3, 12)), (12, 3, 7), strict=True)]
    with Engine(model.base, tokenizer, EngineConfig(slots=3)) as engine:
        engine.add_adapter("it", model.adapter)
        streams = [engine.submit(Request(row, "it", max_tokens=16, temperature=0, seed=1)) for row in rows]
        answers = [read(stream).numbers for stream in streams]
    for row, answer in zip(rows, answers, strict=True):
        generator = torch.Generator().manual_seed(1)
        alone = model.generate(torch.tensor([row]), max_new_tokens=16, do_sample=False, generator=generator)
        assert answer == alone[0, len(row) :].tolist()


def test_a_seed_is_drawn_and_told(engine: Engine) -> None:
    request = Request(prompt(), "policy", max_tokens=12)
    first, second = engine.submit(request), engine.submit(request)
    answers = [read(first), read(second)]
    assert first.request.seed != second.request.seed
    same(read(engine.submit(first.request)), answers[0])


# -- events ------------------------------------------------------------------------------------------------


def test_text_of_all_events_is_the_answer(engine: Engine) -> None:
    answer = read(engine.submit(Request(prompt(), "policy", max_tokens=60, seed=3)))
    assert answer.text == TOKENIZER.decode(answer.numbers, skip_special_tokens=True)
    assert "".join(segment.text for segment in answer.end.segments) == answer.text


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(engine: Engine) -> None:
    request = Request(prompt(), "policy", max_tokens=60, seed=3)
    whole = read(engine.submit(request)).text
    stop = next(whole[at : at + 3] for at in range(10, len(whole)) if whole[at : at + 3].isascii())
    answer = read(engine.submit(replace(request, stop=("never there", stop))))
    assert answer.text == whole[: whole.index(stop)]
    assert answer.end.reason == "stop"


def test_logprobs_are_those_of_the_steered_model(engine: Engine, models: dict[str, SteeredModel]) -> None:
    text = prompt()
    request = Request(text, "policy", max_tokens=12, temperature=0, logprobs=3, seed=4)
    answer = read(engine.submit(request))
    generator = torch.Generator().manual_seed(4)
    sequence, trace = models["policy"].generate(
        torch.tensor([text]), max_new_tokens=12, do_sample=False, generator=generator, return_trace=True
    )
    logits = models["policy"](input_ids=sequence[:, :-1], **trace.along(len(text))).logits[0, len(text) - 1 :]
    expected = logits.log_softmax(-1)
    found = torch.tensor([token.logprob for token in answer.tokens])
    assert_close(found, expected[range(len(found)), answer.numbers], atol=1e-4, rtol=0)
    for token, row in zip(answer.tokens, expected, strict=True):
        assert [number for number, _ in token.top] == row.topk(3).indices.tolist()
        assert token.top[0] == pytest.approx((token.number, token.logprob))
    for segment in answer.end.segments:
        assert segment.log_probability == pytest.approx(found[segment.start : segment.stop].sum().item(), abs=1e-3)
    assert read(engine.submit(replace(request, logprobs=None))).tokens[0].logprob is None


def test_answers_end_at_max_tokens_at_the_context_and_at_end_tokens(
    base: PreTrainedModel, models: dict[str, SteeredModel]
) -> None:
    with engine_of(base, models, slots=2, context=40) as engine:
        request = Request(prompt(30), "prior", max_tokens=5, temperature=0, seed=0)
        assert [len(read(engine.submit(replace(request, max_tokens=n))).tokens) for n in (1, 5)] == [1, 5]
        long = read(engine.submit(replace(request, max_tokens=1000)))
        assert (len(long.tokens), long.end.reason) == (10, "length")
        ended = [read(engine.submit(Request(prompt(), seed=seed, temperature=3))) for seed in range(40)]
        stopped = [answer for answer in ended if answer.end.reason == "stop"]
        assert stopped
        assert all(answer.numbers[-1] == END and END not in answer.numbers[:-1] for answer in stopped)
        with pytest.raises(InternalRLError, match="40 tokens long, but prompt and answer together may have 40"):
            engine.submit(Request(prompt(40)))


def test_segments_are_told_before_the_end_and_tile_the_answer(
    base: PreTrainedModel, models: dict[str, SteeredModel]
) -> None:
    told: list[tuple[str, SegmentRecord]] = []
    with engine_of(base, models, lambda request, record: told.append((request.id, record)), slots=4) as engine:
        streams = [engine.submit(Request(prompt(seed=n), "policy", max_tokens=30, seed=n)) for n in range(6)]
        for stream in streams:
            answer = read(stream)
            assert [record for name, record in told if name == stream.request.id] == list(answer.end.segments)
            starts = [record.start for record in answer.end.segments]
            assert starts[0] == 0
            assert [record.stop for record in answer.end.segments] == [*starts[1:], len(answer.tokens)]
            assert [record.index for record in answer.end.segments] == list(range(len(starts)))
        read(engine.submit(Request(prompt(), "policy", steering="off", max_tokens=3)))
        read(engine.submit(Request(prompt(), max_tokens=3)))
        assert engine.stats().segments == len(told) > 20


def test_a_coroutine_can_read(engine: Engine) -> None:
    requests = [Request(prompt(seed=n), "prior", max_tokens=10, seed=n) for n in range(5)]

    async def answer(request: Request) -> Answer:
        *tokens, end = [event async for event in engine.submit(request)]
        return Answer(tokens, end)  # type: ignore[arg-type]

    async def together() -> list[Answer]:
        return await asyncio.gather(*map(answer, requests))

    for request, found in zip(requests, asyncio.run(together()), strict=True):
        same(found, read(engine.submit(request)))


# -- limits -------------------------------------------------------------------------------------------------


def limits(**options: Any) -> Limits:
    """Strategies "left" and "right", by the sign of the code's first number."""
    near = [
        Strategy(n, name, (x, 0.0, 0.0), 100.0, 0.5)
        for n, (name, x) in enumerate({"left": -1.0, "right": 1.0}.items(), 1)
    ]
    return Limits(Library("any", "prior", 10, 0.5, tuple(near)), LimitsConfig(**options))


def limited(base: PreTrainedModel, models: dict[str, SteeredModel], **options: Any) -> Engine:
    engine = engine_of(base, models, slots=4)
    engine.add_adapter("limited", models["policy"].adapter, limits(**options))
    return engine


@pytest.mark.parametrize("on_denied", ["project", "resample", "off"])
def test_denied_codes_do_not_steer(base: PreTrainedModel, models: dict[str, SteeredModel], on_denied: str) -> None:
    """And what they become depends on nothing else in the batch."""
    with limited(base, models, strategies={"left": "deny"}, on_denied=on_denied) as engine:
        requests = [
            Request(prompt(seed=n), "limited", max_tokens=20, seed=n, steering="prior" if n % 2 else None)
            for n in range(6)
        ]
        answers = [read(stream) for stream in [engine.submit(request) for request in requests]]
        for request, answer in zip(requests, answers, strict=True):
            same(read(engine.submit(request)), answer)
        violations = engine.stats().violations
    records = [record for answer in answers for record in answer.end.segments]
    denied = [record for record in records if record.violation]
    assert 0 < len(denied) < len(records)
    assert violations == 2 * len(denied)
    for record in records:
        if record.violation and on_denied == "off":
            assert record.code == ()
            assert record.strategy is None
        else:
            assert record.code[0] > 0
            assert record.strategy == "right"


def test_what_is_switched_off_is_the_bare_base(base: PreTrainedModel, models: dict[str, SteeredModel]) -> None:
    everything = {"strategies": {"left": "deny", "right": "deny"}, "on_denied": "off"}
    with limited(base, models, **everything) as engine:
        request = Request(prompt(), "limited", max_tokens=20, temperature=0, seed=1)
        answer, bare = read(engine.submit(request)), read(engine.submit(replace(request, adapter=None)))
        assert answer.numbers == bare.numbers
        assert answer.end.segments
        assert answer.numbers != read(engine.submit(replace(request, adapter="policy"))).numbers


def test_codes_chosen_beforehand_are_projected(base: PreTrainedModel, models: dict[str, SteeredModel]) -> None:
    with limited(base, models, strategies={"left": "deny"}, on_denied="resample") as engine:
        answer = read(engine.submit(Request(prompt(), "limited", codes=((-2.0, 0.5, 0.0),), max_tokens=4, seed=0)))
    assert answer.end.segments[0].code == pytest.approx((0, 0.5, 0), abs=1e-2)
    assert answer.end.segments[0].violation == "denied left: project"


@pytest.mark.parametrize("on_outcome", ["stop", "record"])
def test_a_filter_ends_the_answer_or_is_recorded(
    base: PreTrainedModel, models: dict[str, SteeredModel], on_outcome: str
) -> None:
    options = {"filters": ("tests.support.served:not_ascii",), "on_outcome": on_outcome}
    with limited(base, models, **options) as engine:
        request = Request(prompt(), "limited", max_tokens=40, seed=2)
        answer, free = read(engine.submit(request)), read(engine.submit(replace(request, adapter="policy")))
    objected = [record.violation is not None for record in answer.end.segments]
    assert any(objected)
    if on_outcome == "record":
        same(Answer(answer.tokens, replace(answer.end)), free)
        assert objected == [
            not "".join(r.text for r in answer.end.segments[: n + 1]).isascii() for n in range(len(objected))
        ]
    else:
        assert answer.end.reason == "stop"
        assert objected == [*[False] * (len(objected) - 1), True]
        assert answer.numbers == free.numbers[: len(answer.numbers)]
        assert len(answer.numbers) == answer.end.segments[-1].stop < len(free.numbers)


# -- slots, queue, errors -----------------------------------------------------------------------------------


def test_cancelling_frees_the_slot_and_the_queue(base: PreTrainedModel, models: dict[str, SteeredModel]) -> None:
    with engine_of(base, models, slots=1, queue=1) as engine:
        running, waiting = (engine.submit(Request(prompt(), max_tokens=400, temperature=0)) for _ in range(2))
        with pytest.raises(Busy, match="1 requests are waiting"):
            engine.submit(Request(prompt()))
        waiting.cancel()
        assert read(waiting).end.reason == "cancelled"
        next(iter(running))
        running.cancel()
        running.cancel()
        assert read(running).end.reason == "cancelled"
        assert len(read(engine.submit(Request(prompt(), max_tokens=3))).tokens) == 3
        assert (engine.stats().running, engine.stats().waiting) == (0, 0)


def test_closing_ends_what_is_running_and_waiting(base: PreTrainedModel, models: dict[str, SteeredModel]) -> None:
    engine = engine_of(base, models, slots=1)
    streams = [engine.submit(Request(prompt(), "prior", max_tokens=400)) for _ in range(3)]
    engine.close()
    engine.close()
    assert {read(stream).end.reason for stream in streams} <= {"cancelled", "stop"}
    with pytest.raises(InternalRLError, match="closed"):
        engine.submit(Request(prompt()))


def test_output_that_is_not_finite_ends_its_own_request(engine: Engine) -> None:
    """Again and again, so that rows are taken over from broken ones."""
    good = Request(prompt(), "prior", max_tokens=30, seed=1)
    expected = read(engine.submit(good))
    streams = []
    for number in range(12):
        streams.append((engine.submit(replace(good, codes=BROKEN_CODE, seed=number)), "error"))
        streams.append((engine.submit(good), expected.end.reason))
    for stream, reason in streams:
        answer = read(stream)
        assert answer.end.reason == reason
        if reason == "error":
            assert answer.end.error is not None
            assert "not finite" in answer.end.error
        else:
            same(answer, expected)
    assert engine.stats().errors == 12


def test_an_error_in_one_request_is_told_to_it_alone(base: PreTrainedModel, models: dict[str, SteeredModel]) -> None:
    def picky(request: Request, _: SegmentRecord) -> None:
        if request.id == "bad":
            raise RuntimeError("a secret of the server")

    with engine_of(base, models, picky, slots=4) as engine:
        good = Request(prompt(), "policy", max_tokens=20, seed=1)
        streams = [engine.submit(replace(good, id=name)) for name in ("one", "bad", "two")]
        one, bad, two = map(read, streams)
        assert bad.end.reason == "error"
        assert "secret" not in str(bad.end.error)
        same(one, two)
        assert one.end.reason != "error"


def test_the_engine_survives_a_failing_step(base: PreTrainedModel, models: dict[str, SteeredModel]) -> None:
    with engine_of(base, models, slots=2) as engine:
        good = Request(prompt(), "policy", max_tokens=20, seed=1)
        expected = read(engine.submit(good))
        running = engine.submit(replace(good, max_tokens=400, temperature=0))
        next(iter(running))

        def fail(*_: Any) -> None:
            raise RuntimeError("the device is on fire")

        handle = base.register_forward_pre_hook(fail)
        assert read(running).end.reason == "error"
        handle.remove()
        same(read(engine.submit(good)), expected)


@pytest.mark.versions
@pytest.mark.parametrize("loss", LOSSES)
def test_a_base_that_loses_the_past_answers_nothing(loss: str) -> None:
    """Neither the request whose prompt is read nor those that are running go on as if nothing had been read."""
    base, question = language_model("falcon"), (3, 7, 5, 9)  # one that fills a cache itself
    with engine_of(base, {}, slots=2) as engine:
        running = engine.submit(Request(question, max_tokens=2000, temperature=0))
        next(iter(running))
        make_forgetful(base, loss)
        answers = [read(running), read(engine.submit(Request(question, max_tokens=4)))]
    for answer in answers:
        assert answer.end.reason == "error"
        assert "decodes without its past" in str(answer.end.error)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"prompt": ()}, "empty"),
        ({"prompt": (1, 999)}, "vocabulary"),
        ({"adapter": "nobody"}, "no adapter 'nobody'; known are policy"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"seed": 2**70}, "seed"),
        ({"logprobs": -1}, "logprobs"),
        ({"stop": ("a", "")}, "stop text is empty"),
        ({"code_temperature": float("inf")}, "code_temperature is inf"),
        ({"codes": ((1.0, 2.0),)}, "n_z = 3"),
        ({"codes": ((1.0, 2.0, float("nan")),)}, "finite"),
        ({"codes": ((1.0, 2.0, 3.0), (1.0,))}, "differ in their size"),
        ({"codes": ()}, "codes"),
        ({"adapter": "prior", "steering": "policy"}, "no policy"),
        ({"adapter": None, "codes": ((1.0, 2.0, 3.0),)}, "bare base has no codes"),
        ({"steering": "off", "codes": ((1.0, 2.0, 3.0),)}, "leave one of them out"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_sentence(
    engine: Engine, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InternalRLError, match=complaint):
        engine.submit(replace(Request(prompt(), "policy"), **options))
    assert engine.stats().waiting == 0


# -- adapters -----------------------------------------------------------------------------------------------


def test_adapters_come_and_go_while_others_run(
    base: PreTrainedModel, models: dict[str, SteeredModel], tmp_path: Path
) -> None:
    folder = save_adapter(base, tmp_path / "new", seed=8)
    with engine_of(base, models, slots=4) as engine:
        request = Request(prompt(), "policy", max_tokens=300, temperature=0, seed=1)
        running = engine.submit(request)
        events = iter(running)
        next(events)
        gc.collect()  # of a large process it takes longer than what is timed
        began = time.perf_counter()
        engine.add_adapter("new", folder)
        seconds = time.perf_counter() - began
        assert read(engine.submit(Request(prompt(), "new", max_tokens=5))).end.segments
        engine.remove_adapter("policy")
        assert engine.adapters == ("prior", "other", "new")
        with pytest.raises(InternalRLError, match="no adapter 'policy'"):
            engine.submit(request)
        with pytest.raises(InternalRLError, match="no adapter 'policy'"):
            engine.remove_adapter("policy")
        assert sum(1 for _ in events) > 100  # it finishes on what it began with
        with pytest.raises(InternalRLError, match="already"):
            engine.add_adapter("new", folder)
    assert seconds < 1  # 0.1 on a quiet machine: benchmarks/serving.py


def memory_of_matrices(base: PreTrainedModel) -> set[int]:
    """Where the tensors lie that have the shape of one of the base's matrices."""
    gc.collect()
    shapes = {parameter.shape for parameter in base.parameters() if parameter.ndim == 2}
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.shape in shapes}


def test_adapters_share_the_base_and_nothing_copies_it(base: PreTrainedModel, tmp_path: Path) -> None:
    folders = {key: save_adapter(base, tmp_path / key, seed) for seed, key in enumerate(("one", "two", "three"))}
    own, before = [parameter.data_ptr() for parameter in base.parameters()], memory_of_matrices(base)
    with Engine(base, TOKENIZER) as engine:
        for key, folder in folders.items():
            engine.add_adapter(key, folder)
        running = [engine.submit(Request(prompt(), key, max_tokens=400, temperature=0)) for key in folders]
        for stream in running:
            next(iter(stream))
        assert memory_of_matrices(base) == before
        assert [parameter.data_ptr() for parameter in base.parameters()] == own
    copied = copy.deepcopy(base)
    assert len(memory_of_matrices(copied) - before) == sum(p.ndim == 2 for p in base.parameters())


def test_an_adapter_of_another_base_is_refused(engine: Engine, tmp_path: Path) -> None:
    other = served_base(seed=5)
    with pytest.raises(InternalRLError, match="another model"):
        engine.add_adapter("foreign", steer(other).adapter)
    with pytest.raises(InternalRLError, match="fingerprint"):
        engine.add_adapter("foreign", save_adapter(other, tmp_path / "foreign"))


def test_many_threads_submit_read_and_cancel(engine: Engine) -> None:
    requests = [Request(prompt(seed=n), "policy", max_tokens=15, seed=n) for n in range(12)]
    expected = [read(engine.submit(request)) for request in requests]
    failures: list[BaseException] = []

    def client(offset: int) -> None:
        try:
            for number in range(offset, 12, 4):
                engine.submit(replace(requests[number], max_tokens=200)).cancel()
                same(read(engine.submit(requests[number])), expected[number])
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=client, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    wait_until(lambda: engine.stats().running == 0)
