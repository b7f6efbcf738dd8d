"""Discovery on texts sees what generation will see, learns completions alone, and splices at learned switches alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from internalrl import cli
from internalrl.base.loading import load_tokenizer
from internalrl.base.pretrain_text import build_language_model, save_language_model
from internalrl.base.text_data import Examples, tokenise
from internalrl.controller.metacontroller import Proposals, Segmentation
from internalrl.controller.steered import SteeredModel
from internalrl.discovery import programs as programs_module
from internalrl.discovery import rehearse, train
from internalrl.discovery.evaluate import alignment
from internalrl.discovery.objective import Coefficients, Episodes, discovery_loss
from internalrl.discovery.programs import CodeDomain
from internalrl.discovery.rehearse import rehearsal_loss
from internalrl.discovery.slow import slow_features
from internalrl.discovery.splice import Cut, splice
from internalrl.discovery.text import TextMaterial, to_batch
from internalrl.domains.code.grammar import PROMPT, CodeConfig, parse, sample_programs, write_jsonl
from internalrl.domains.code.tokenizer import build_tokenizer
from internalrl.errors import InternalRLError
from internalrl.run import loop
from internalrl.settings.stages import MetacontrollerConfig, PretrainTextConfig, RehearseConfig
from tests.support.language import VOCABULARY, steered_language_model
from tests.support.tiny import close

COEFFICIENTS = Coefficients(kl_coef=0.3, switch_cost=0.1)


def examples(count: int = 24, seed: int = 0) -> Examples:
    """Texts of 6 to 14 tokens, 2 to 4 of them the prompt."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 15, count)
    tokens = rng.integers(3, VOCABULARY, lengths.sum(), dtype=np.int32)
    return Examples(tokens, lengths.cumsum(), rng.integers(2, 5, count), pad=0)


def steered_following() -> SteeredModel:
    """A steered llama whose encoder sees the tokens that follow, and whose switch fires now and then."""
    steered = steered_language_model()
    meta = steered.metacontroller
    meta.config = replace(meta.config, view="following")
    return steered


def read(steered: SteeredModel, count: int = 6) -> Episodes:
    return Episodes.of(steered, to_batch(examples().batch(np.arange(count))))


# ---------------------------------------------------------------------------------- what it sees


def test_actions_are_the_next_tokens_of_completions() -> None:
    texts = examples().batch(np.arange(4))
    batch = to_batch(texts)
    for row, prompt in enumerate(texts.prompts.tolist()):
        steps = batch.mask[row].nonzero().squeeze(-1)
        assert steps.tolist() == list(range(prompt - 1, int(texts.real[row].sum()) - 1))
        assert torch.equal(batch.actions[row, steps], texts.tokens[row, steps + 1])


def test_steered_from_the_cached_residual_is_the_full_forward() -> None:
    """With codes from the last prompt token on, for padded texts too."""
    steered = steered_following()
    texts = examples().batch(np.arange(6))
    episodes = read(steered)
    code = torch.randn(*episodes.mask.shape, steered.metacontroller.config.n_z)
    assert episodes.where is not None
    assert not episodes.where[:, 0].any()
    full = steered(input_ids=texts.tokens, code=code, where=episodes.where).logits
    close(steered(episodes.residual, code, episodes.where)[episodes.mask], full[episodes.mask])
    bare = steered.base(input_ids=texts.tokens).logits
    before = ~episodes.where
    close(full[before], bare[before])
    assert (full - bare)[episodes.mask].abs().mean() > 1e-3


