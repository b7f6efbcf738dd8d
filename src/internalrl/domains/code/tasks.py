"""Post-training tasks of the code domain: a function known by hidden tests only, made of withheld transitions only.

A task is no test of new transitions if there is a way round: idioms that commute, cancel or absorb one another can turn
a chain of withheld transitions into one that the corpus shows. `fewest_unseen` looks for such ways by brute force, and
the default tasks have none.
"""

from __future__ import annotations

import atexit
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from internalrl.domains.code.grammar import END, PROMPT, CodeConfig, chain_numbers
from internalrl.domains.code.idioms import DEFAULT, LARGE, variants
from internalrl.domains.code.sandbox.sandbox import Outcome, Sandbox
from internalrl.errors import InternalRLError

State = tuple[tuple[int, ...], ...]
"""What a composition makes of several inputs."""

CHAINS = {
    DEFAULT: ("total", "index", "unique", "rotate", "reverse", "accumulate"),
    LARGE: ("swap", "index", "unique", "peak", "fold", "difference"),
}
"""The idioms of a preset -> the chain whose beginnings are its default tasks."""


def hidden_inputs() -> State:
    """The inputs of every task's tests: eight lists of 3 to 8 integers from −5 to 9, the same for all tasks."""
    rng = np.random.default_rng(20)
    return tuple(tuple(rng.integers(-5, 10, length).tolist()) for length in (8, 8, 7, 6, 5, 5, 4, 3))


@dataclass(frozen=True)
class CodeTask:
    """A function to be found. Its solution is known to the evaluation, its tests to the reward, neither to a model."""

    chain: tuple[str, ...]
    """Names of the idioms that solve it, in order."""
    inputs: State
    """The tests' inputs."""
    outputs: State
    """What the function gives for each."""


def make_task(config: CodeConfig, chain: Sequence[str]) -> CodeTask:
    """The task that `chain` solves; InternalRLError unless every transition of it is withheld by `config`.

    Whether there are ways round is for `fewest_unseen` to say.
    """
    numbers = chain_numbers(config, chain)
    for first, second in pairwise(numbers):
        if not config.withheld[first, second]:
            pair = f"{config.idioms[first]} → {config.idioms[second]}"
            raise InternalRLError(f"The transition {pair} is not withheld; make a task of withheld ones only.")
    return solved_by(tuple(chain))


@cache
def solved_by(chain: tuple[str, ...]) -> CodeTask:
    """The task that `chain` solves, whatever its transitions; InternalRLError for idioms that do not exist."""
    inputs = state = hidden_inputs()
    for name in chain:
        if name not in _FUNCTIONS:
            raise InternalRLError(f"There is no idiom {name!r}; choose among {', '.join(_FUNCTIONS)}.")
        state = apply_idiom(name, state)
    return CodeTask(chain, inputs, state)


def tasks(config: CodeConfig) -> dict[int, CodeTask]:
    """The default tasks, by number of idioms: 2 to 6. InternalRLError for idioms that are neither preset's."""
    if config.idioms not in CHAINS:
        raise InternalRLError("There are default tasks for the two presets' idioms only; use make_task for others.")
    chain = CHAINS[config.idioms]
    return {length: make_task(config, chain[:length]) for length in range(2, len(chain) + 1)}


# --------------------------------------------------------------------------------------------------------- reward


def evaluate(completions: Sequence[str], task: CodeTask, sandbox: Sandbox) -> tuple[list[Outcome], list[bool]]:
    """Really run `PROMPT` + each completion: what became of it, and whether it passes every test of the task.

    A program that occurs several times is run once. The sandbox gets the tests' inputs, never their outputs.
    """
    programs = [PROMPT + completion for completion in completions]
    distinct = list(dict.fromkeys(programs))
    ran = dict(zip(distinct, sandbox.run(distinct, task.inputs), strict=True))
    outcomes = [ran[program] for program in programs]
    expected = json.dumps(task.outputs)  # compared as text: True is not 1, nor 1.0
    passed = [outcome.status == "ran" and json.dumps(outcome.outputs) == expected for outcome in outcomes]
    return outcomes, passed


def reward(completions: Sequence[str], task: CodeTask, sandbox: Sandbox) -> list[float]:
    """1.0 for each completion that makes a program which parses, runs and passes every test of the task, else 0.0."""
    return [float(passed) for passed in evaluate(completions, task, sandbox)[1]]


