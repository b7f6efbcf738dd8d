"""Strategies and limits: the geometry against an independent solver, what limits do to codes, and their files."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from internalrl.cli import main
from internalrl.controller.policy import PolicyActor
from internalrl.controller.steered import SteeredModel
from internalrl.errors import InternalRLError
from internalrl.strategies.fit import Sample, fit
from internalrl.strategies.library import Library, load_library, meaning_of, read_library
from internalrl.strategies.limits import Limits, LimitsConfig, limits_of, load_limits
from tests.support.served import save_adapter, save_base, served_base
from tests.support.strategies import denying, library
from tests.support.tiny import N_Z

Array = NDArray[np.float64]


def line() -> Library:
    """Three strategies on a line, at −4, 0 and 4 of the first of two axes."""
    return library([[-4, 0], [0, 0], [4, 0]])


numbers = st.floats(-5, 5, allow_nan=False, width=32)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Library, list[int], Tensor]:
    """A library, which of its strategies are denied, and codes; some are anywhere, some on the edges of regions."""
    n_z, count = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    centroids = np.array(draw(st.lists(st.lists(numbers, min_size=n_z, max_size=n_z), min_size=count, max_size=count)))
    gaps = np.linalg.norm(centroids[:, None] - centroids, axis=-1) + np.eye(count) * 9
    assume(gaps.min() > 0.05)
    radii = draw(st.lists(st.floats(0.01, 6), min_size=count, max_size=count))
    denied = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count - 1, unique=True))
    scale = draw(st.sampled_from([1.0, 1.0, 1000.0]))
    codes = scale * np.array(draw(st.lists(st.lists(numbers, min_size=n_z, max_size=n_z), min_size=1, max_size=6)))
    edges = (centroids[denied[0]] + centroids) / 2
    return (
        library(centroids, radii),
        denied,
        torch.tensor(np.concatenate([codes, edges, centroids]), dtype=torch.float32),
    )


def solved(found: Library, code: Array, k: int) -> float:
    """Distance from `code` to the region of strategy k, by a general solver."""
    centroid, others = found.centroids[k], np.delete(found.centroids, k, 0)
    apart = others - centroid
    inside = [
        {"type": "ineq", "fun": lambda x: (apart**2).sum(1) / 2 - apart @ (x - centroid)},
        {"type": "ineq", "fun": lambda x: found.radii[k] ** 2 - ((x - centroid) ** 2).sum()},
    ]
    x = minimize(
        lambda x: ((x - code) ** 2).sum(), centroid, constraints=inside, options={"ftol": 1e-12, "maxiter": 500}
    ).x
    return float(np.linalg.norm(x - code))


@settings(deadline=None, max_examples=150)
@given(situations(), st.sampled_from(["allow", "deny"]))
def test_no_code_is_left_in_a_denied_region(situation: tuple[Library, list[int], Tensor], unknown: Any) -> None:
    """And a code that was allowed is the same to the bit."""
    found, denied, codes = situation
    made = denying(found, *(k + 1 for k in denied), unknown=unknown)
    allowed = made.allows(codes)
    decided = made.decide(codes)
    assert made.allows(decided.codes).all()
    assert decided.steer.all()
    assert torch.equal(decided.codes[allowed], codes[allowed])
    nearest, known = found.nearest(decided.codes.double().numpy())
    assert not np.isin(nearest, denied).any()
    assert known[~allowed.numpy()].all()  # a projected code is in a strategy's own region
    assert [violation is not None for violation in decided.violations] == (~allowed).tolist()
    again = made.decide(decided.codes)
    assert torch.equal(again.codes, decided.codes)


@settings(deadline=None, max_examples=60)
@given(situations())
def test_projection_is_the_nearest_point(situation: tuple[Library, list[int], Tensor]) -> None:
    found, denied, codes = situation
    assume(codes.abs().max() < 20)
    left = [k for k in range(len(found.names)) if k not in denied]
    for code in codes[:2].double().numpy():
        expected = min(solved(found, code, k) for k in left)
        distance = float(np.linalg.norm(found.project(code, left) - code))
        assert distance == pytest.approx(expected, abs=5e-3)


def test_projection_by_hand() -> None:
    """To the edge between two cells, or to the rim of a ball."""
    found = line()
    np.testing.assert_allclose(found.project(np.array([-3.0, 1.0]), [1, 2]), [-6 / 10**0.5, 2 / 10**0.5], atol=3e-4)
    near = library([[-1, 0], [1, 0]])
    np.testing.assert_allclose(near.project(np.array([-1.5, 0.7]), [1]), [0.0, 0.7], atol=2e-4)
    np.testing.assert_allclose(near.project(np.array([1.0, 9.0]), [1]), [1.0, 2.0], atol=3e-4)


def test_a_row_does_not_depend_on_the_others() -> None:
    found, codes = line(), 4 * torch.randn(64, 2)
    made = denying(found, 1, 3)
    whole = made.decide(codes)
    for row in range(64):
        alone = made.decide(codes[row : row + 1])
        assert torch.equal(alone.codes[0], whole.codes[row])
        assert alone.violations[0] == whole.violations[row]


def test_what_is_told_and_counted() -> None:
    made = Limits(line(), LimitsConfig({"strategy-1": "deny", "strategy-2": "review"}, unknown="review"))
    codes = torch.tensor([[-4.0, 0], [0, 1], [4, 1], [4, 9], [-4, 9]])
    decided = made.decide(codes)
    assert decided.strategies == ["strategy-2", "strategy-2", "strategy-3", None, "strategy-2"]
    assert decided.violations == [
        "denied strategy-1: project", "review strategy-2", None, "review unknown", "denied strategy-1: project",
    ]  # fmt: skip
    assert made.counts == {"denied strategy-1: project": 2, "review strategy-2": 1, "review unknown": 1}
    assert torch.equal(codes[0], torch.tensor([-4.0, 0]))  # the caller's codes are not touched


def test_steering_is_switched_off() -> None:
    made = denying(line(), 1, on_denied="off")
    decided = made.decide(torch.tensor([[-4.0, 0], [0, 1]]))
    assert decided.steer.tolist() == [False, True]
    assert decided.strategies == [None, "strategy-2"]
    assert decided.violations == ["denied strategy-1: off", None]
    with pytest.raises(InternalRLError, match="training cannot"):
        made.require_codes()


def test_denied_codes_are_drawn_again() -> None:
    """Only they, until one is allowed; then, when the draws are used up, the first one is projected."""
    asked: list[list[int]] = []

    def redraw(rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        draws = {1: [[-4.0, 1.0], [4.0, 0.5]], 3: [[-5.0, 0.0]] * 3}
        return torch.tensor([draws[row][len(asked) - 1] for row in rows.tolist()])

    made = denying(line(), 1, on_denied="resample", redraws=3)
    codes = torch.tensor([[0.0, 0], [-4, 0], [4, 1], [-3, 0]])
    decided = made.decide(codes, redraw)
    assert asked == [[1, 3], [1, 3], [3]]
    assert decided.codes[1].tolist() == [4.0, 0.5]
    assert decided.violations == [None, "denied strategy-1: resample", None, "denied strategy-1: project"]
    assert torch.equal(decided.codes[3], denying(line(), 1).decide(codes).codes[3])
    assert decided.strategies == ["strategy-2", "strategy-3", "strategy-3", "strategy-2"]


# ---------------------------------------------------------------------------------------------------------- filters


def no_digits(text: str) -> str | None:
    return "it holds digits" if any(character.isdigit() for character in text) else None


def fails(text: str) -> str | None:
    raise ValueError(text)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> str:
    """This module, under a name that a limits file can give."""
    monkeypatch.setitem(sys.modules, "filters_of_a_user", sys.modules[__name__])
    return "filters_of_a_user"


def test_filters_object(importable: str) -> None:
    made = Limits(line(), LimitsConfig(filters=(f"{importable}:no_digits",), on_outcome="record"))
    assert made.on_outcome == "record"
    assert made.objection("nothing wrong") is None
    assert made.objection("x = 3") == "outcome: it holds digits"
    assert made.counts == {"outcome: it holds digits": 1}


def test_a_filter_that_fails_objects(importable: str) -> None:
    made = Limits(line(), LimitsConfig(filters=(f"{importable}:fails",)))
    assert made.objection("secret") == "outcome: filters_of_a_user:fails failed (ValueError)"


@pytest.mark.parametrize("name", ["nowhere:f", "filters_of_a_user:missing", "no_colon", "filters_of_a_user:N_Z", ":f"])
def test_filters_that_are_none(name: str, importable: str) -> None:
    with pytest.raises(InternalRLError, match=r"package\.module:function"):
        Limits(line(), LimitsConfig(filters=(name,)))


# ------------------------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter with a policy and one without."""
    folder = tmp_path_factory.mktemp("served")
    base = save_base(folder / "base")
    save_adapter(base, folder / "adapter")
    save_adapter(base, folder / "other", seed=3, policy=False)
    return folder