def test_it_switches_where_generation_does() -> None:
    """Given the same codes, a whole text is cut as it was when it was generated; the prompts differ in length."""
    steered = steered_following()
    meta = steered.metacontroller
    steered.base.generation_config.eos_token_id = None
    for length in (2, 5):
        prompt = torch.randint(3, VOCABULARY, (3, length))
        codes = torch.randn(3, 12, meta.config.n_z)
        tokens, trace = steered.generate(prompt, codes=codes, max_new_tokens=12, return_trace=True)
        assert 0 < trace.switch[:, 1:].float().mean() < 1
        mask = torch.arange(tokens.shape[1] - 1).expand(3, -1) >= length - 1
        x = meta.read(steered.residual(tokens[:, :-1]))
        proposal = F.pad(trace.code, (0, 0, length - 1, 0))
        segments = meta.segment(x, meta.summarise(x), proposal, "hard", mask=mask)
        assert torch.equal(segments.switch[:, length - 1 :] > 0.5, trace.switch)
        assert not segments.switch[:, : length - 1].any()
        close(segments.logit[:, length:], trace.logit[:, 1:])


def test_the_view_holds_the_following_tokens_and_nothing_before() -> None:
    steered = steered_following()
    first, second = read(steered), read(steered)
    tokens = examples().batch(np.arange(6)).tokens
    earlier = tokens.clone()
    earlier[:, :4] = 5
    changed = steered.metacontroller.slow_features(steered.view(earlier, steered.residual(earlier)))
    close(changed[:, 4:], first.slow[:, 4:])
    assert torch.equal(first.slow, second.slow)
    same = tokens[:, 1:-1] == tokens[0, 3]
    at = first.slow[:, :-2][same]
    close(at, at[:1].expand_as(at))


def test_what_language_models_infer_is_nothing_at_the_first_token() -> None:
    steered = steered_language_model()
    tokens = examples().batch(np.arange(6)).tokens
    inferred = steered.inferred(tokens, steered.residual(tokens))
    close(inferred[:, 0], torch.zeros_like(inferred[:, 0]))
    assert inferred[:, 3:].abs().mean() > 1e-2


def test_without_a_lag_the_features_are_principal_components() -> None:
    x = torch.randn(50, 8, 6) * torch.tensor([5.0, 0.1, 2.0, 1.0, 0.5, 0.2])
    mean, projection, _ = slow_features(x, torch.ones(50, 8, dtype=torch.bool), 3, lag=0)
    found = (x - mean) @ projection
    assert (
        torch.corrcoef(torch.cat([found.flatten(0, 1), x[..., [0, 2, 3]].flatten(0, 1)], 1).T)[:3, 3:]
        .abs()
        .diagonal()
        .min()
        > 0.99
    )


# ---------------------------------------------------------------------------------- what it learns


@pytest.mark.parametrize("mode", ["counterfactual", "straight-through", "soft"])
def test_prompts_are_neither_scored_nor_steered(mode: str) -> None:
    steered = steered_following()
    episodes = read(steered)

    def loss(episodes: Episodes) -> tuple[float, dict[str, float]]:
        torch.manual_seed(3)
        value, metrics = discovery_loss(steered, episodes, COEFFICIENTS, mode)
        return value.item(), metrics

    other = torch.where(episodes.mask, episodes.actions, 7)
    expected, metrics = loss(episodes)
    assert loss(replace(episodes, actions=other))[0] == expected
    unscored = torch.where(episodes.mask, 7, episodes.actions)
    assert loss(replace(episodes, actions=unscored))[0] != expected
    assert 0 < metrics["switches"] < episodes.mask.sum(1).float().mean() - 1


def test_random_switches_leave_the_prompt_alone_and_open_its_completion() -> None:
    steered = steered_following()
    episodes = read(steered)
    given: list[Tensor] = []
    hold = steered.metacontroller.hold

    def recording(x: Tensor, before: Tensor, proposal: Tensor, switch: Tensor) -> object:
        given.append(switch)
        return hold(x, before, proposal, switch)

    steered.metacontroller.hold = recording  # type: ignore[method-assign]
    discovery_loss(steered, episodes, COEFFICIENTS, "counterfactual", random_switch=0.5)
    first = episodes.mask.int().argmax(1)
    for row, step in enumerate(first.tolist()):
        assert not given[0][row, :step].any()
        assert given[0][row, step] == 1


