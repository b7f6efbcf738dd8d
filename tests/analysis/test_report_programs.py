"""The report on programs, and what it measures, on a tiny untrained model and on programs made by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from internalrl.analysis.report import programs, report
from internalrl.analysis.report.programs import (
    NO_IDIOM,
    Piece,
    Program,
    code_of,
    following,
    idiom_of,
    in_idioms,
    obedience,
    segments,
)
from internalrl.controller.policy import PolicyActor
from internalrl.discovery import programs as measuring
from internalrl.discovery.programs import CodeDomain
from internalrl.domains.code.grammar import END, CodeConfig, log_prob, parse, sample_programs
from internalrl.domains.code.idioms import variants
from internalrl.domains.code.tokenizer import build_tokenizer
from internalrl.run.folder import RunFolder
from internalrl.settings.stages import ReportConfig
from tests.support.programs import finished_code_run
from tests.support.served import byte_tokenizer
from tests.support.written import letters

CODE = CodeConfig()
K = len(CODE.idioms)
FEW = ReportConfig(episodes=8)


@pytest.fixture(scope="module")
def few() -> Iterator[None]:
    """An untrained model hardly ever ends a program: not too many of them, and not too long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "LONGEST", 60)
        patch.setattr(measuring, "LONGEST", 40)
        patch.setattr(measuring, "MEASURED", 8)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, few: None) -> RunFolder:
    run = finished_code_run(tmp_path_factory.mktemp("runs") / "programs")
    report.main(FEW, run)
    return run


@pytest.fixture(scope="module")
def material(whole: RunFolder) -> programs.ProgramMaterial:
    found = report.open_material(whole, 8)
    assert isinstance(found, programs.ProgramMaterial)
    return found


def page(run: RunFolder) -> str:
    return (run.path / "report.html").read_text(encoding="utf-8")


def text_of(*idioms: str) -> list[str]:
    """Each idiom in its first form."""
    return [variants(idiom)[0][0].text for idiom in idioms]


def made(*parts: str) -> Program:
    """A program whose segments are `parts`."""
    codes = np.eye(len(parts), dtype=np.float32)
    pieces = tuple(Piece(part, idiom_of(CODE, part), code) for part, code in zip(parts, codes, strict=True))
    return Program(pieces, (), "runs")


def number(idiom: str) -> int:
    return CODE.idioms.index(idiom)


def test_sections_and_drawings(whole: RunFolder) -> None:
    html = page(whole)
    ids = ["headline", "pretrain", "discover", "consolidate", "codes", "reinforce", "programs", "settings"]
    assert re.findall(r'<section id="(\w+)">', html) == ids
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 6 + 1 + 1 + 4 + 5
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert set(re.findall(r'(?:href|src)="([^"#])', html)) == set(), "links lead to places in the page"
    assert "88 %" in html
    assert "that pass all tests" in html
    assert "total → index → unique" in html
    assert "total → index → unique → rotate" not in html, "the run's own task"


def test_programs_before_and_after(whole: RunFolder, material: programs.ProgramMaterial) -> None:
    section = page(whole).split('<section id="programs">')[1].split("</section>")[0]
    kinds = re.split(r"<h3>", section)[1:]
    assert [kind.split("</h3>")[0] for kind in kinds] == ["The bare model", "Random codes", "The trained policy"]
    for kind, written in zip(kinds, (material.bare, material.random, material.trained), strict=True):
        printed = [re.sub(r"<.*?>", "", pre) for pre in re.findall(r"<pre>(.*?)</pre>", kind, re.DOTALL)]
        assert len(printed) == 4
        for text, program in zip(printed, written, strict=False):
            whole_text = "def f(x):\n    " + "".join(piece.text for piece in program.pieces)
            assert re.sub(r"&(#?\w+);", "&", text).split() == re.sub("[<>&'\"]", "&", whole_text).split()
    colored = re.findall(r"<span style", kinds[2])
    assert len(colored) == sum(len(program.pieces) for program in material.trained[:4]) > 8


def test_report_is_the_same_every_time(whole: RunFolder) -> None:
    before = page(whole)
    torch.manual_seed(5)
    report.main(FEW, whole)
    assert page(whole) == before


@pytest.mark.usefixtures("few")
def test_a_run_of_one_stage_has_no_task_of_the_demo(tmp_path: Path) -> None:
    run = finished_code_run(tmp_path / "run")
    stored = run.path / "config.json"
    run.write_json("config.json", {**json.loads(stored.read_text()), "config": {"domain": "code", "temperature": 0.3}})
    report.main(FEW, run)
    assert "own reward functions" in page(run)
    assert "programs that run" in page(run)
    assert "that pass all tests" not in page(run)


@pytest.mark.usefixtures("few")
def test_what_was_not_run_is_left_out(tmp_path: Path) -> None:
    run = finished_code_run(tmp_path / "run", policy=False)
    assert "reinforce" not in report.main(FEW, run)["sections"]
    assert "The trained policy" not in page(run)
    assert "Random codes" in page(run)