def own_library(adapter: Path) -> Path:
    """A library of three strategies in the adapter's folder."""
    library(3 * np.eye(N_Z), adapter=meaning_of(adapter)).save(adapter / "strategies.json")
    return adapter / "strategies.json"


def test_a_library_belongs_to_its_adapter(served: Path, tmp_path: Path) -> None:
    """It is refused for another; but not for the same after its policy was trained."""
    file = own_library(served / "adapter")
    assert load_library(file, served / "adapter") == read_library(file)
    with pytest.raises(InternalRLError, match="mean something else"):
        load_library(file, served / "other")
    trained = save_adapter(served_base(), tmp_path / "trained", policy=False)
    load_library(file, trained)


def write(folder: Path, text: str) -> Path:
    (folder / "limits.yaml").write_text(text, encoding="utf-8")
    return folder / "limits.yaml"


def test_limits_files(served: Path, tmp_path: Path) -> None:
    own_library(served / "adapter")
    text = "strategies: {strategy-1: deny}\nothers: review\nunknown: allow\non_denied: off\nfilters: []\n"
    made = load_limits(write(tmp_path, text), served / "adapter")
    assert made.config.on_denied == "off"  # which YAML reads as false
    decided = made.decide(3 * torch.eye(N_Z)[:2])
    assert decided.violations == ["denied strategy-1: off", "review strategy-2"]
    (served / "adapter" / "strategies.json").rename(tmp_path / "moved.json")
    assert load_limits(write(tmp_path, "library: moved.json\n"), served / "adapter").library.names[0] == "strategy-1"


