"""Every name on the command line of `serve` stands for one thing, before anything is served or promoted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from internalrl.errors import InternalRLError
from internalrl.serving.main import build
from internalrl.serving.registry.registry import Registry
from internalrl.strategies.library import STRATEGIES_FILE, meaning_of
from tests.support.live_server import config_for, save_models
from tests.support.strategies import library


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_models(tmp_path_factory.mktemp("names"))
    library([[-1.0, 0, 0], [1.0, 0, 0]], adapter=meaning_of(folder / "support")).save(
        folder / "support" / STRATEGIES_FILE
    )
    (folder / "good.yaml").write_text("strategies: {strategy-1: deny}")
    (folder / "typo.yaml").write_text("strategies: {strategy-9: deny}")
    (folder / "broken.yaml").write_text("strategies: [")
    return folder


@pytest.fixture
def registry(folder: Path, tmp_path: Path) -> Iterator[Registry]:
    """In which support@1 is live."""
    with closing(Registry(tmp_path / "registry")) as registry:
        registry.add("support", folder / "support")
        registry.promote("support@1")
        yield registry


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "limits of nobody": ({"limits": ("typo=good.yaml",)}, "--limits names 'typo', but no such adapter is live"),
    "limits of a version": ({"limits": ("support@1=good.yaml",)}, "--limits names 'support@1'"),
    "limits of the base": ({"limits": ("tiny=good.yaml",)}, "--limits names 'tiny'"),
    "no limits": ({"limits": ("support=nowhere.yaml",)}, "nowhere.yaml cannot be read"),
    "no YAML": ({"limits": ("support=broken.yaml",)}, "not valid YAML"),
    "limits of unknown strategies": ({"limits": ("support=typo.yaml",)}, "name a strategy 'strategy-9'"),
    "limits without a library": ({"adapter": ("code=code",), "limits": ("code=good.yaml",)}, "strategies fit"),
    "the base's name for an adapter": ({"name": "code", "adapter": ("code=code",)}, "'code' is what the base"),
    "the base's name for what is live": ({"name": "support"}, "'support' is what the base is called"),
    "the base's name for a version": ({"name": "support@1"}, "'support@1' is what the base is called"),
    "no adapter": ({"adapter": ("code=nowhere",)}, "cannot be read"),
    "no name": ({"adapter": ("CODE=code",)}, "is no name for an adapter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_stands_for_nothing_or_twice_is_refused(
    folder: Path, tmp_path: Path, registry: Registry, name: str
) -> None:
    options, why = REFUSED[name]
    placed = {key: value for key, value in options.items() if key == "name"}
    for key in ("adapter", "limits"):
        pairs = [text.partition("=") for text in options.get(key, ())]
        placed[key] = tuple(f"{own}={folder / file}" for own, _, file in pairs)
    before = registry.live("support"), registry.live("code")
    with ExitStack() as stack, pytest.raises(InternalRLError) as refusal:
        build(config_for(folder, registry=tmp_path / "registry", **placed), stack)
    assert why in str(refusal.value)
    assert (registry.live("support"), registry.live("code")) == before


def test_limits_may_be_those_of_what_is_live_already(folder: Path, tmp_path: Path, registry: Registry) -> None:
    limits = shutil.copy(folder / "good.yaml", tmp_path)
    config = config_for(folder, adapter=(), limits=(f"support={limits}",), registry=tmp_path / "registry")
    with ExitStack() as stack:
        assert build(config, stack)
