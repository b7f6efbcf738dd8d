"""A folder of adapters, each under the hash of its content: written once, checked whenever it is read.

An adapter is adapter_config.json, adapter_model.safetensors and, where there are, the library of its strategies and the
limits that it is to be used within.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from internalrl.errors import InternalRLError
from internalrl.run.files import PARTIAL, read_file, write_errors, write_together

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from internalrl.controller.adapter import Adapter, AdapterConfig

LARGEST = 2**30
"""Bytes of the largest file of an adapter."""

# Listing versions needs no torch, so only what reads adapters imports their module.


@dataclass(frozen=True)
class Copied:
    """A checked copy of an adapter that is not yet in its place."""

    config: AdapterConfig
    content_hash: str
    folder: Path


class AdapterFiles:
    """Adapters in `folder`; what is not of the hash it stands under is refused."""

    def __init__(self, folder: Path):
        self.folder = folder
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, content_hash: str) -> Path:
        """Where the adapter of that hash is, or would be."""
        if not re.fullmatch("[0-9a-f]{64}", content_hash):
            raise InternalRLError(f"{content_hash[:80]!r} is no hash of an adapter; the registry was tampered with.")
        return self.folder / content_hash

    @contextmanager
    def copied(self, source: Path) -> Iterator[Copied]:
        """A copy of the adapter in `source`, checked as far as that goes without its base; `put` keeps it."""
        from internalrl.controller.adapter import CONFIG_FILE, TENSOR_FILE, read_config, read_tensors, require_sizes
        from internalrl.strategies.library import STRATEGIES_FILE
        from internalrl.strategies.limits import LIMITS_FILE, limits_of

        names = [CONFIG_FILE, TENSOR_FILE, *(n for n in (STRATEGIES_FILE, LIMITS_FILE) if (source / n).exists())]
        with write_errors(self.folder):
            copy = Path(tempfile.mkdtemp(dir=self.folder, prefix=PARTIAL))
        try:
            copy.chmod(0o755)
            write_together({copy / name: _read(source / name) for name in names})
            # What is checked is the copy: nobody can exchange it any more.
            config = read_config(copy / CONFIG_FILE)
            require_sizes(config, read_tensors(copy / TENSOR_FILE, config.tensors_sha256), source)
            limits_of(copy)  # refuses what does not fit, and limits that name functions to call or other files
            yield Copied(config, _content_hash(copy), copy)
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def put(self, copied: Copied) -> None:
        """Keep a copy, also in place of files that were damaged since; one writer at a time."""
        folder = self.path(copied.content_hash)
        if _contents(folder) == _contents(copied.folder):
            return
        with write_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            copied.folder.rename(folder)

    def load(self, base: PreTrainedModel, content_hash: str) -> Adapter:
        """The adapter of that hash for `base`; InternalRLError when its files are not those that were put there."""
        from internalrl.controller.adapter import load_adapter

        folder = self.path(content_hash)
        if _content_hash(folder) != content_hash:
            raise InternalRLError(f"{folder} does not hold what was added to the registry; add the adapter again.")
        return load_adapter(base, folder)  # compares the tensors with their SHA-256 in the config

    def delete(self, content_hash: str) -> None:
        """Delete the adapter of that hash."""
        shutil.rmtree(self.path(content_hash), ignore_errors=True)


def _content_hash(folder: Path) -> str:
    """SHA-256 over all files but the tensors, whose own SHA-256 stands in adapter_config.json."""
    from internalrl.controller.adapter import TENSOR_FILE

    digest = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.name != TENSOR_FILE:
            digest.update(f"{hashlib.sha256(_read(file)).hexdigest()} {file.name}\n".encode())
    return digest.hexdigest()


def _read(file: Path) -> bytes:
    try:
        return read_file(file, LARGEST)
    except OSError as error:
        raise InternalRLError(f"{file} cannot be read ({error.strerror}); give the folder of an adapter.") from error


def _contents(folder: Path) -> dict[str, bytes] | None:
    try:
        return {file.name: read_file(file, LARGEST) for file in folder.glob("*")}
    except OSError:
        return None
