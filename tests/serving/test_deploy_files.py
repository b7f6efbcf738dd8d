"""The files in deploy/: their commands are understood, fit each other, and name what is there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.deploy import (
    DEPLOY,
    composition,
    parsed,
    unit,
    words_of_the_composition,
    words_of_the_image,
    words_of_the_unit,
)


def test_the_commands_of_all_files_are_the_same_service() -> None:
    of_unit, of_composition = parsed(words_of_the_unit()), parsed(words_of_the_composition())
    for config in (of_unit, of_composition):
        assert config.database
        assert "internalrl:" not in config.database, "no password in a command"
    assert of_unit.host == "127.0.0.1", "the proxy alone reaches it"
    assert {parsed(words_of_the_image()).host, of_composition.host} == {"0.0.0.0"}
    assert of_unit.port == 8001
    assert (of_unit.name, of_unit.bounds) == (of_composition.name, of_composition.bounds)


def test_whoever_kills_waits_for_answers_to_end() -> None:
    assert float(unit()["TimeoutStopSec"][0]) > parsed(words_of_the_unit()).drain_seconds + 5
    grace = float(composition()["services"]["server-1"]["stop_grace_period"].removesuffix("s"))
    assert grace > parsed(words_of_the_composition()).drain_seconds + 5


def test_the_proxy_bounds_more_than_the_server() -> None:
    text, bounds = (DEPLOY / "nginx.conf").read_text(encoding="utf-8"), parsed(words_of_the_unit()).bounds
    [seconds], [size] = re.findall(r"proxy_read_timeout (\d+)s", text), re.findall(r"client_max_body_size (\d+)m", text)
    assert int(seconds) > bounds.request_seconds
    assert int(size) * 2**20 > bounds.body_bytes


def test_the_image_has_what_the_package_is_built_from() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert {"pyproject.toml", "README.md", "LICENSE", "src"} <= set(copied)
    assert all((DEPLOY.parent / word).exists() for word in copied)
    assert text.index("USER internalrl") < text.index("ENTRYPOINT"), "it does not run as root"


def test_all_that_the_composition_names_is_there() -> None:
    whole = composition()
    for service in whole["services"].values():
        for kind in ("secrets", "configs"):
            for used in service.get(kind, []):
                assert (used["source"] if isinstance(used, dict) else used) in whole[kind]
        named = [volume.partition(":")[0] for volume in service.get("volumes", [])]
        assert {name for name in named if not name.startswith(".")} <= set(whole["volumes"])
        assert set(service.get("depends_on", ())) <= set(whole["services"])
    assert all((DEPLOY / config["file"]).exists() for config in whole["configs"].values() if "file" in config)
    content = whole["configs"]["upstream"]["content"]
    own = (DEPLOY / "upstream.conf").read_text(encoding="utf-8")
    assert re.findall(r"server [\w.-]+:", content) == ["server server-1:", "server server-2:"]
    for setting in ("upstream internalrl", "max_fails=1 fail_timeout=10s;", "least_conn;", "keepalive 32;"):
        assert setting in content
        assert setting in own


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd on this machine")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """But for the program, which is not installed where it says."""
    text = (DEPLOY / "internalrl@.service").read_text(encoding="utf-8")
    file = tmp_path / "internalrl@.service"
    file.write_text(text.replace(shlex.split(unit()["ExecStart"][0])[0], sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
