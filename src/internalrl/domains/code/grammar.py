"""The code domain's corpus: Python functions made of idioms, with exact probabilities.

    def f(x):
        y = sum(x)
        x.append(y)
        for i in range(1, len(x)):
            x[i] += x[i - 1]
        return x

is `total`, then `accumulate`. The corpus is a stochastic grammar: the number of idioms is uniform, the first idiom is
uniform, each next one is uniform among those that may follow, and each is written in a form drawn uniformly with
helper names drawn uniformly. Some transitions are withheld: they occur in no program of the corpus, and the
post-training tasks (tasks.py) are made of nothing else. No variant of an idiom begins another, so a program can be
read in one way only, and its log-probability is a sum.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internalrl.domains.code.idioms import DEFAULT, IDIOMS, INDENT, LARGE, Variant, variants
from internalrl.errors import InternalRLError

PROMPT = f"def f(x):\n{INDENT}"
"""How every program begins; what follows is the completion."""

END = "return x\n"
"""How every program ends."""


@dataclass(frozen=True)
class CodeConfig:
    """The grammar. InternalRLError for idioms that do not exist or are too few, or lengths that make no sense."""

    idioms: tuple[str, ...] = DEFAULT
    """Names of idioms, four or more; their order decides which transitions are withheld."""
    min_idioms: int = 2
    """Fewest idioms of a program."""
    max_idioms: int = 6
    """Most idioms of a program."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "idioms", tuple(self.idioms))
        unknown = [name for name in self.idioms if name not in IDIOMS]
        if unknown:
            raise InternalRLError(f"There is no idiom {unknown[0]!r}; choose among {', '.join(IDIOMS)}.")
        if len(self.idioms) < 4 or len(set(self.idioms)) < len(self.idioms):
            raise InternalRLError(f"The idioms are {', '.join(self.idioms)}; give four or more, each once.")
        if not 1 <= self.min_idioms <= self.max_idioms:
            raise InternalRLError(
                f"Programs of {self.min_idioms} to {self.max_idioms} idioms do not exist; "
                "give 1 ≤ min_idioms ≤ max_idioms."
            )

    @classmethod
    def large(cls) -> CodeConfig:
        """All sixteen idioms."""
        return cls(idioms=LARGE)

    @property
    def withheld(self) -> NDArray[np.bool_]:
        """(K, K): [i, j] is True where idiom j, one of the next ⌈K/2⌉ − 1 in order, never follows idiom i."""
        shift = _shift(len(self.idioms))
        return (shift > 0) & (shift < _first_allowed(len(self.idioms)))

    @property
    def unseen(self) -> NDArray[np.bool_]:
        """(K, K): the transitions that no program of the corpus shows: those withheld, and an idiom twice running."""
        return _shift(len(self.idioms)) < _first_allowed(len(self.idioms))


def _shift(count: int) -> NDArray[np.int64]:
    """(K, K): how many places after idiom i idiom j comes, cyclically."""
    numbers = np.arange(count)
    return (numbers - numbers[:, None]) % count


def _first_allowed(count: int) -> int:
    """The smallest shift that the corpus shows."""
    return (count + 1) // 2


@dataclass(frozen=True)
class Programs:
    """N programs, L the most idioms of one; entries beyond a program's length are −1."""

    idioms: NDArray[np.int64]
    """(N, L): which idioms, as indices into `CodeConfig.idioms`."""
    forms: NDArray[np.int64]
    """(N, L): in which of its forms each is written."""
    completions: list[str]
    """N texts: what follows `PROMPT`."""

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def texts(self) -> list[str]:
        """N whole programs."""
        return [PROMPT + completion for completion in self.completions]

    @property
    def rows(self) -> list[dict[str, str]]:
        """N rows of a dataset: `prompt` and `completion`."""
        return [{"prompt": PROMPT, "completion": completion} for completion in self.completions]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,): number of idioms."""
        return (self.idioms >= 0).sum(1)


@cache
def _table(idioms: tuple[str, ...]) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """Every variant's text; (K, F) where each idiom's and form's begin; (K, F) how many each has, 0 if no form."""
    forms = max(len(IDIOMS[idiom]) for idiom in idioms)
    texts: list[str] = []
    begin, count = np.zeros((2, len(idioms), forms), np.int64)
    for k, idiom in enumerate(idioms):
        for form, written in enumerate(variants(idiom)):
            begin[k, form], count[k, form] = len(texts), len(written)
            texts += [variant.text for variant in written]
    return texts, begin, count


def sample_programs(
    config: CodeConfig, count: int, rng: np.random.Generator, chain: Sequence[str] | None = None
) -> Programs:
    """`count` programs of the corpus; with `chain`, the names of idioms, programs of just these, in random variants.

    InternalRLError for a chain that names an idiom the config lacks.
    """
    if chain is None:
        lengths = rng.integers(config.min_idioms, config.max_idioms + 1, count)
        idioms = _chains(len(config.idioms), count, config.max_idioms, rng)
    else:
        lengths = np.full(count, len(chain))
        idioms = np.tile(chain_numbers(config, chain), (count, 1))
    texts, begin, names = _table(config.idioms)
    forms = rng.integers(0, (names > 0).sum(1)[idioms])
    written = begin[idioms, forms] + rng.integers(0, names[idioms, forms])
    completions = ["".join([texts[v] for v in row[:n]]) + END for row, n in zip(written.tolist(), lengths, strict=True)]
    beyond = np.arange(idioms.shape[1]) >= lengths[:, None]
    return Programs(np.where(beyond, -1, idioms), np.where(beyond, -1, forms), completions)