# ---------------------------------------------------------------------------------- splices

TEXTS = [
    Cut([1, 2, 10, 11, 20, 21, 22, 30], [1, 3, 6]),
    Cut([1, 2, 12, 13, 14, 31], [1, 4]),
    Cut([1, 2, 40, 32], [1]),
]


def test_segments_begin_after_switches() -> None:
    assert TEXTS[0].prompt == [1, 2]
    assert TEXTS[0].segments == [[10, 11], [20, 21, 22], [30]]
    assert TEXTS[2].segments == [[40, 32]]


def test_splices_are_made_of_whole_segments_and_end_as_texts_do() -> None:
    """Their switches are at the seams, and at the end of the prompt."""
    found = splice(TEXTS, 200, np.random.default_rng(0), lambda texts: [True] * len(texts))
    assert len(found) == 200
    inner, last = {(10, 11), (20, 21, 22), (12, 13, 14)}, {(30,), (31,), (40, 32)}
    seen = set()
    for text in found:
        *before, end = map(tuple, text.segments)
        assert text.prompt == [1, 2]
        assert set(before) <= inner
        assert end in last
        assert [1, 2, *(token for part in text.segments for token in part)] == text.tokens
        seen.add(tuple(before))
    assert len(seen) == 1 + 3 + 9  # all that can be made of none, one or two segments


def test_only_accepted_splices_are_kept() -> None:
    found = splice(TEXTS, 50, np.random.default_rng(0), lambda texts: [10 not in text for text in texts])
    assert len(found) == 50
    assert not any(10 in text.tokens for text in found)
    assert splice(TEXTS, 5, np.random.default_rng(0), lambda texts: [False] * len(texts)) == []
    short = splice(TEXTS, 50, np.random.default_rng(0), lambda texts: [True] * len(texts), longest=6)
    assert short
    assert all(len(text.tokens) <= 6 for text in short)


@pytest.fixture(scope="module")
def programs() -> tuple[CodeDomain, list[list[int]]]:
    config = CodeConfig()
    tokenizer = build_tokenizer(config)
    texts = sample_programs(config, 30, np.random.default_rng(0)).texts
    return CodeDomain(config, tokenizer), tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_programs_that_do_not_run_are_refused(programs: tuple[CodeDomain, list[list[int]]]) -> None:
    domain, texts = programs
    broken = [text[::-1] for text in texts[:3]]
    assert domain.accept([*texts[:5], *broken]) == [True] * 5 + [False] * 3


def test_programs_cut_at_boundaries_and_spliced_run_and_show_new_transitions(
    programs: tuple[CodeDomain, list[list[int]]],
) -> None:
    domain, texts = programs
    cut = [Cut(text, [5 - 1, *domain.boundaries(text)]) for text in texts]
    spliced = splice(cut, 40, np.random.default_rng(0), domain.accept)
    assert len(spliced) == 40
    readings = [parse(domain.config, domain.text(text.tokens)) for text in spliced]
    assert all(reading.complete for reading in readings)
    assert any(domain.config.unseen[a, b] for r in readings for a, b in pairwise(r.idioms))