def test_programs_are_known_by_settings_or_words() -> None:
    """Any tokenizer may serve for programs; one of their words serves for nothing else."""
    own, other, large = build_tokenizer(CODE), letters(), CodeConfig.large()
    assert code_of({"discover": {"domain": "code"}}, other) == code_of({"idioms": 4}, other) == CODE
    assert code_of({"domain": "code-large"}, other) == code_of({}, build_tokenizer(large)) == large
    assert code_of({"domain": "text"}, own) == CODE
    assert code_of({"domain": "text"}, other) is code_of({}, byte_tokenizer()) is None


def test_segments_are_cut_where_codes_were_chosen(material: programs.ProgramMaterial) -> None:
    """Written again under the same random numbers: a piece for each code that the policy was asked for."""
    assert material.steered is not None
    assert material.steered.policy is not None
    actor = PolicyActor(material.steered.policy, 5, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    found = programs.write(material.models, material.steered, actor, 5, 0.5, generator)
    _, chosen, mask = actor.segments()
    assert mask.sum() > 20
    for program, codes, real in zip(found, chosen, mask, strict=True):
        assert 0 <= int(real.sum()) - len(program.pieces) <= 1, "the end of text may have a segment of its own"
        for piece, code in zip(program.pieces, codes, strict=False):
            np.testing.assert_array_equal(piece.code, code.numpy())


def test_idiom_of_a_segment() -> None:
    total, sort = text_of("total", "sort")
    assert [idiom_of(CODE, text) for text in (total, sort, END)] == [number("total"), number("sort"), K]
    for text in ("", total + sort, total + END, total[:-3], "y = 1\n    "):
        assert idiom_of(CODE, text) == NO_IDIOM


def test_bare_freshare_cut_at_idioms() -> None:
    total, sort = text_of("total", "sort")
    cut = in_idioms(CODE, made(total + sort + END))
    assert [(piece.text, piece.idiom) for piece in cut.pieces] == [
        (total, number("total")), (sort, number("sort")), (END, K),
    ]  # fmt: skip
    assert [piece.idiom for piece in in_idioms(CODE, made(total + "y = ")).pieces] == [number("total"), NO_IDIOM]
    assert in_idioms(CODE, made("")).pieces == ()


def test_what_follows_what() -> None:
    total, sort = text_of("total", "sort")
    rates = following(CODE, [made(total, sort, total, END), made(total, total + sort, sort), made(total)])
    a, b = number("total"), number("sort")
    assert rates[a, b] == pytest.approx(1 / 3), "then the end, and then no idiom"
    assert (rates[b, a], rates.sum()) == (1.0, pytest.approx(4 / 3))
    found = segments([made(total, END), made(sort, "no")])
    assert found.reached.tolist() == [a, K, b, NO_IDIOM]
    assert found.code.tolist() == [[1, 0], [0, 1]] * 2


def test_obedience_counts_up_to_the_first_mistake() -> None:
    class Written(CodeDomain):
        def obey(self, steered, material):  # type: ignore[no-untyped-def]
            a, b, c = 0, 1, 2
            texts = [text_of(*(CODE.idioms[k] for k in chain)) for chain in ([a, b], [a, c, b], [])]
            chains = np.array([[a, b, c], [a, b, c], [c, a, b]])
            return chains, [parse(CODE, "def f(x):\n    " + "".join(text)) for text in texts]

    corpus = SimpleNamespace(domain=Written(CODE, build_tokenizer(CODE)))
    rates = obedience(None, corpus)  # type: ignore[arg-type]
    expected = np.zeros((K, K))
    expected[0, 0], expected[1, 1], expected[1, 2] = 1, 0.5, 0.5
    np.testing.assert_array_equal(rates, expected)


def test_every_token_has_its_idiom(material: programs.ProgramMaterial) -> None:
    batch = programs.with_idioms(material.models, material.corpus.measured)
    assert (batch.subgoal[~batch.mask] == -1).all()
    changes = batch.subgoal[:, 1:] != batch.subgoal[:, :-1]
    inside = batch.mask[:, 1:] & batch.mask[:, :-1]
    assert torch.equal(changes & inside, batch.boundary[:, 1:]), "no idiom follows itself in the corpus"
    for row in range(8):
        text = CodeDomain(CODE, material.models.tokenizer).text(batch.observations[row].tolist())
        chain = batch.subgoal[row][batch.mask[row]].unique_consecutive().tolist()
        assert chain == [*parse(CODE, text).idioms, K]


def test_references_are_exact(material: programs.ProgramMaterial) -> None:
    known = material.references
    assert known.known < known.bayes < known.base
    fresh = sample_programs(CODE, 2000, np.random.default_rng(0))
    tokens = sum(len(row) + 1 for row in material.models.tokenizer(fresh.completions)["input_ids"])
    mean = -sum(log_prob(CODE, text) for text in fresh.texts) / tokens
    assert known.bayes == pytest.approx(mean, rel=0.2), "of eight programs"
