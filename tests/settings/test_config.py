"""Configs to JSON and YAML and back; every mistake is told in one sentence."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from internalrl.errors import InternalRLError, OptionError
from internalrl.settings.schema import from_dict, load_yaml, to_dict


@dataclass(frozen=True)
class Inner:
    size: int = 7
    names: tuple[str, ...] = ("a",)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise OptionError("size", f"is {self.size}; give 0 or more.")


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    rate: float = 1e-3
    steps: int = 10
    mode: Literal["fast", "slow"] = "fast"
    layer: int | Literal["middle"] = "middle"
    task: str | None = None
    extra: Inner | None = None
    pair: tuple[int, float] = (1, 2.0)
    on: bool = True
    where: Path = Path("runs")
    options: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give 1 or more.")


CHANGED = Outer(Inner(3, ("x", "y")), 0.5, 4, "slow", 2, "0-1", Inner(1), (3, 4.0), False, Path("b"), {"w": 1.0})


@pytest.mark.parametrize("config", [Outer(), CHANGED])
def test_round_trip_through_json(config: Outer) -> None:
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config)))) == config


def test_values_are_laid_over_a_base() -> None:
    assert from_dict(Outer, {"inner": {"size": 5}}, base=CHANGED).inner == Inner(5, ("x", "y"))
    assert from_dict(Outer, {"extra": {"size": 5}}).extra == Inner(5)


def test_yaml(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    # 1e-4 is text to YAML, and 1 a whole number
    file.write_text("rate: 1e-4\npair: [3, 1]\ninner:\n  names: [p, q]\n")
    config = from_dict(Outer, load_yaml(file))
    assert (config.rate, config.pair, config.inner) == (1e-4, (3, 1.0), Inner(names=("p", "q")))
    file.write_text("")
    assert load_yaml(file) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "f.yaml: stepz is no option of Outer; did you mean steps."),
        ({"inner": {"siz": 3}}, "f.yaml: inner.siz is no option of Inner; did you mean inner.size."),
        ({"extra": {"siz": 3}}, "f.yaml: extra.siz is no option of Inner; did you mean extra.size."),
        (
            {"inner": {"qqq": 3}},
            "f.yaml: inner.qqq is no option of Inner; known are inner.size, inner.names.",
        ),
        ({"inner": 3}, "f.yaml: inner must hold named options, found 3."),
        ({"steps": "3"}, "f.yaml: steps must be a whole number, found '3'."),
        ({"steps": True}, "f.yaml: steps must be a whole number, found True."),
        ({"steps": 3.5}, "f.yaml: steps must be a whole number, found 3.5."),
        ({"rate": "fast"}, "f.yaml: rate must be a number, found 'fast'."),
        ({"rate": None}, "f.yaml: rate must be a number, found None."),
        ({"mode": "quick"}, "f.yaml: mode must be one of fast, slow, found 'quick'."),
        ({"layer": "top"}, "f.yaml: layer must be a whole number or one of middle, found 'top'."),
        ({"task": 3}, "f.yaml: task must be text or null, found 3."),
        ({"on": "yes"}, "f.yaml: on must be true or false, found 'yes'."),
        ({"pair": [1]}, "f.yaml: pair must be a list (a whole number, a number), found [1]."),
        ({"inner": {"names": [1]}}, "f.yaml: inner.names[0] must be text, found 1."),
        ({"options": {"w": "x"}}, "f.yaml: options.w must be a number, found 'x'."),
        ({"inner": {"size": -1}}, "f.yaml: inner.size is -1; give 0 or more."),
        ({"extra": {"size": -1}}, "f.yaml: extra.size is -1; give 0 or more."),
    ],
)
def test_mistakes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InternalRLError) as caught:
        from_dict(Outer, values, where="f.yaml")
    assert str(caught.value) == message


def test_own_checks_pass_through() -> None:
    with pytest.raises(ValueError, match="steps is 0"):
        from_dict(Outer, {"steps": 0})


def test_missing_value() -> None:
    @dataclass
    class Needy:
        size: int

    with pytest.raises(InternalRLError, match="size is missing; Needy needs it"):
        from_dict(Needy, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "not valid YAML"), ("- a", "holds no options"), (None, "cannot be read")],
)
def test_bad_yaml_file(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InternalRLError, match=message) as caught:
        load_yaml(file)
    assert str(file) in str(caught.value)
