"""Rare texts: splitting against plain sampling, on a tiny steered model whose codes matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from internalrl.players.stepwise import prior, rollout
from internalrl.reinforce.completions import Completions
from internalrl.reinforce.splitting import Continuations, write_chances
from tests.support.language import VOCABULARY, steered_language_model

PROMPT, HALF = (3, 4), VOCABULARY // 2
LOW = {(first, second) for first in range(HALF) for second in range(VOCABULARY)}
"""Two tokens, the first of them a low one."""
PARTS = [LOW, {(token,) for token in range(HALF)}, LOW]
LAST = (18,)  # the model of seed 2 often writes it, and seldom switches


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_splitting_estimates_what_sampling_counts(temperature: float) -> None:
    steered = steered_language_model(seed=2)
    found = np.array(
        [
            write_chances(steered, PROMPT, PARTS, LAST, 256, torch.Generator().manual_seed(seed), temperature)
            for seed in range(8)
        ]
    )
    mean, error = found.mean(0), found.std(0, ddof=1) / len(found) ** 0.5
    counted = sampled(steered, temperature, 8_000)
    spread = np.sqrt(error**2 + counted / 8_000)
    assert (counted > 0.01).all(), "otherwise there is nothing to compare"
    assert (spread < counted / 3).all()
    np.testing.assert_array_less(np.abs(mean - counted), 4 * spread)


def sampled(steered, temperature: float, count: int) -> np.ndarray:  # type: ignore[no-untyped-def]
    """The share of plain samples that write 1, 2 or 3 of the parts and then `LAST`."""
    generator = torch.Generator().manual_seed(99)
    environment = Completions(np.tile(PROMPT, (count, 1)), [VOCABULARY], 6)
    n_z = steered.metacontroller.config.n_z
    tokens = rollout(steered, environment, prior(n_z, generator), temperature, generator=generator).actions.numpy()
    low, last = tokens < HALF, tokens == LAST[0]
    first, second, third = low[:, 0], low[:, 0] & low[:, 2], low[:, 0] & low[:, 2] & low[:, 3]
    return np.array([(first & last[:, 2]).mean(), (second & last[:, 3]).mean(), (third & last[:, 5]).mean()])


def test_a_text_that_is_never_written_has_no_chance() -> None:
    steered = steered_language_model(seed=2)
    found = write_chances(steered, PROMPT, [{(VOCABULARY + 1,)}, LOW], LAST, 16, torch.Generator().manual_seed(0))
    assert found == [0.0, 0.0]


def test_continuations_repeat_what_is_given_and_stop_at_a_wrong_token() -> None:
    environment = Continuations(PROMPT, np.array([[7, 8], [7, -1], [5, -1]]), {(1, 2): 0, (3,): 1})
    for actions in ([9, 9, 9], [9, 1, 3], [1, 2, 9], [6, 9, 9]):
        environment.step(np.array(actions))
    assert environment.written.tolist() == [[7, 8, 1, 6], [7, 1, 2, -1], [5, 3, -1, -1]]
    assert environment.outcome.tolist() == [-1, 0, 1]
    assert not environment.alive.any()
