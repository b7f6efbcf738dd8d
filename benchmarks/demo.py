"""`make demo` from a fresh clone: how long it takes, installation apart, and what it finds.

    python benchmarks/demo.py [--clone FOLDER]

Clones this repository, at its last commit, into FOLDER (by default a temporary one), installs, and runs the demo with
as many threads as torch takes by itself. An unfinished demo in FOLDER is continued. `wall_seconds` is from its first
file to its last, the report; of the stages' seconds `total` is the sum. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from internalrl.runlog import environment

ROOT = Path(__file__).parent.parent
BAR = 25 * 60


def demo(clone: Path) -> dict[str, Any]:
    """Run the demo in a clone, unless it is done; what it wrote."""
    if not clone.exists():
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    run = clone / "runs" / "demo"
    if not (run / "report.html").exists():
        subprocess.run(["make", ".venv/.installed"], cwd=clone, check=True)
        subprocess.run(["make", "demo"], cwd=clone, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, check=True, capture_output=True, text=True)
    wall = (run / "report.html").stat().st_mtime - (run / "config.json").stat().st_mtime
    summary = json.loads((run / "summary.json").read_text())
    return {"wall_seconds": round(wall), "passed": wall <= BAR, **summary, "git": commit.stdout.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clone", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = demo(options.clone or Path(folder) / "clone")
    result = {"command": "python benchmarks/demo.py", **environment(), "threads": torch.get_num_threads(), **found}
    (ROOT / "benchmarks" / "results" / "demo.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
