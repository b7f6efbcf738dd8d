"""Two processes and one run folder: the second one is told, and changes nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from internalrl.errors import InternalRLError
from internalrl.run.folder import RunFolder
from internalrl.run.lock import LOCK_FILE, hold

WAYS = ({}, {"resume": True}, {"overwrite": True})

HOLDER = """
import sys
from internalrl.run.folder import RunFolder
run = RunFolder.create(sys.argv[1], {}, seed=0, resume=len(sys.argv) > 2)
run.log("pretrain", 0, loss=1.0)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A run in another process, which goes on until the block ends."""
    command = [sys.executable, "-c", HOLDER, str(folder), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_that_another_process_writes_to(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with another_process(folder) as other:
        before = contents(folder)
        for way in WAYS[1:]:
            with pytest.raises(InternalRLError, match=f"is being written by process {other.pid} on .*; wait") as told:
                RunFolder.create(folder, {}, seed=0, **way)
            assert "\n" not in str(told.value)
        with pytest.raises(InternalRLError, match="is not empty"):
            RunFolder.create(folder, {}, seed=0)
        assert contents(folder) == before
    # killed: the system has released the lock
    assert len(RunFolder.create(folder, {}, seed=0, resume=True).metrics()) == 1
    assert not RunFolder.create(folder, {}, seed=0, overwrite=True).metrics()


def test_two_begin_in_a_new_folder_at_once(tmp_path: Path) -> None:
    """The other one has the lock, and has not written anything yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    code = "import sys; from internalrl.run.lock import hold; from pathlib import Path\n"
    code += "lock = hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        for way in ({}, {"overwrite": True}):
            with pytest.raises(InternalRLError, match="is being written"):
                RunFolder.create(folder, {}, seed=0, **way)
        process.kill()
    assert [file.name for file in folder.iterdir()] == [LOCK_FILE]
    RunFolder.create(folder, {}, seed=0)


def test_a_process_may_go_on_with_its_own_run(tmp_path: Path) -> None:
    """As a notebook does after an interruption, with the first attempt still in memory."""
    first = RunFolder.create(tmp_path / "run", {}, seed=0)
    second = RunFolder.create(tmp_path / "run", {}, seed=0, resume=True)
    assert first.lock is second.lock is hold(tmp_path / "run")


def test_a_run_that_ended_lets_its_folder_go(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {}, seed=0)
    del run
    with another_process(tmp_path / "run", "resume"):
        pass


def test_whoever_only_reads_may_do_so(tmp_path: Path) -> None:
    with another_process(tmp_path / "run"):
        assert len(RunFolder.open(tmp_path / "run").metrics()) == 1
