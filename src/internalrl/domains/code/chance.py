"""How likely a language model is to solve a task of the code domain by chance, from the model's own probabilities.

A program solves a task if it passes the tests. Those that are chains of idioms can be named: the task's own chain and
all others that do the same, each in all of its forms and names. Their probabilities are summed, or, where there are
too many, estimated without bias by importance sampling with the corpus's own forms and names as the proposal. Programs
that are no chain of idioms are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from internalrl.domains.code.grammar import END, CodeConfig, chain_numbers, sample_programs
from internalrl.domains.code.idioms import variants
from internalrl.domains.code.tasks import CodeTask, State, apply_idiom

Score = Callable[[Sequence[str]], NDArray[np.float64]]
"""Log-probabilities in nats of N completions, their end included: (N, M), for M models."""


@dataclass(frozen=True)
class Chance:
    """Probabilities `value` (M,) under M models; standard errors `error` (M,), zero where every program was scored."""

    value: NDArray[np.float64]
    error: NDArray[np.float64]

    @classmethod
    def total(cls, parts: Sequence[Chance]) -> Chance:
        """Of programs of any of several disjoint sets."""
        values, errors = np.array([part.value for part in parts]), np.array([part.error for part in parts])
        return cls(values.sum(0), np.sqrt((errors**2).sum(0)))


def equivalents(config: CodeConfig, task: CodeTask, longest: int) -> list[tuple[str, ...]]:
    """All chains of up to `longest` idioms that pass the task's tests, the shorter ones first."""
    found: list[tuple[str, ...]] = []
    layer: dict[State, list[tuple[str, ...]]] = {task.inputs: [()]}
    for length in range(1, longest + 1):
        following: dict[State, list[tuple[str, ...]]] = {}
        for state, chains in layer.items():
            for name in config.idioms:
                if length == longest and apply_idiom(name, state[:1]) != task.outputs[:1]:
                    continue  # saves the other tests
                longer = [(*chain, name) for chain in chains]
                following.setdefault(apply_idiom(name, state), []).extend(longer)
        found += following.get(task.outputs, [])
        layer = following
    return found


def chain_chance(
    config: CodeConfig,
    chain: Sequence[str],
    score: Score,
    rng: np.random.Generator,
    most: int = 4096,
    samples: int = 512,
) -> Chance:
    """The probability that a model writes `chain` and ends there, in whichever forms and names.

    Args:
        most: up to so many programs are all scored, and their probabilities summed.
        samples: programs that are scored where there are more.

    Raises:
        InternalRLError: the chain is empty or names an idiom that `config` lacks.
    """
    chain_numbers(config, chain)
    if math.prod(sum(map(len, variants(name))) for name in chain) <= most:
        value = np.exp(score(list(_spellings(chain)))).sum(0)
        return Chance(value, np.zeros_like(value))
    programs = sample_programs(config, samples, rng, chain)
    sizes = [[len(forms) * len(named) for named in forms] for forms in map(variants, chain)]
    proposal = [-sum(math.log(size[form]) for size, form in zip(sizes, row, strict=True)) for row in programs.forms]
    weights = np.exp(score(programs.completions) - np.array(proposal)[:, None])
    return Chance(weights.mean(0), weights.std(0, ddof=1) / math.sqrt(samples))


def _spellings(chain: Sequence[str]) -> Iterator[str]:
    """Every completion that is `chain` and nothing else."""
    choices = [[variant.text for named in variants(name) for variant in named] for name in chain]
    return ("".join(texts) + END for texts in product(*choices))