def test_an_adapters_own_limits(served: Path, tmp_path: Path) -> None:
    """Those given, those it was trained with, its strategies' names, or nothing."""
    adapter = save_adapter(served_base(), tmp_path / "adapter")
    assert limits_of(adapter) is None
    own_library(adapter)
    named = limits_of(adapter)
    assert named is not None
    assert named.decide(9 * torch.eye(N_Z)[:1]).violations == [None]
    trained = Limits(named.library, LimitsConfig({"strategy-1": "deny"}, redraws=3))
    replaced = replace(trained.config, filters=("json:loads",), library=Path("elsewhere.json"))
    Limits(named.library, replaced).save(adapter)  # without what is not the adapter's to say
    found = limits_of(adapter)
    assert found is not None
    assert found.config == trained.config
    given = limits_of(adapter, write(tmp_path, "strategies: {strategy-2: deny}"))
    assert given is not None
    assert given.decide(3 * torch.eye(N_Z)[:1]).violations == [None]


@pytest.mark.parametrize("text", ["filters: [os:system]", "library: other.json"])
def test_an_adapter_does_not_say_what_is_called(text: str, tmp_path: Path) -> None:
    adapter = save_adapter(served_base(), tmp_path / "adapter")
    own_library(adapter)
    write(adapter, text)
    with pytest.raises(InternalRLError, match="which no adapter may"):
        limits_of(adapter)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strategies: {strategy-9: deny}", "lacks; it has strategy-1, strategy-2"),
        ("strategies: {strategy-1: forbid}", "must be one of allow, deny, review"),
        ("stategies: {}", "did you mean strategies"),
        ("strategies: [strategy-1]", "must be named options"),
        ("on_denied: stop", "one of project, resample, off"),
        ("redraws: -1", "redraws is -1; give a number from 0 to 1000"),
        ("others: deny", "allow one, or write on_denied: off"),
        ("strategies: {", "not valid YAML"),
        ("- deny", "holds no options"),
        ("library: nowhere.json", "nowhere.json cannot be read"),
        ("filters: [nowhere:f]", "package.module:function"),
    ],
)
def test_mistakes_in_limits_files(text: str, message: str, served: Path, tmp_path: Path) -> None:
    own_library(served / "adapter")
    with pytest.raises(InternalRLError, match=message) as told:
        load_limits(write(tmp_path, text), served / "adapter")
    assert "limits.yaml" in str(told.value)


