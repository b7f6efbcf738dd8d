"""`make demo` or `internalrl demo code` from a fresh clone: how long it takes, installation apart, and what it finds.

    python benchmarks/demo.py [code] [--clone FOLDER]

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

from internalrl.run.folder import environment

ROOT = Path(__file__).parent.parent
COMMANDS = {"grid": ["make", "demo"], "code": [".venv/bin/internalrl", "demo", "code"]}
FOLDERS = {"grid": "demo", "code": "demo-code"}
BARS = {"grid": 25 * 60, "code": 45 * 60}


def demo(domain: str, clone: Path) -> dict[str, Any]:
    """Run a demo in a clone, unless it is done; what it wrote."""
    if not clone.exists():
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    run = clone / "runs" / FOLDERS[domain]
    if not (run / "report.html").exists():
        subprocess.run(["make", ".venv/.installed"], cwd=clone, check=True)
        begun = domain == "code" and (run / "config.json").exists()
        subprocess.run([*COMMANDS[domain], *(["--resume"] if begun else [])], cwd=clone, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, check=True, capture_output=True, text=True)
    wall = (run / "report.html").stat().st_mtime - (run / "config.json").stat().st_mtime
    summary = json.loads((run / "summary.json").read_text())
    return {"wall_seconds": round(wall), "passed": wall <= BARS[domain], **summary, "git": commit.stdout.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=COMMANDS, nargs="?", default="grid")
    parser.add_argument("--clone", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = demo(options.domain, options.clone or Path(folder) / "clone")
    command = f"python benchmarks/demo.py{' code' if options.domain == 'code' else ''}"
    result = {"command": command, **environment(), "threads": torch.get_num_threads(), **found}
    name = FOLDERS[options.domain].replace("-", "_")
    (ROOT / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
