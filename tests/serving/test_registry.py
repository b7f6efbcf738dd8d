"""The registry: versions, what is live, who gets which arm, feedback; with SQLite and with a real PostgreSQL server."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from scipy import stats
from sqlalchemy import create_engine, text
from transformers import PreTrainedModel

from internalrl import cli
from internalrl.base.fingerprint import base_fingerprint
from internalrl.controller.adapter import CONFIG_FILE, TENSOR_FILE
from internalrl.errors import InternalRLError
from internalrl.serving.registry.outcomes import compare
from internalrl.serving.registry.registry import FORGET_AFTER, Registry
from internalrl.strategies.library import meaning_of
from internalrl.strategies.limits import LIMITS_FILE, limits_of
from tests.support.served import save_adapter, served_base
from tests.support.strategies import denying, library

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return served_base()


@pytest.fixture(scope="module")
def adapters(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(base, folder / str(seed), seed) for seed in range(4)]


@pytest.fixture
def registry(tmp_path: Path, database: str | None) -> Iterator[Registry]:
    with closing(Registry(tmp_path / "registry", database)) as registry:
        yield registry


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Registry]:
    with closing(Registry(tmp_path / "registry")) as registry:
        yield registry


def live(registry: Registry, base: PreTrainedModel) -> dict[str, float]:
    arms = registry.routing(base_fingerprint(base)).arms
    return {arm.version.key: arm.share for name in arms for arm in arms[name]}


def test_versions_are_copied_and_known_by_content(
    registry: Registry, base: PreTrainedModel, adapters: list[Path], tmp_path: Path
) -> None:
    source = shutil.copytree(adapters[0], tmp_path / "source")
    first = registry.add("support", source, {"reward": 0.5})
    shutil.rmtree(source)
    second = registry.add("support", adapters[1])
    again = registry.add("support", adapters[0])
    assert [first.key, second.key, again.key] == ["support@1", "support@2", "support@1"]
    assert registry.add("other", adapters[0]).folder == first.folder
    assert [version.key for version in registry.versions()] == ["other@1", "support@1", "support@2"]
    assert registry.versions("support") == [first, second]
    assert first.base_fingerprint == base_fingerprint(base)
    assert first.provenance == {"made": {"seed": 0}}
    assert first.metrics == {"reward": 0.5}
    assert not live(registry, base)
    adapter = registry.load(base, first)
    assert adapter.policy is not None
    assert adapter.provenance == first.provenance
    assert sorted(p.name for p in first.folder.iterdir()) == [CONFIG_FILE, TENSOR_FILE]
    assert {p.name for p in first.folder.parent.iterdir()} == {first.content_hash, second.content_hash}


def test_promote_split_rollback_remove(registry: Registry, base: PreTrainedModel, adapters: list[Path]) -> None:
    for adapter in adapters[:3]:
        registry.add("support", adapter)
    with pytest.raises(InternalRLError, match="nothing to roll back"):
        registry.rollback("support")
    registry.promote("support@1")
    registry.promote("support@2")
    registry.promote("support@2")  # no change, so that one rollback undoes it
    assert live(registry, base) == {"support@2": 1.0}
    registry.split("support", {2: 90, 3: 10})
    assert live(registry, base) == {"support@2": 0.9, "support@3": 0.1}
    for number in (2, 3):
        with pytest.raises(InternalRLError, match=f"support@{number} is live"):
            registry.remove(f"support@{number}")
    assert [arm.version.key for arm in registry.rollback("support")] == ["support@2"]
    registry.promote("support@3")
    registry.remove("support@2")
    assert [arm.version.key for arm in registry.rollback("support")] == ["support@1"], "past the one that is gone"
    with pytest.raises(InternalRLError, match="Nothing was live before"):
        registry.rollback("support")
    assert live(registry, base) == {"support@1": 1.0}, "a refused rollback changes nothing"
    with pytest.raises(InternalRLError, match="support@2 is not in the registry; there is support@1, support@3"):
        registry.promote("support@2")
    assert registry.add("support", adapters[1]).number == 4, "numbers are not used again"


def test_revision_tells_changes_and_nothing_else(registry: Registry, adapters: list[Path]) -> None:
    steps: list[Callable[[], object]] = [
        lambda: registry.add("support", adapters[0]),
        lambda: registry.add("support", adapters[1]),
        lambda: registry.promote("support@1"),
        lambda: registry.split("support", {1: 1, 2: 1}),
        lambda: registry.rollback("support"),
        lambda: registry.remove("support@2"),
    ]
    seen = [registry.revision()]
    for step in steps:
        step()
        seen.append(registry.revision())
    assert seen == sorted(set(seen))
    registry.answered({"r": "support@1"})
    registry.feedback("r", thumbs="up")
    with pytest.raises(InternalRLError):
        registry.remove("support@1")
    assert registry.revision() == seen[-1]
    assert registry.routing("").revision == seen[-1]


def test_a_base_sees_its_own_versions_only(
    local: Registry, base: PreTrainedModel, adapters: list[Path], tmp_path: Path
) -> None:
    other = served_base(seed=1)
    foreign = save_adapter(other, tmp_path / "foreign", 0)
    local.add("support", adapters[0])
    local.add("support", foreign)
    local.promote("support@1")
    local.promote("support@2")
    assert live(local, base) == {"support@1": 1.0}
    assert live(local, other) == {"support@2": 1.0}
    with pytest.raises(InternalRLError, match="belong to several bases"):
        local.split("support", {1: 1, 2: 1})
    with pytest.raises(InternalRLError, match="was trained on the base with fingerprint"):
        local.load(base, local.version("support@2"))


def test_a_base_in_another_precision_sees_the_same_versions(
    registry: Registry, adapters: list[Path], tmp_path: Path
) -> None:
    converted = [served_base().to(precision) for precision in (torch.bfloat16, torch.float16)]
    registry.add("support", adapters[0])
    registry.add("support", save_adapter(converted[0], tmp_path / "bfloat16", 1))
    registry.promote("support@1")
    for base in (served_base(), *converted):
        assert live(registry, base) == {"support@1": 1.0}
    registry.split("support", {1: 1, 2: 3})  # one deployment of one base
    for base in (served_base(), converted[0]):
        assert live(registry, base) == {"support@1": 0.25, "support@2": 0.75}
    with pytest.raises(InternalRLError, match="support@2 is live"):
        registry.remove("support@2")
    registry.promote("support@2")
    assert [arm.version.key for arm in registry.rollback("support")] == ["support@1", "support@2"]
    for version in registry.versions():
        registry.load(converted[0], version)


def test_sticky_keys_stay_and_shares_are_right(local: Registry, base: PreTrainedModel, adapters: list[Path]) -> None:
    for adapter in adapters[:3]:
        local.add("support", adapter)
    local.split("support", {1: 70, 2: 20, 3: 10})
    routing = local.routing(base_fingerprint(base))
    keys = [f"user-{i}" for i in range(20_000)]
    arms = {key: routing.resolve("support", key).key for key in keys}
    count = Counter(arms.values())
    expected = [0.7 * len(keys), 0.2 * len(keys), 0.1 * len(keys)]
    assert stats.chisquare([count[f"support@{n}"] for n in (1, 2, 3)], expected).pvalue > 1e-3
    assert {key: routing.resolve("support", key).key for key in keys} == arms
    code = (
        "import sys; from internalrl.serving.registry.registry import Registry\n"
        "routing = Registry(sys.argv[1]).routing(sys.argv[2])\n"
        "print(*(routing.resolve('support', f'user-{i}').key for i in range(200)))"
    )
    folder = local.version("support@1").folder.parents[1]
    command = [sys.executable, "-c", code, str(folder), base_fingerprint(base)]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert other == [arms[key] for key in keys[:200]], "another process decides alike"
    chance = Counter(routing.resolve("support").key for _ in range(5000))
    assert stats.chisquare([chance[f"support@{n}"] for n in (1, 2, 3)], [3500, 1000, 500]).pvalue > 1e-3
    assert routing.resolve("support@3", "user-0").key == "support@3"
    local.split("support", {1: 60, 2: 20, 3: 20})
    larger = local.routing(base_fingerprint(base))
    assert all(larger.resolve("support", key).key == "support@3" for key in keys if arms[key] == "support@3")
    with pytest.raises(InternalRLError, match="No adapter 'nothing' is live; live are: support"):
        routing.resolve("nothing")


@pytest.mark.parametrize(
    "name", ["", "..", ".hidden", "../up", "a/b", "a\\b", "A", "ä", "a b", "a@1", "a\n", "a\0", "-a", "a" * 65]
)
def test_names_that_could_be_paths_are_refused(local: Registry, adapters: list[Path], name: str) -> None:
    with pytest.raises(InternalRLError, match="is no name for an adapter"):
        local.add(name, adapters[0])
    with pytest.raises(InternalRLError, match="names no version"):
        local.version(f"{name}@1")


def test_changed_files_are_not_loaded(local: Registry, base: PreTrainedModel, adapters: list[Path]) -> None:
    version = local.add("support", adapters[0])
    tensors = version.folder / TENSOR_FILE
    good = tensors.read_bytes()
    tensors.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(InternalRLError, match="the SHA-256 differ"):
        local.load(base, version)
    local.add("support", adapters[0])  # the source is whole: adding it again repairs the copy
    local.load(base, version)
    # A whole adapter, consistent in itself, but not the one that was added.
    for name in (CONFIG_FILE, TENSOR_FILE):
        shutil.copy(adapters[1] / name, version.folder / name)
    with pytest.raises(InternalRLError, match="does not hold what was added"):
        local.load(base, version)
    local.add("support", adapters[0])
    (version.folder / LIMITS_FILE).write_text("others: allow\n")
    with pytest.raises(InternalRLError, match="does not hold what was added"):
        local.load(base, version)
    local.add("support", adapters[0])
    local.load(base, version)
    shutil.rmtree(version.folder)
    with pytest.raises(InternalRLError, match="does not hold what was added"):
        local.load(base, version)


def test_strategies_and_limits_are_part_of_a_version(
    local: Registry, base: PreTrainedModel, adapters: list[Path], tmp_path: Path
) -> None:
    source = shutil.copytree(adapters[0], tmp_path / "source")
    bare = local.add("support", source)
    denying(library([[0.0] * 3, [1.0] * 3], adapter=meaning_of(source)), 2).save(source)
    limited = local.add("support", source)
    assert limited.number == bare.number + 1
    assert local.add("support", source) == limited
    assert limits_of(bare.folder) is None
    kept = limits_of(limited.folder)
    assert kept is not None
    assert kept.config.strategies == {"strategy-2": "deny"}
    local.load(base, limited)
    (limited.folder / LIMITS_FILE).unlink()
    with pytest.raises(InternalRLError, match="does not hold what was added"):
        local.load(base, limited)
    (source / LIMITS_FILE).write_text("filters: ['os:system']\n")
    with pytest.raises(InternalRLError, match=r"limits.yaml names filters"):
        local.add("support", source)
    (source / LIMITS_FILE).write_text("strategies: {nobody: deny}\n")
    with pytest.raises(InternalRLError, match="that the library lacks"):
        local.add("support", source)


def test_what_is_no_adapter_leaves_nothing_behind(local: Registry, adapters: list[Path], tmp_path: Path) -> None:
    broken = shutil.copytree(adapters[0], tmp_path / "broken")
    (broken / TENSOR_FILE).write_bytes((broken / TENSOR_FILE).read_bytes()[:100])
    for source in (tmp_path / "missing", broken):
        with pytest.raises(InternalRLError):
            local.add("support", source)
    with pytest.raises(InternalRLError, match="Metrics must be JSON"):
        local.add("support", adapters[0], {"reward": math.nan})
    assert not local.versions()
    assert not [*(tmp_path / "registry" / "adapters").iterdir()]


def test_a_hash_that_is_a_path_is_refused(local: Registry, adapters: list[Path], tmp_path: Path) -> None:
    local.add("support", adapters[0])
    engine = create_engine(f"sqlite:///{tmp_path}/registry/registry.db")
    with engine.begin() as connection:
        connection.execute(text("UPDATE registry_versions SET content_hash = '../../../etc'"))
    engine.dispose()
    with pytest.raises(InternalRLError, match="tampered with"):
        local.versions()


WRITER = """
import sys
from internalrl.serving.registry.registry import Registry
folder, url, name = sys.argv[1:]
registry = Registry(folder, url or None)
for i in range(30):
    registry.promote("shared@1" if i % 2 else "shared@2")
    registry.split("shared", {1: 2 + i, 2: ord(name)})  # no two alike, so that each one can be rolled back
    registry.answered({f"{name}-{i}": "shared@1"})
    registry.feedback(f"{name}-{i}", reward=i)
    registry.rollback("shared")
