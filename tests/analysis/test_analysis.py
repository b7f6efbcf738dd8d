"""Probes, evaluation and the report, on tiny untrained models."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from internalrl.analysis import evaluate, measure
from internalrl.analysis.evaluate import play
from internalrl.analysis.measure import NO_SUBGOAL, Codes, coding, plane, references, segment_subgoal
from internalrl.analysis.probe import _listening, limits, probe
from internalrl.analysis.report import figures, report
from internalrl.analysis.report.episodes import players
from internalrl.analysis.report.formats import duration, flat
from internalrl.analysis.report.runs import find, open_models, run_task
from internalrl.base.batches import to_batch
from internalrl.base.pretrain import losses
from internalrl.base.residual import ResidualTap
from internalrl.controller.steered import bare
from internalrl.discovery.evaluate import alignment
from internalrl.domains.grid.world import POST_TRAINING_TASK, GridConfig, demonstrate, pretraining_tasks
from internalrl.errors import InternalRLError
from internalrl.run.folder import RunFolder
from internalrl.settings.stages import EvaluateConfig, ReportConfig
from tests.support.finished import SMALL, STAGES, finished_run, small_base, small_steered

ALL_SECTIONS = ["headline", "pretrain", "discover", "consolidate", "codes", "reinforce", "episodes", "settings"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run through all stages, with its report."""
    run = finished_run(tmp_path_factory.mktemp("runs") / "whole <run> & co")
    assert report.main(ReportConfig(episodes=64), run)["sections"] == ALL_SECTIONS
    return run


@pytest.fixture
def pretrained(tmp_path: Path) -> RunFolder:
    return finished_run(tmp_path / "run", ["pretrain"])


