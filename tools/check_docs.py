"""Check the documentation: printed commands exist and parse, benchmarks exist and know their options, relative links
resolve, no path of one machine.

Looks at README.md and docs/*.md; nothing in them is run. Exits with 1 and one line per finding.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from internalrl import cli
from internalrl.errors import InternalRLError

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MACHINE_PATH = re.compile(r"(?<![\w./:~-])/(?:home|root|work|Users|tmp|opt|mnt|data)/[\w./-]*")


def main() -> int:
    """Check every page; returns the exit code."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    pages = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
    findings = [f"{page.relative_to(ROOT)}: {text}" for page in pages for text in findings_in(page, targets)]
    print("\n".join(findings) if findings else f"{len(pages)} pages of documentation are in order")
    return 1 if findings else 0


def findings_in(page: Path, targets: set[str]) -> Iterator[str]:
    """What is wrong on one page, a sentence each; `targets` are the Makefile's."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|;|\|", line):
                if problem := command_problem(shlex.split(command, comments=True), targets):
                    yield f"`{command.strip()}`: {problem}"
    for link in LINK.findall(text):
        path = link.split("#")[0]
        if path and not re.match(r"[a-z]+:", path) and not (page.parent / path).exists():
            yield f"the link to {link} leads nowhere"
    for path in MACHINE_PATH.findall(text):
        yield f"{path} is a path of one machine"


def command_problem(words: list[str], targets: set[str]) -> str | None:
    """Why a printed command would fail; None when it would not, or is not one of ours."""
    words = list(itertools.dropwhile(lambda word: "=" in word, words))  # VARIABLE=value before the command
    if words[:1] == ["make"]:
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"the Makefile has no target {unknown[0]}" if unknown else None
    if any(word.startswith("benchmarks/") for word in words[1:2]):
        return benchmark_problem(ROOT / words[1], words[2:])
    if not words or Path(words[0]).name != "internalrl" or words[1:] in ([], ["--help"], ["--version"]):
        return None
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(ROOT):
            cli.parse(words[1:])
    except (InternalRLError, ValueError) as error:
        return str(error)
    except SystemExit:  # --help
        pass
    return None


def benchmark_problem(script: Path, words: list[str]) -> str | None:
    """Why a benchmark would not take these words; None when it exists and every option is in its source."""
    if not script.exists():
        return f"there is no {script.name}"
    source = script.read_text(encoding="utf-8")
    unknown = [word for word in words if word.startswith("--") and f'"{word}"' not in source]
    return f"{script.name} has no option {unknown[0]}" if unknown else None


if __name__ == "__main__":
    sys.exit(main())