"""


def test_concurrent_writers(database: str | None, base: PreTrainedModel, adapters: list[Path], tmp_path: Path) -> None:
    """Two other processes change the same adapter, while this one adds and removes."""
    folder = tmp_path / "registry"
    with closing(Registry(folder, database)) as registry:
        for adapter in adapters[:2]:
            registry.add("shared", adapter)
        registry.promote("shared@1")
        before = registry.revision()
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, str(folder), database or "", name], stderr=subprocess.PIPE)
            for name in "ab"
        ]
        rounds = 0
        while any(writer.poll() is None for writer in writers):
            version = registry.add("own", adapters[2 + rounds % 2])
            assert version.number == rounds + 1
            registry.load(base, version)
            registry.remove(version.key)
            rounds += 1
        for writer in writers:
            _, errors = writer.communicate()
            assert writer.returncode == 0, errors.decode()
        assert rounds > 1
        changes = registry.revision() - before
        assert changes == 2 * 30 * 3 + 2 * rounds, "a change was lost"
        registry.promote("shared@1")  # whichever change came last: during a split only later answers count
        [first, *_] = registry.compare("shared").outcomes
        assert first.n == 60
        assert sum(live(registry, base).values()) == pytest.approx(1)
        assert len([*(folder / "adapters").iterdir()]) == 2, "copies of removed versions are gone"


def test_first_opening_by_many_processes(database: str | None, tmp_path: Path) -> None:
    opens = "Registry(sys.argv[1], sys.argv[2] or None)"
    code = f"import sys; from internalrl.serving.registry.registry import Registry; {opens}"
    command = [sys.executable, "-c", code, str(tmp_path / "new"), database or ""]
    opened = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    for process in opened:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()


def test_feedback_is_kept_with_the_version_that_answered(registry: Registry, adapters: list[Path]) -> None:
    for adapter in adapters[:2]:
        registry.add("support", adapter)
    registry.answered({"early": "support@1"})
    registry.feedback("early", reward=-5)
    registry.split("support", {1: 1, 2: 1})
    for i in range(6):
        registry.answered({f"r{i}": f"support@{i % 2 + 1}"})
    registry.answered({"silent": "support@2"})
    assert registry.feedback("r0", thumbs="down") == "support@1"
    assert registry.feedback("r0", thumbs="up") == "support@1", "a later word replaces the earlier one"
    for i in (1, 2, 3):
        registry.feedback(f"r{i}", thumbs="up" if i == 2 else "down")
    comparison = registry.compare("support")
    assert comparison.since is not None
    assert [(o.key, o.n, o.mean) for o in comparison.outcomes] == [("support@1", 2, 1.0), ("support@2", 2, 0.0)]
    registry.promote("support@2")
    over_all = registry.compare("support")
    assert over_all.since is None
    assert [(o.key, o.n, o.mean) for o in over_all.outcomes] == [("support@1", 3, -1.0), ("support@2", 2, 0.0)]
    with pytest.raises(InternalRLError, match="No answer of an adapter has the id 'unknown'"):
        registry.feedback("unknown", thumbs="up")
    with pytest.raises(InternalRLError, match="finite"):
        registry.feedback("r0", reward=math.inf)
    with pytest.raises(InternalRLError, match="either a reward or thumbs"):
        registry.feedback("r0", reward=1, thumbs="up")
    with pytest.raises(InternalRLError, match="There is no adapter 'nobody'"):
        registry.compare("nobody")


def test_answers_without_feedback_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Registry(tmp_path)) as registry:
        for name in ("liked", "silent"):
            registry.answered({name: "support@1"})
        registry.feedback("liked", thumbs="up")
    engine = create_engine(f"sqlite:///{tmp_path}/registry.db")
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE registry_answers SET time = time - {FORGET_AFTER + 1}"))
    engine.dispose()
    with closing(Registry(tmp_path)) as registry:
        registry.feedback("liked", thumbs="down")
        with pytest.raises(InternalRLError, match="No answer"):
            registry.feedback("silent", thumbs="up")


def test_versions_are_compared_with_the_first() -> None:
    """Wilson: 48/80; Newcombe (1998), method 10: 56/70 against it."""
    found = compare({"b@1": [1] * 48 + [0] * 32, "b@2": [1] * 56 + [0] * 14, "b@3": [], "b@4": [0.5]})
    assert [(outcome.key, outcome.n, outcome.mean) for outcome in found.outcomes] == [
        ("b@1", 80, pytest.approx(0.6)), ("b@2", 70, pytest.approx(0.8)), ("b@4", 1, 0.5),
    ]  # fmt: skip
    assert found.outcomes[0].interval == pytest.approx((0.4904, 0.7004), abs=1e-4)
    assert found.outcomes[2].interval is None
    second, single = found.differences
    assert (second.key, second.baseline, second.difference) == ("b@2", "b@1", pytest.approx(0.2))
    assert second.interval == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert (single.key, single.difference, single.interval) == ("b@4", pytest.approx(-0.1), None)


def run_cli(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, object], str]:
    code = cli.main(["adapters", *words, "--json"])
    output = capsys.readouterr()
    return code, json.loads(output.out) if output.out else {}, output.err


def test_command_line(tmp_path: Path, adapters: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--registry", str(tmp_path / "registry")]
    assert run_cli(capsys, "list", *where)[0] == 2
    (tmp_path / "metrics.json").write_text('{"reward": 0.5}')
    metrics = ["--metrics", str(tmp_path / "metrics.json")]
    _, added, _ = run_cli(capsys, "add", "support", str(adapters[0]), "--promote", *metrics, *where)
    assert (added["added"], added["live"]) == ("support@1", {"support@1": 1.0})
    run_cli(capsys, "add", "support", str(adapters[1]), *where)
    assert run_cli(capsys, "split", "support", "1=90", "2=10", *where)[1] == {
        "live": {"support@1": 0.9, "support@2": 0.1}
    }
    assert run_cli(capsys, "rollback", "support", *where)[1] == {"live": {"support@1": 1.0}}
    assert run_cli(capsys, "promote", "support@2", *where)[1] == {"live": {"support@2": 1.0}}
    rows = run_cli(capsys, "list", *where)[1]["adapters"]
    assert isinstance(rows, list)
    assert [(row["version"], row["share"], row["metrics"]) for row in rows] == [
        ("support@1", 0.0, {"reward": 0.5}),
        ("support@2", 1.0, {}),
    ]
    code, _, error = run_cli(capsys, "remove", "support@2", *where)
    assert (code, error) == (2, "internalrl: support@2 is live; promote another version of it first.\n")
    assert run_cli(capsys, "remove", "support@1", *where)[1] == {"removed": "support@1"}
    code, _, error = run_cli(capsys, "split", "support", "2=x", *where)
    assert code == 2
    assert "write NUMBER=WEIGHT" in error
    with closing(Registry(tmp_path / "registry")) as registry:
        for i in range(4):
            registry.answered({f"r{i}": "support@2"})
            registry.feedback(f"r{i}", thumbs="up" if i else "down")
    compared = run_cli(capsys, "compare", "support", *where)[1]
    assert compared["outcomes"] == [
        {"key": "support@2", "n": 4, "mean": 0.75, "interval": pytest.approx([0.3006, 0.9544], abs=1e-4)}
    ]
    assert cli.main(["adapters", "list", *where]) == 0
    assert "support@2" in capsys.readouterr().out


def test_databases_that_cannot_be_used(tmp_path: Path) -> None:
    for url in ("nonsense", "mysql://localhost/x", "sqlite://", "postgresql://x:geheim@localhost:1/none"):
        with pytest.raises(InternalRLError) as refused:
            Registry(tmp_path, url)
        assert "geheim" not in str(refused.value)
