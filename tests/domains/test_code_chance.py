"""The chance to solve a task by tokens, against a base small enough to list everything that it can write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from internalrl.base.scoring import completion_log_probs
from internalrl.base.text_data import tokenise
from internalrl.domains.code.chance import Chance, chain_chance, equivalents
from internalrl.domains.code.grammar import END, PROMPT, CodeConfig
from internalrl.domains.code.idioms import variants
from internalrl.domains.code.tasks import CodeTask, solved_by
from internalrl.domains.code.tokenizer import build_tokenizer
from internalrl.errors import InternalRLError

GRAMMAR = CodeConfig(idioms=("reverse", "sort", "rotate", "total"), min_idioms=1, max_idioms=2)
TASK = solved_by(("rotate", "sort"))
TEMPERATURES = (0.5, 1.0, 2.0)


class Table:
    """A language model that writes the programs of `GRAMMAR` and some others, each with a probability of its own."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer(GRAMMAR)
        self.config = SimpleNamespace(
            vocab_size=len(self.tokenizer), eos_token_id=self.tokenizer.eos_token_id, max_position_embeddings=200
        )
        self.config.get_text_config = lambda: self.config
        spelled = [v.text for idiom in GRAMMAR.idioms for form in variants(idiom) for v in form]
        chains = [*((one,) for one in spelled), *product(spelled, repeat=2)]
        self.completions = ["".join(texts) + END for texts in chains] + ["return sum(x)\n", END]
        self.texts = [self.encode(PROMPT) + self.encode(text) + [self.config.eos_token_id] for text in self.completions]
        rng = np.random.default_rng(0)
        self.following: dict[tuple[int, ...], dict[int, float]] = {}
        for text in self.texts:
            for place, token in enumerate(text):
                self.following.setdefault(tuple(text[:place]), {}).setdefault(token, rng.normal())

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def __call__(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        logits = torch.full((*input_ids.shape, len(self.tokenizer)), -1e9)
        for row, tokens in enumerate(input_ids.tolist()):
            for place in range(len(tokens)):
                for token, logit in self.following.get(tuple(tokens[: place + 1]), {}).items():
                    logits[row, place, token] = logit
        return SimpleNamespace(logits=logits)

    def score(self, completions: Sequence[str]) -> NDArray[np.float64]:
        rows = [{"prompt": PROMPT, "completion": completion} for completion in completions]
        return completion_log_probs(self, tokenise(rows, self.tokenizer, self.config), TEMPERATURES)  # type: ignore[arg-type]

    def probability(self, text: list[int], temperature: float) -> float:
        """Of one text after the prompt, token by token."""
        found, begin = 1.0, len(self.encode(PROMPT))
        for place in range(begin, len(text)):
            choices = self.following[tuple(text[:place])]
            weights = {token: np.exp(logit / temperature) for token, logit in choices.items()}
            found *= weights[text[place]] / sum(weights.values())
        return float(found)


@pytest.fixture(scope="module")
def table() -> Table:
    return Table()


def passes(completion: str, task: CodeTask) -> bool:
    namespace: dict[str, object] = {}
    exec(PROMPT + completion, namespace)
    outputs = [namespace["f"](list(values)) for values in task.inputs]  # type: ignore[operator]
    return json.dumps(outputs) == json.dumps(task.outputs)


def listed(table: Table) -> NDArray[np.float64]:
    """(M,): everything that the table can write is run, and the probabilities of what passes are added up."""
    solving = [text for text, program in zip(table.texts, table.completions, strict=True) if passes(program, TASK)]
    assert len(solving) == 5 * (1 + 7 + 5 + 4), "sort alone, or after reverse, sort or rotate"
    return np.array([sum(table.probability(text, temperature) for text in solving) for temperature in TEMPERATURES])


def total(table: Table, **options: int) -> Chance:
    rng = np.random.default_rng(1)
    chains = equivalents(GRAMMAR, TASK, 2)
    return Chance.total([chain_chance(GRAMMAR, chain, table.score, rng, **options) for chain in chains])


def test_the_table_is_a_distribution(table: Table) -> None:
    for temperature in TEMPERATURES:
        assert sum(table.probability(text, temperature) for text in table.texts) == pytest.approx(1)


def test_summed_chance_is_that_of_all_programs_that_pass(table: Table) -> None:
    chance = total(table)
    np.testing.assert_allclose(chance.value, listed(table), rtol=1e-6)  # logits in single precision
    assert (chance.error == 0).all()


def test_sampled_chance_is_right_within_its_error(table: Table) -> None:
    chance = total(table, most=0, samples=400)
    assert (chance.error > 0).all()
    assert (chance.error < 0.2 * chance.value).all()
    np.testing.assert_array_less(np.abs(chance.value - listed(table)), 3 * chance.error)


def test_ways_round_may_be_longer_than_the_task() -> None:
    config = CodeConfig()
    task = solved_by(("total", "index", "halve"))
    found = equivalents(config, task, 5)
    assert found[0] == task.chain
    assert ("total", "index", "reverse", "halve", "reverse") in found
    assert len(found) == len(set(found))


def test_a_chain_of_other_idioms_is_refused(table: Table) -> None:
    with pytest.raises(InternalRLError, match="names 'halve'"):
        chain_chance(GRAMMAR, ("sort", "halve"), table.score, np.random.default_rng(0))