def test_forced_codes_are_judged_up_to_the_first_mistake(
    programs: tuple[CodeDomain, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that does what codes say passes everywhere; one that writes `sort` for `reverse` fails there."""
    domain, _ = programs
    config = domain.config
    codes = [torch.full((1, 1), float(k)) for k in range(len(config.idioms))]
    asked = {False: 0, True: 0}

    def writer(mistake: bool) -> Callable[..., list[str]]:
        def write(steered: SteeredModel, chosen: Tensor) -> list[str]:
            texts = []
            for row in chosen.squeeze(-1)[:, :-1].long().tolist():
                chain = [config.idioms[k] for k in row]
                asked[mistake] += row.count(0)
                chain = ["sort" if mistake and idiom == "reverse" else idiom for idiom in chain]
                texts += sample_programs(config, 1, np.random.default_rng(0), chain).texts
            return texts

        return write

    monkeypatch.setattr(domain, "_codes", lambda *given: (codes, codes, torch.full((1, 1), -1.0)))
    material = TextMaterial(examples(), seed=0)
    found = {}
    for mistake in (False, True):
        monkeypatch.setattr(domain, "_write", writer(mistake))
        found[mistake] = domain.forced(steered_following(), material)
    assert set(found[False].values()) == {1.0}
    assert asked[True] == asked[False] > 0
    assert found[True]["forced_first"] == pytest.approx(7 / 8, abs=0.05)
    assert found[True]["forced_corpus"] == pytest.approx(7 / 8, abs=0.05)
    assert found[True]["forced_unseen"] == pytest.approx(7 / 8, abs=0.05)
    assert found[True]["forced_whole"] == pytest.approx((7 / 8) ** 4, abs=0.06)


@pytest.mark.parametrize("early", [0, 1, 2])
def test_codes_of_idioms_are_those_that_are_adopted(
    early: int, programs: tuple[CodeDomain, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a switch that fires at an idiom or a token before it; one that fires elsewhere adopts nothing for it."""
    domain, texts = programs
    base = build_language_model(PretrainTextConfig(layers=2, width=16, heads=2, mlp=16), domain.tokenizer)
    steered = SteeredModel.from_base(base, MetacontrollerConfig(n_z=2, view="following"))
    rows = [{"prompt": PROMPT, "completion": domain.text(text).removeprefix(PROMPT)} for text in texts]
    material = TextMaterial(tokenise(rows, domain.tokenizer, base.config), 0, domain)
    batch = material.measured
    switch = F.pad(batch.boundary, (0, early))[:, early:] | (batch.mask & (batch.mask.cumsum(1) == 1))
    places = torch.arange(switch.shape[1]).expand(switch.shape)  # a code tells where it was read
    mean = torch.stack([places, torch.arange(len(switch))[:, None].expand(switch.shape)], -1)
    found = Segmentation(mean, switch.float(), mean[..., 0]), Proposals(mean, mean, mean)
    monkeypatch.setattr(steered.metacontroller, "parse", lambda *given: found)
    first, later, end = domain._codes(steered, material)
    begin = len(domain.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]) - 1
    assert sum(map(len, first)) == len(end) == len(batch)
    assert all(code[0] == begin for codes in first for code in codes)
    for codes in filter(None, (*later, end)):
        for place, row in torch.stack(codes).tolist():
            assert batch.boundary[row, place + (early if early < 2 else 0)]


def test_rehearsal_learns_from_texts_and_splices() -> None:
    steered = steered_following()
    material = TextMaterial(examples(60), seed=0)
    config = RehearseConfig(batch_size=8, batches=4)
    batches = material.rehearsals(steered, config, steered.metacontroller)
    assert sum(len(batch.switch) for batch in batches) >= 24
    for batch in batches:
        first = batch.episodes.mask.int().argmax(1)
        assert batch.switch[torch.arange(len(first)), first].all()
        assert not (batch.switch & ~batch.episodes.mask).any()
        assert not batch.free[torch.arange(len(first)), first].any()
    loss, metrics = rehearsal_loss(steered, batches[0], 0.3, 0.3)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in steered.metacontroller.parameters())
    assert metrics["switch_loss"] > 0


def test_held_out_texts_are_not_learned_from() -> None:
    steered, material = steered_following(), TextMaterial(examples(60), seed=0)
    assert len(material.measured) == 6
    measured = {tuple(row[row > 0].tolist()) for row in material.measured.observations}
    sampled = {tuple(row[row > 0].tolist()) for row in material.sample(200).observations}
    assert len(sampled) == 54
    assert not measured & sampled
    assert set(alignment(steered, material.measured)) == {"hard_nll", "switch_f1", "hard_switches", "true_switches"}