def _chains(count: int, rows: int, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(rows, length) idioms: the first uniform, then steps of an allowed shift."""
    steps = rng.integers(_first_allowed(count), count, (rows, length))
    steps[:, 0] = rng.integers(0, count, rows)
    return steps.cumsum(1) % count


def chain_numbers(config: CodeConfig, chain: Sequence[str]) -> NDArray[np.int64]:
    """(L,): names of idioms as indices into `config.idioms`; InternalRLError where one is unknown or there is none."""
    missing = [name for name in chain if name not in config.idioms]
    if missing or not chain:
        named = f"names {missing[0]!r}" if missing else "is empty"
        raise InternalRLError(f"The chain {named}; choose among {', '.join(config.idioms)}.")
    return np.array([config.idioms.index(name) for name in chain])


# ---------------------------------------------------------------------------------------------------- probability


def entropy(config: CodeConfig) -> float:
    """Entropy of the corpus in nats per program, exact."""
    count = len(config.idioms)
    mean_length = (config.min_idioms + config.max_idioms) / 2
    idioms = math.log(count) + (mean_length - 1) * math.log(count - _first_allowed(count))
    surface = np.mean([_surface_entropy(idiom) for idiom in config.idioms])  # idioms are uniform at every place
    return math.log(config.max_idioms - config.min_idioms + 1) + idioms + mean_length * float(surface)


def _surface_entropy(idiom: str) -> float:
    """Entropy of an idiom's form and names, in nats."""
    forms = variants(idiom)
    return math.log(len(forms)) + sum(math.log(len(written)) for written in forms) / len(forms)


def log_prob(config: CodeConfig, program: str) -> float:
    """Log-probability in nats of a whole program under the corpus; −inf if the corpus cannot contain it."""
    reading = parse(config, program)
    chain = reading.idioms
    if not reading.complete or not config.min_idioms <= len(chain) <= config.max_idioms:
        return -math.inf
    if config.unseen[list(chain[:-1]), list(chain[1:])].any():
        return -math.inf
    total = chain_log_prob(config, len(chain))
    for idiom, form in zip(chain, reading.forms, strict=True):
        forms = variants(config.idioms[idiom])
        total -= math.log(len(forms) * len(forms[form]))
    return total


def chain_log_prob(config: CodeConfig, length: int) -> float:
    """Log-probability in nats of a program's idioms, `length` of them, which the corpus shows, in whatever form."""
    count = len(config.idioms)
    lengths = math.log(config.max_idioms - config.min_idioms + 1)
    return -lengths - math.log(count) - (length - 1) * math.log(count - _first_allowed(count))


# -------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Reading:
    """A program read back, as far as it is made of idioms."""

    idioms: tuple[int, ...]
    """Which idioms, as indices into `CodeConfig.idioms`."""
    forms: tuple[int, ...]
    """In which of its forms each is written."""
    ends: tuple[int, ...]
    """Where each ends in the text, its terminating newline and the indentation after it included."""
    complete: bool
    """Whether the text is `PROMPT`, one idiom or more, and `END`, and nothing else."""


@cache
def _reader(idioms: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, tuple[int, Variant]]]:
    """A pattern that matches any variant, and every variant's idiom."""
    known = {v.text: (k, v) for k, idiom in enumerate(idioms) for written in variants(idiom) for v in written}
    return re.compile("|".join(map(re.escape, known))), known


def parse(config: CodeConfig, program: str) -> Reading:
    """Read a program, or its beginning, as idioms; stops before the first thing that is none."""
    pattern, known = _reader(config.idioms)
    position = len(PROMPT) if program.startswith(PROMPT) else len(program)
    found: list[tuple[int, int, int]] = []
    while match := pattern.match(program, position):
        idiom, variant = known[match[0]]
        position = match.end()
        found.append((idiom, variant.form, position))
    chain, forms, ends = zip(*found, strict=True) if found else ((), (), ())
    return Reading(chain, forms, ends, complete=bool(found) and program[position:] == END)


def transitions(config: CodeConfig, chains: Sequence[Sequence[int]] | NDArray[np.integer]) -> NDArray[np.int64]:
    """(K, K): how often idiom j directly follows idiom i in chains of idiom numbers; a negative number ends one."""
    counts = np.zeros((len(config.idioms), len(config.idioms)), np.int64)
    for chain in chains:
        chain = np.asarray(chain, np.int64)
        chain = chain[: np.argmax(np.append(chain, -1) < 0)]
        np.add.at(counts, (chain[:-1], chain[1:]), 1)
    return counts


# --------------------------------------------------------------------------------------------------------- export


def write_jsonl(path: str | Path, config: CodeConfig, count: int, rng: np.random.Generator) -> None:
    """Write `count` programs as lines {"prompt", "completion"}; a file of that name is replaced once all are written.

    InternalRLError where the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{path.name}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            for row in sample_programs(config, count, rng).rows:
                file.write(json.dumps(row) + "\n")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InternalRLError(f"Cannot write {path}: {error.strerror}; check the path and the free space.") from error
