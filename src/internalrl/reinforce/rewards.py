"""Reward functions in TRL's form: lists in, a list of floats or None out; called, checked and weighted.

    def shorter(completions, **columns):
        return [-len(text) / 100 for text in completions]

A function gets `prompts`, `completions`, `completion_ids` and every other column of the dataset, each a list with an
entry per completion, or, without a `**` argument, those that it names. It may be a coroutine. None means that it has
nothing to say of a completion.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from internalrl.errors import InternalRLError

Reward = Callable[..., Any]


class Rewards:
    """One or several reward functions.

    Args:
        functions: a function, the dotted path of one ("package.module.function"), or several of these.
        weights: one per function; by default 1.
        more: functions that are not listed, but asked as well, with weight 1.
        outcomes: a function of the same form that says, as a string, what each completion came to; see `novelty`.

    Raises:
        InternalRLError: there is none, a path leads nowhere, two have the same name, or the weights do not match.
    """

    def __init__(
        self,
        functions: Reward | str | Sequence[Reward | str],
        weights: Sequence[float] | None = None,
        more: Sequence[Reward] = (),
        outcomes: Reward | str | None = None,
    ):
        listed = [functions] if callable(functions) or isinstance(functions, str) else list(functions)
        named = [load_function(function) if isinstance(function, str) else function for function in listed]
        self.functions = [*named, *more]
        self.outcomes = load_function(outcomes) if isinstance(outcomes, str) else outcomes
        self.names = [getattr(function, "__name__", type(function).__name__) for function in self.functions]
        if not self.functions or len(set(self.names)) < len(self.names):
            raise InternalRLError(
                f"The reward functions are called {', '.join(self.names) or '(none)'}; give one or more, of different "
                "names."
            )
        if weights is not None and len(weights) != len(named):
            raise InternalRLError(
                f"There are {len(weights)} reward weights for {len(named)} reward functions; give one each."
            )
        self.weights = torch.tensor([*([1.0] * len(named) if weights is None else weights), *[1.0] * len(more)])

    def __call__(self, columns: Mapping[str, list[Any]]) -> Tensor:
        """(N, F): what each function says of N completions, NaN where it says nothing.

        Raises:
            InternalRLError: a function failed, or returned something else than N finite numbers or None.
        """
        return torch.tensor(await_now(self._ask(columns)), dtype=torch.float32).T

    def tried(self, columns: Mapping[str, list[Any]]) -> list[str] | None:
        """What each completion came to; None where no function tells."""
        if self.outcomes is None:
            return None
        name, count = getattr(self.outcomes, "__name__", "outcomes"), len(columns["completions"])
        answer = await_now(_called(self.outcomes, name, columns))
        if not isinstance(answer, list) or len(answer) != count or not all(isinstance(one, str) for one in answer):
            raise InternalRLError(
                f"{name} returned {_describe(answer)} for {count} completions; return a list with a string for each."
            )
        return answer

    def total(self, scores: Tensor) -> Tensor:
        """(N,): the weighted sum of the `scores` (N, F); InternalRLError for a completion without any."""
        if (silent := scores.isnan().all(1)).any():
            raise InternalRLError(
                f"No reward function scores completion {int(silent.nonzero()[0])} of the batch: each returned None; "
                "return a number from one of them."
            )
        return (scores * self.weights).nansum(1)

    async def _ask(self, columns: Mapping[str, list[Any]]) -> list[list[float]]:
        asked = [self._one(function, name, columns) for function, name in zip(self.functions, self.names, strict=True)]
        return list(await asyncio.gather(*asked))

    async def _one(self, function: Reward, name: str, columns: Mapping[str, list[Any]]) -> list[float]:
        count = len(columns["completions"])
        answer = await _called(function, name, columns)
        try:
            scores = [math.nan if score is None else float(score) for score in answer]
        except (TypeError, ValueError):
            scores = []
        given = answer if isinstance(answer, list | tuple) else scores
        wrong = [score for score, asked in zip(scores, given, strict=False) if asked is not None]
        if len(scores) != count or not all(map(math.isfinite, wrong)):
            what = "a number that is not finite" if len(scores) == count else f"{_describe(answer)}"
            raise InternalRLError(
                f"The reward function {name} returned {what} for {count} completions; return a list with a finite "
                "number or None for each."
            )
        return scores


async def _called(function: Reward, name: str, columns: Mapping[str, list[Any]]) -> Any:
    """What a function answers, be it a coroutine or not."""
    try:
        answer = function(**_accepted(function, columns))
        return await answer if inspect.isawaitable(answer) else answer
    except InternalRLError:
        raise
    except Exception as error:  # of someone else's code
        raise InternalRLError(
            f"The reward function {name} failed ({type(error).__name__}: {error}); nothing is lost: correct it and "
            "resume."
        ) from error


def await_now(answer: Awaitable[Any]) -> Any:
    """What a coroutine comes to, also where a loop is running already, as in a notebook."""

    async def awaited() -> Any:
        return await answer

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(awaited())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, awaited()).result()


def _describe(answer: Any) -> str:
    return f"{len(answer)} values" if hasattr(answer, "__len__") else f"a {type(answer).__name__}"


def _accepted(function: Reward, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns that a function takes: those that it names, or all."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(columns)
    return {name: values for name, values in columns.items() if name in parameters}


def load_function(path: str) -> Reward:
    """The function at a dotted path, "package.module.function"; the working directory is searched too.

    InternalRLError where there is none.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise InternalRLError(f"There is no function {path} ({error}); give package.module.function.") from error
    if not callable(function):
        raise InternalRLError(f"{path} is a {type(function).__name__}; give the dotted path of a function.")
    return function