def test_a_single_text_is_refused() -> None:
    with pytest.raises(InternalRLError, match="give two or more"):
        TextMaterial(examples(1), seed=0)


# ---------------------------------------------------------------------------------- the command line

TINY = """
metacontroller: {n_z: 3, n_h: 5, n_s: 8, encoder_hidden: 6, switch_hidden: 7, controller_hidden: 4, rank: 2,
  slow_features: 4, horizon: 3, controller_init: 0.4, switch_bias: 0.3}
form_steps: 2
squeeze_steps: 1
switch_steps: 2
hold_steps: 1
rise_steps: 1
batch_size: 8
batches: 3
consolidate: {rehearse: {rounds: 2, steps: 2, batch_size: 8, batches: 4}}
"""


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with a language model and its tokenizer, and a file of 40 programs."""
    config = CodeConfig()
    tokenizer = build_tokenizer(config)
    sizes = PretrainTextConfig(layers=2, width=32, heads=2, mlp=16)
    save_language_model(build_language_model(sizes, tokenizer), tokenizer, tmp_path / "model")
    write_jsonl(tmp_path / "corpus.jsonl", config, 40, np.random.default_rng(0))
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path / "model", tmp_path / "corpus.jsonl"


@pytest.mark.filterwarnings("ignore:The (switch|codes)", "ignore:No spliced text")
@pytest.mark.parametrize("domain", ["text", "code"])
def test_discover_from_the_command_line(
    domain: str, corpus: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run holds base, tokenizer and adapter."""
    monkeypatch.setattr(programs_module, "MEASURED", 4)
    model, data = corpus
    options = ["--preset", "text", "--config", str(tmp_path / "tiny.yaml"), "--domain", domain]
    run = ["discover", "--base", str(model), "--data", str(data), *options, "--run", str(tmp_path / "run")]
    assert cli.main(run) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"hard_nll", "hard_switches"} <= summary.keys()
    assert ("forced_unseen" in summary) == (domain == "code")
    steered = SteeredModel.from_pretrained(tmp_path / "run" / "base", tmp_path / "run" / "adapter")
    assert steered.metacontroller.config.view == "following"
    assert load_tokenizer(tmp_path / "run" / "base").eos_token_id is not None
    stages = {row["stage"] for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())}
    assert stages == {"discover", "rehearse"}


@pytest.mark.filterwarnings("ignore:The (switch|codes)")
@pytest.mark.parametrize(("stage", "step"), [("discover", 3), ("rehearse", 1), ("rehearse", 3)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    stage: str, step: int, corpus: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second round of rehearsal, too, whose splices are cut at the switches of its beginning."""
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    for module in (train, rehearse):
        monkeypatch.setattr(module, "LOG_EVERY", 1)
    model, data = corpus
    run = ["discover", "--preset", "text", "--config", str(tmp_path / "tiny.yaml"), "--base", str(model)]
    run += ["--data", str(data), "--run"]
    assert cli.main([*run, str(tmp_path / "whole")]) == 0
    log = loop.Loop.log

    def dying(self: loop.Loop, **metrics: Any) -> None:
        log(self, **metrics)
        if (self.stage, self.step) == (stage, step):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "log", dying)
        assert cli.main([*run, str(tmp_path / "killed")]) == 130
    assert cli.main([*run, str(tmp_path / "killed"), "--resume"]) == 0
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "nothing.jsonl"], "Cannot read nothing.jsonl"),
        (["--base", "nowhere"], "nowhere holds no whole model"),
        (["--domain", "code-large"], "The tokenizer does not match these programs"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    change: list[str], message: str, corpus: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = corpus
    run = ["discover", "--preset", "text", "--base", str(model), "--data", str(data), "--run", str(tmp_path / "run")]
    assert cli.main([*run, *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_grid_has_no_tokens_to_follow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["discover", "--metacontroller.view", "following", "--run", str(tmp_path / "run")]) == 2
    assert "No tokens follow on the grid" in capsys.readouterr().err