def page(run: RunFolder) -> str:
    return (run.path / "report.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------- evaluate


@pytest.mark.parametrize("controller", ["policy", "prior", "off"])
def test_evaluation_counts_every_ending(whole: RunFolder, controller: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EvaluateConfig(episodes=40, controller=controller)
    monkeypatch.setattr(evaluate, "CHUNK", 16)  # the last part is smaller
    result = evaluate.main(config, whole)
    assert result["success"] + result["wrong_color"] + result["truncated"] == pytest.approx(1)
    assert 0 < result["success"] < 1, "an aimless agent finds one colour now and then"
    assert result["success_95"][0] < result["success"] < result["success_95"][1]
    assert 1 <= result["mean_length"] <= SMALL.horizon
    assert (result["segments_per_episode"] is None) == (controller == "off")
    assert controller == "off" or 1 < result["segments_per_episode"] <= result["mean_length"]
    again = evaluate.main(config, whole)
    assert {**again, "seconds": 0} == {**result, "seconds": 0}


def test_contexts_are_cut_as_the_run_was_reinforced(whole: RunFolder) -> None:
    default, cut, uncut = (
        evaluate.main(EvaluateConfig(episodes=40, forget=forget), whole) for forget in (None, True, False)
    )
    assert {**default, "seconds": 0} == {**cut, "seconds": 0}
    assert {**uncut, "seconds": 0} != {**cut, "seconds": 0}


def test_deterministic_policy_plays_its_mean(whole: RunFolder) -> None:
    models = open_models(whole)
    config = EvaluateConfig(episodes=8, deterministic=True)
    first, second = (next(play(models.steered, SMALL, "0-1", config, 0.0, seed=1)) for _ in range(2))
    assert_close(first.rollout.code, second.rollout.code, rtol=0, atol=0)
    sampled = next(play(models.steered, SMALL, "0-1", EvaluateConfig(episodes=8), 0.0, seed=1))
    assert not torch.equal(sampled.rollout.code[:, 0], first.rollout.code[:, 0])


def test_replay_agrees_with_the_rollout(whole: RunFolder) -> None:
    models = open_models(whole)
    part = next(play(models.steered, SMALL, "0", EvaluateConfig(episodes=60), 0.0, seed=1))
    assert part.success.tolist() == (part.rollout.reward > 0).tolist()
    assert not (part.success & part.truncated).any()
    assert (part.rollout.length[part.truncated] == SMALL.horizon).all()


def test_bare_model_is_the_base() -> None:
    base, observations = small_base(), to_batch(SMALL, demonstrations(4)).observations
    steered = bare(base)
    alone = base(observations).logits
    with steered.tap.steering(lambda e: steered.metacontroller.control(e, torch.randn(*e.shape[:2], 8))):
        assert torch.equal(base(observations).logits, alone)


def test_pretrained_run_has_only_the_bare_base(pretrained: RunFolder) -> None:
    assert evaluate.main(EvaluateConfig(episodes=8, controller="off", task="0-1"), pretrained)["task"] == "0-1"
    for controller in ("policy", "prior"):
        with pytest.raises(InternalRLError, match=r"has no adapter .* --controller off"):
            evaluate.main(EvaluateConfig(controller=controller), pretrained)


def test_what_cannot_be_played_is_refused(whole: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names colour 6"):
        evaluate.main(EvaluateConfig(task="0-6"), whole)
    with pytest.raises(ValueError, match="episodes is 0"):
        EvaluateConfig(episodes=0)
    discovered = finished_run(tmp_path / "discovered", STAGES[:2])
    with pytest.raises(InternalRLError, match="has no policy"):
        evaluate.main(EvaluateConfig(), discovered)
    assert evaluate.main(EvaluateConfig(controller="prior", episodes=8), discovered)["task"] == "0-1-2-3-4-5-0-1-2-3"


def test_default_task_is_the_papers(pretrained: RunFolder, whole: RunFolder) -> None:
    assert run_task(pretrained, GridConfig()) == "-".join(map(str, POST_TRAINING_TASK))
    assert run_task(whole, SMALL) == "0", "the run's own"


def test_find_prefers_the_outer_value() -> None:
    assert find({"a": {"x": 1}, "b": {"c": {"x": 2}}}, "x") == 1
    assert find({"a": {"x": 1}, "x": 0}, "x") == 0
    assert find({"a": {"y": 1}}, "x") is None


# ------------------------------------------------------------------------------------- probe and measure


def demonstrations(count: int):  # type: ignore[no-untyped-def]
    return demonstrate(SMALL, count, pretraining_tasks(SMALL), np.random.default_rng(0))


def test_probe_hears_every_layer() -> None:
    base, observations = small_base(), to_batch(SMALL, demonstrations(4)).observations
    with torch.no_grad(), _listening(base) as heard:
        base(observations)
        assert sorted(heard) == [0, 1, 2]
        assert_close(heard[0], base.encoder(observations)[0])
        assert_close(heard[1], ResidualTap(base, 1).read(base, observations=observations))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_probe_accuracy_and_its_limits() -> None:
    accuracy = probe(small_base(), SMALL, episodes=48, seed=1)
    chance, best = limits(SMALL, episodes=48, seed=1)
    assert list(accuracy) == [0, 1, 2]
    assert 1 / 3 <= chance < best < 1
    assert all(0.2 < value <= best for value in accuracy.values())
    assert probe(small_base(), SMALL, layers=[1], episodes=48, seed=1) == {1: accuracy[1]}


def test_measurements_agree_with_those_of_the_stages() -> None:
    base = small_base()
    steered = small_steered(base)
    batch = to_batch(SMALL, measure.shown_demonstrations(SMALL, 40, seed=2))
    expected = alignment(steered, batch)
    found = coding(steered, batch, shown=5)
    assert found.nll == pytest.approx(expected["hard_nll"], rel=1e-5)
    assert found.kl > 0
    assert found.switch.shape[0] == len(found.length) == 5
    assert found.switch[:, 0].all()
    known = references(base, SMALL, 40, seed=2)
    with torch.no_grad():
        assert known.base == pytest.approx(losses(base, batch)[0].item(), rel=1e-5)
    assert known.known < known.bayes < known.base


@pytest.mark.parametrize(
    ("colors", "subgoal"),
    [([0, 1], 0), ([4, 5, 0], 2), ([1, 2], NO_SUBGOAL), ([0, 3], NO_SUBGOAL), ([2], NO_SUBGOAL), ([], NO_SUBGOAL)],
)
def test_subgoal_of_a_segment(colors: list[int], subgoal: int) -> None:
    assert segment_subgoal(np.array(colors, int)) == subgoal


def test_segments_are_cut_at_switches() -> None:
    entered = np.array([[-1, -1, 2, 3, -1, 0, -1]])  # colours 2, 3 entered by the moves of steps 1 and 2
    switch = np.array([[True, False, False, True, False, False, False]])
    code = np.arange(7, dtype=np.float32).reshape(1, 7, 1)
    found = measure._segments(entered, switch, code)
    assert (found.code.ravel().tolist(), found.reached.tolist()) == ([0.0], [1]), "the last one got nowhere in time"
    entered[0, 6] = 1
    found = measure._segments(entered, switch, code)
    assert (found.code.ravel().tolist(), found.reached.tolist()) == ([0.0, 3.0], [1, 0])


def test_plane_separates_what_differs() -> None:
    rng = np.random.default_rng(0)
    corners = np.zeros((3, 6), np.float32)
    corners[[0, 1, 2], [1, 3, 5]] = 4
    reached = np.arange(60) % 4 - 1
    code = np.where(reached[:, None] >= 0, corners[reached], 50) + rng.normal(size=(60, 6)).astype(np.float32)
    points = code @ plane(Codes(code, reached))
    for a, b in ((0, 1), (1, 2), (0, 2)):
        distance = np.linalg.norm(points[reached == a].mean(0) - points[reached == b].mean(0))
        assert distance == pytest.approx(4 * 2**0.5, rel=0.2)
    for kinds in ([], [-1, -1], [2, 2]):
        few = Codes(code[: len(kinds)], np.array(kinds, int))
        assert plane(few).shape == (6, 2)


# ------------------------------------------------------------------------------------------------ report


def test_report_needs_nothing_else(whole: RunFolder) -> None:
    html = page(whole)
    assert "//" not in html, "no address of anything"
    assert set(re.findall(r'(?:href|src)="([^"#])', html)) == set(), "links lead to places in the page"
    assert set(re.findall(r"url\(([^#])", html)) == set()
    assert "@import" not in html
    assert "<link" not in html


def test_report_has_all_sections_and_valid_drawings(whole: RunFolder) -> None:
    html = page(whole)
    assert re.findall(r'<section id="(\w+)">', html) == ALL_SECTIONS
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) > 20
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    names = re.findall(r' id="([^"]+)"', html)
    assert len(names) == len(set(names)), "ids of different drawings differ"
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', html)) <= set(names)
    for text in (
        "93 %",
        "0.997",
        "149,504",
        "9\u00a0min 50\u00a0s",
        "from 0.04 to 0.21",
        "my-baseline",
    ):
        assert text in html
    assert "whole &lt;run&gt; &amp; co" in html
    endings = re.findall(r"Episode \d <span>(solved|failed|out of time)", html)
    assert [ending == "solved" for ending in endings] == [True, True, False]
    assert "not measured" not in html


def test_report_is_the_same_every_time(whole: RunFolder) -> None:
    before = page(whole)
    report.main(ReportConfig(episodes=64), whole)
    assert page(whole) == before


def test_report_of_a_pretrained_run(pretrained: RunFolder) -> None:
    result = report.main(ReportConfig(episodes=32), pretrained)
    assert result["sections"] == ["headline", "pretrain", "settings"]
    html = page(pretrained)
    assert html.count("not measured") == 8


def test_report_without_curves_or_policy(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", STAGES[:2])
    (run.path / "metrics.jsonl").unlink()
    result = report.main(ReportConfig(episodes=32), run)
    assert result["sections"] == ["headline", "pretrain", "discover", "codes", "settings"]


def test_players_begin_with_successes(whole: RunFolder) -> None:
    models = open_models(whole)
    episodes = next(play(models.steered, SMALL, "0", EvaluateConfig(episodes=60), 0.0, seed=3))
    found = players(SMALL, episodes, successes=2, failures=1)
    assert [player.ending == "solved" for player in found] == [True, True, False]
    for player in found:
        assert player.segments[0].begin == 0
        assert player.segments[-1].end == len(player.points) - 1
        assert all(a.end == b.begin for a, b in pairwise(player.segments))
        for segment in player.segments:
            assert segment.points == player.points[segment.begin : segment.end + 1]
    assert found[0].segments[-1].colors[-1] == 0, "the last colour entered is the one that was sought"


def test_running_mean_keeps_short_curves_and_constants() -> None:
    short = [1.0, 5.0, 2.0]
    assert figures.running_mean(short) is short
    assert figures.running_mean([2.0] * 200) == pytest.approx([2.0] * 200)
    ramp = list(range(400))
    assert figures.running_mean(ramp)[50:350] == pytest.approx(ramp[50:350])


def test_durations_and_nested_names() -> None:
    assert [duration(s).replace("\u00a0", " ") for s in (7.4, 74.2, 7261)] == ["7 s", "1 min 14 s", "2 h 1 min"]
    assert duration({"a": 5, "b": 3}).replace("\u00a0", " ") == "8 s"
    assert dict(flat({"a": {"b": 1, "c": {"d": 2}}, "e": None})) == {"a.b": "1", "a.c.d": "2", "e": "none"}
