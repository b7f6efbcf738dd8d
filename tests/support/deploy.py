"""What stands in the files of deploy/."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from internalrl import cli
from internalrl.serving.main import ServeConfig

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def unit() -> dict[str, list[str]]:
    """The settings of the systemd unit."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "internalrl@.service").read_text(encoding="utf-8").splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def composition() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return found


def words_of_the_unit() -> list[str]:
    return shlex.split(unit()["ExecStart"][0])[1:]


def words_of_the_composition() -> list[str]:
    words: list[str] = composition()["services"]["server-1"]["command"]
    return words


def words_of_the_image() -> list[str]:
    [line] = re.findall(r"^CMD (\[.*\])$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    words: list[str] = json.loads(line)
    return words


def parsed(words: Sequence[str]) -> ServeConfig:
    command = cli.parse([word.replace("%i", "8001") for word in words])
    assert isinstance(command.config, ServeConfig)
    return command.config
