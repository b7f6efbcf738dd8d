"""Two processes of `accelerate launch` make the update that one makes of the joint batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
from torch.testing import assert_close

from internalrl.errors import InternalRLError
from internalrl.run.processes import Processes

SCRIPT = Path(__file__).parents[1] / "support" / "two_processes.py"


@pytest.mark.parametrize("agent", ["internal", "raw-action"])
def test_two_processes_learn_as_one(agent: str, tmp_path: Path) -> None:
    # --multi_gpu needs no GPU: it starts processes as torchrun does. With --cpu and without MPI one process is started.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for name, options in (("one", []), ("two", launch)):
        command = [sys.executable, *options, str(SCRIPT), agent, str(tmp_path / name)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
    seen = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("*/seen*.json")}
    assert seen == {"seen.json": [16, 16], "seen0.json": [8, 8], "seen1.json": [8, 8]}
    (file,) = [found.relative_to(tmp_path / "one") for found in (tmp_path / "one").rglob("*model.safetensors")]
    one, two = (safetensors.torch.load_file(tmp_path / name / file) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)
    first, second = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two"))
    assert len(first) == len(second) == 2
    for ours, theirs in zip(map(json.loads, first), map(json.loads, second), strict=True):
        assert ours == {
            name: value if isinstance(value, str) else pytest.approx(value, abs=1e-5) for name, value in theirs.items()
        }
        assert ours["frac_reward_zero_std"] < 1


def test_rows_are_shared_evenly() -> None:
    assert [list(Processes(rank, 3).share(6)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(InternalRLError, match="divided among 4"):
        Processes(0, 4).share(6)