def passes_tests(completions: Sequence[str], chain: Sequence[Sequence[str]], **_: object) -> list[float]:
    """`reward` for a dataset: its rows have, beside the prompt, the `chain` of idioms whose tests are to be passed."""
    rewards = [0.0] * len(completions)
    for names in dict.fromkeys(map(tuple, chain)):
        rows = [row for row, own in enumerate(chain) if tuple(own) == names]
        found = reward([completions[row] for row in rows], solved_by(names), _shared_sandbox())
        for row, value in zip(rows, found, strict=True):
            rewards[row] = value
    return rewards


def returned(completions: Sequence[str], **_: object) -> list[str]:
    """What programs make of the tests' inputs, for exploration; see `reinforce.novelty`."""
    outcomes = _shared_sandbox().run([PROMPT + completion for completion in completions], hidden_inputs())
    return [what_came(outcome) for outcome in outcomes]


def what_came(outcome: Outcome) -> str:
    """The outputs of a program as a string, the same for all that failed."""
    return json.dumps(outcome.outputs) if outcome.status == "ran" else "failed"


@dataclass(frozen=True)
class TaskRewards:
    """Functions for internal RL, which run a batch once between them.

    success: 1.0 for completions that pass all tests of the task; runs: 1.0 for those that parse and run, for the log;
    outcomes: what a program returns on the tests' inputs, or that it failed, as a string.
    """

    success: Callable[[list[str]], list[float]]
    runs: Callable[[list[str]], list[float]]
    outcomes: Callable[[list[str]], list[str]]


def task_rewards(task: CodeTask, sandbox: Sandbox) -> TaskRewards:
    """Those of a task."""

    @lru_cache(maxsize=1)
    def judge(completions: tuple[str, ...]) -> tuple[list[Outcome], list[bool]]:
        return evaluate(completions, task, sandbox)

    def success(completions: list[str]) -> list[float]:
        return [float(passed) for passed in judge(tuple(completions))[1]]

    def runs(completions: list[str]) -> list[float]:
        return [float(outcome.status == "ran") for outcome in judge(tuple(completions))[0]]

    def outcomes(completions: list[str]) -> list[str]:
        return [what_came(outcome) for outcome in judge(tuple(completions))[0]]

    return TaskRewards(success, runs, outcomes)


@cache
def _shared_sandbox() -> Sandbox:
    """One for the whole process, closed when it ends."""
    sandbox = Sandbox()
    atexit.register(sandbox.close)
    return sandbox


# ------------------------------------------------------------------------------------------------------ ways round


def _compile(idiom: str) -> Callable[[list[int]], list[int]]:
    """An idiom as a function on lists."""
    namespace: dict[str, Callable[[list[int]], list[int]]] = {}
    exec(PROMPT + variants(idiom)[0][0].text + END, namespace)
    return namespace["f"]


_FUNCTIONS = {idiom: _compile(idiom) for idiom in LARGE}


def apply_idiom(idiom: str, state: State) -> State:
    """One more idiom, on every input."""
    function = _FUNCTIONS[idiom]
    return tuple(tuple(function(list(values))) for values in state)


def fewest_unseen(config: CodeConfig, task: CodeTask, tests: int | None = None, longest: int | None = None) -> int:
    """The fewest transitions unseen in the corpus among all compositions that pass the task's tests.

    All compositions of up to `longest` idioms are tried, by default as many as programs of the corpus have: a way round
    may be longer than the task, as where `reverse → halve → reverse` does what `halve` does. len(chain) − 1 means that
    there is none: no composition does with fewer new transitions than the intended one. With `tests`, only that many of
    the tests have to be passed: faster, and as stricter conditions go, safe: more compositions count as ways round.
    """
    inputs, target = task.inputs[:tests], task.outputs[:tests]
    unseen = config.unseen.astype(np.int64)
    best, longest = len(task.chain) - 1, longest or max(len(task.chain), config.max_idioms)
    # Of all compositions that give the same outputs and end in the same idiom, only the best can matter later.
    layer: dict[State, NDArray[np.int64]] = {inputs: np.zeros(len(unseen), np.int64)}
    for length in range(1, longest + 1):
        following: dict[State, NDArray[np.int64]] = {}
        for state, fewest in layer.items():
            appended = fewest if length == 1 else (fewest[:, None] + unseen).min(0)
            for number in np.flatnonzero(appended < best).tolist():
                name = config.idioms[number]
                if length == longest and _FUNCTIONS[name](list(state[0])) != list(target[0]):
                    continue  # saves the other tests
                after = apply_idiom(name, state)
                if after == target:
                    best = int(appended[number])
                ending = following.setdefault(after, np.full(len(unseen), longest))
                ending[number] = min(ending[number], appended[number])
        layer = following
    return best
