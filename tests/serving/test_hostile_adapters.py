"""Folders that are no adapters, whatever their files are: refused in a sentence, at once, and nothing is kept."""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internalrl.controller.adapter import CONFIG_FILE, TENSOR_FILE
from internalrl.errors import InternalRLError
from internalrl.serving.registry.registry import Registry
from internalrl.settings.schema import load_yaml
from internalrl.strategies.library import STRATEGIES_FILE, meaning_of
from internalrl.strategies.limits import LIMITS_FILE, load_limits
from tests.support.served import save_adapter, served_base
from tests.support.strategies import library

FILES = (CONFIG_FILE, TENSOR_FILE, STRATEGIES_FILE, LIMITS_FILE)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A good one, with strategies and limits."""
    folder = save_adapter(served_base(), tmp_path / "adapter")
    library(np.eye(3), adapter=meaning_of(folder)).save(folder / STRATEGIES_FILE)
    (folder / LIMITS_FILE).write_text("strategies: {strategy-1: deny}")
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with closing(Registry(tmp_path / "registry")) as registry:
        yield registry


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def endless(file: Path) -> None:
    """A hole of a terabyte."""
    os.truncate(file, 2**40)


def text(content: str) -> Callable[[Path], Any]:
    return lambda file: file.write_text(content)


def values(**changes: Any) -> Callable[[Path], Any]:
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def sizes(**changes: Any) -> Callable[[Path], Any]:
    def write(file: Path) -> None:
        config = json.loads(file.read_text())
        config["metacontroller"].update(changes)
        file.write_text(json.dumps(config))

    return write


def strategies(count: int, size: int = 3) -> Callable[[Path], Any]:
    def write(file: Path) -> None:
        row = {"name": "", "radius": 1.0, "share": 0.0, "centroid": [0.0] * size}
        rows = [{**row, "number": k + 1, "name": str(k)} for k in range(count)]
        values(strategies=rows)(file)

    return write


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))

HOSTILE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    **{f"{file} is a {what.__name__}": (file, what) for file in FILES for what in (pipe, device, folder, endless)},
    "a size beyond any memory": (CONFIG_FILE, sizes(n_h=10**9)),
    "a size beyond any number": (CONFIG_FILE, sizes(rank=10**40)),
    "a size of another file": (CONFIG_FILE, sizes(n_z=4)),
    "a policy beyond any memory": (CONFIG_FILE, values(policy_hidden=10**9)),
    "a fingerprint of a megabyte": (CONFIG_FILE, values(base_fingerprint="0" * 10**5)),
    "not a number": (CONFIG_FILE, values(provenance={"reward": math.nan})),
    "nested without end": (CONFIG_FILE, text("[" * 10**5)),
    "more strategies than can be compared": (STRATEGIES_FILE, strategies(30_000)),
    "strategies as long as a book": (STRATEGIES_FILE, strategies(900, 1500)),
    "aliases that multiply": (LIMITS_FILE, text(BOMB)),
    "aliases that multiply in a value": (LIMITS_FILE, text(BOMB + "others: *a29\n")),
    "an alias of itself": (LIMITS_FILE, text("strategies: &a {b: *a}")),
    "limits nested without end": (LIMITS_FILE, text("[" * 10**5)),
    "limits of no date": (LIMITS_FILE, text("others: 2001-99-99")),
    "limits of no number": (LIMITS_FILE, text("redraws: " + "9" * 10**4)),
    "limits of an unknown kind": (LIMITS_FILE, text("others: !!python/object/apply:os.system [id]")),
    "limits of a kind that fails": (LIMITS_FILE, text("others: !!timestamp x")),
    "limits in another encoding": (LIMITS_FILE, lambda file: file.write_bytes(b"\xff\xfe\x00")),
    "draws without end": (LIMITS_FILE, text("redraws: 1000000000")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once(adapter: Path, registry: Registry, tmp_path: Path, name: str) -> None:
    file, damage = HOSTILE[name]
    damage(adapter / file)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InternalRLError) as refusal:
        registry.add("support", adapter)
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
    assert len(str(refusal.value)) < 1000
    assert registry.versions() == []
    assert list((tmp_path / "registry" / "adapters").iterdir()) == []


def test_a_rule_that_stands_twice_is_refused(adapter: Path) -> None:
    limits = adapter / LIMITS_FILE
    limits.write_text("strategies: {strategy-1: deny, strategy-2: deny, strategy-1: allow}")
    with pytest.raises(InternalRLError, match="a key is there twice"):
        load_limits(limits, adapter)


def test_anchors_that_nothing_refers_to_are_fine(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("a: &x 1\nb: {c: [d, 2]}\n")
    assert load_yaml(tmp_path / "options.yaml") == {"a": 1, "b": {"c": ["d", 2]}}