def double_name(values: dict[str, Any]) -> None:
    values["strategies"][1]["name"] = "strategy-1"


def double_number(values: dict[str, Any]) -> None:
    values["strategies"][1]["number"] = 1


def same_place(values: dict[str, Any]) -> None:
    values["strategies"][1]["centroid"] = values["strategies"][0]["centroid"]


def short(values: dict[str, Any]) -> None:
    values["strategies"][1]["centroid"] = [1.0]


def no_radius(values: dict[str, Any]) -> None:
    values["strategies"][0]["radius"] = 0


def not_finite(values: dict[str, Any]) -> None:
    values["strategies"][0]["centroid"][0] = float("nan")


def reserved(values: dict[str, Any]) -> None:
    values["strategies"][0]["name"] = "unknown"


def nothing(values: dict[str, Any]) -> None:
    values["strategies"] = []


@pytest.mark.parametrize(
    "spoil", [double_name, double_number, same_place, short, no_radius, not_finite, reserved, nothing]
)
def test_spoilt_libraries(spoil: Callable[[dict[str, Any]], None], served: Path) -> None:
    file = own_library(served / "adapter")
    values = json.loads(file.read_text())
    spoil(values)
    file.write_text(json.dumps(values))
    with pytest.raises(InternalRLError, match=r"strategies\.json: "):
        read_library(file)


def test_libraries_of_other_sizes(served: Path) -> None:
    file = own_library(served / "adapter")
    replace(library(np.eye(N_Z + 1)), adapter=meaning_of(served / "adapter")).save(file)
    with pytest.raises(InternalRLError, match=f"no codes of {N_Z} numbers"):
        load_library(file, served / "adapter")
    file.write_text("{")
    with pytest.raises(InternalRLError, match="is no JSON"):
        read_library(file)


# ---------------------------------------------------------------------------------------------------------- fitting


def clusters(count: int, spread: float, seed: int = 0) -> Sample:
    """Four hundred codes around `count` corners, the first twice as often, each with its corner's name."""
    random = np.random.default_rng(seed)
    which = random.integers(-1, count, 400).clip(0)
    codes = 3 * np.eye(count, 6)[which] + spread * random.standard_normal((400, 6))
    return Sample(codes, [f"corner {k}" for k in which])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_number_of_strategies_is_found(count: int) -> None:
    sample = clusters(count, 0.3)
    found = fit(sample, seed=0, most=12, coverage=0.99)
    assert len(found.strategies) == count
    assert found.silhouette > 0.6
    assert found.strategies[0].examples == ("corner 0",)
    for strategy in found.strategies:
        (corner,) = strategy.examples
        np.testing.assert_allclose(strategy.centroid, 3 * np.eye(count, 6)[int(corner[-1])], atol=0.15)
    assert sum(strategy.share for strategy in found.strategies) == pytest.approx(1)
    made = Library("any", "policy", 400, found.silhouette, found.strategies)
    assert made.nearest(sample.codes)[1].mean() == pytest.approx(0.99, abs=0.01)
    assert fit(sample, seed=0, most=12, coverage=0.99) == found


def test_codes_without_clusters_say_so() -> None:
    random = Sample(np.random.default_rng(0).standard_normal((400, 6)), ["nothing"] * 400)
    assert fit(random, seed=0, most=6, coverage=0.99).silhouette < 0.15
    assert len(fit(random, seed=0, most=6, coverage=0.99, count=3).strategies) == 3


def test_too_few_codes() -> None:
    with pytest.raises(InternalRLError, match="Only 2 different codes"):
        fit(Sample(np.eye(2, 6).repeat(9, 0), ["x"] * 18), seed=0, most=6, coverage=0.99)
    with pytest.raises(InternalRLError, match="Only 0 different codes"):
        fit(Sample(np.array([]), []), seed=0, most=6, coverage=0.99)


# ------------------------------------------------------------------------------------------------- the command line


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    assert main(["strategies", *map(str, argv), "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


@pytest.mark.parametrize("source", ["policy", "prior"])
def test_fit_list_and_name(source: str, served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "ab"}\n\n{"text": "c"}\n')
    asked = ["fit", served / "adapter", "--base", served / "base", "--source", source, "--samples", "12"]
    asked += ["--max-tokens", "8", "--prompts", prompts, "--strategies", "3"]
    made = run(capsys, *asked, "--file", tmp_path / "one.json")
    assert [row["name"] for row in made["strategies"]] == ["strategy-1", "strategy-2", "strategy-3"]
    assert all(row["examples"] for row in made["strategies"])
    run(capsys, *asked, "--file", tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    run(capsys, "name", tmp_path / "one.json", "3", "open a file")
    shown = run(capsys, "list", tmp_path / "one.json")
    assert [row["name"] for row in shown["strategies"]] == ["strategy-1", "strategy-2", "open a file"]
    assert load_library(tmp_path / "one.json", served / "adapter").source == source


def test_strategies_by_default(served: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the adapter, from the beginning of a text, of the prior where there is no policy."""
    run(
        capsys, "fit", served / "other", "--base", served / "base", "--samples", "8", "--max-tokens", "6", "--most", "3"
    )
    assert run(capsys, "list", served / "other")["source"] == "prior"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["name", "adapter", "9", "x"], "There is no strategy 9; choose among 1"),
        (["name", "adapter", "1", "strategy-2"], "cannot be called 'strategy-2'"),
        (["name", "adapter", "1", "unknown"], "cannot be called 'unknown'"),
        (["list", "base"], "strategies.json cannot be read"),
        (["fit", "other", "--base", "base", "--source", "policy"], "has no policy"),
        (["fit", "other", "--base", "base", "--source", "demonstrations"], "on the grid alone"),
        (["fit", "other", "--base", "base", "--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["fit", "other", "--base", "base", "--strategies", "1"], "2 or more"),
    ],
)
def test_mistakes_on_the_command_line(
    argv: list[str], message: str, served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(served)
    own_library(served / "adapter")
    assert main(["strategies", *argv]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_the_documented_limits_are_read(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (text,) = (block for block in re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S) if "on_denied" in block)
    own_library(served / "adapter")
    named = read_library(served / "adapter" / "strategies.json").renamed(1, "delete a file").renamed(2, "open a file")
    named.save(served / "adapter" / "strategies.json")
    monkeypatch.setitem(sys.modules, "mypackage", types.ModuleType("mypackage"))
    checks = types.ModuleType("mypackage.checks")
    checks.no_passwords = no_digits  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mypackage.checks", checks)
    made = load_limits(write(tmp_path, text), served / "adapter")
    told = made.decide(3 * torch.eye(N_Z)).violations
    assert told == ["denied delete a file: project", "review open a file", None]
    assert made.config == LimitsConfig(
        {"delete a file": "deny", "open a file": "review"}, filters=("mypackage.checks:no_passwords",)
    )


def test_generation_within_limits(served: Path) -> None:
    """A policy's actor with limits is one that `generate` can ask for codes."""
    steered = SteeredModel.from_pretrained(served / "base", served / "adapter")
    own_library(served / "adapter")
    made = denying(read_library(served / "adapter" / "strategies.json"), 2)
    assert steered.policy is not None
    prompts = torch.randint(1, 200, (6, 4))
    codes = {}
    for name, limits in {"free": None, "limited": made}.items():
        actor = PolicyActor(steered.policy, 6, torch.Generator().manual_seed(0), limits=limits)
        _, trace = steered.generate(prompts, steering=actor, max_new_tokens=8, do_sample=False, return_trace=True)
        codes[name] = torch.stack([segment.code for row in trace.segments for segment in row])
    assert not made.allows(codes["free"]).all()
    assert made.allows(codes["limited"]).all()
