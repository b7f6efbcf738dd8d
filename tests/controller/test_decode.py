"""Decoding step by step notices a base that has lost its past, at the first step and at any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from internalrl.controller.steered import SteeredModel
from internalrl.errors import InternalRLError
from internalrl.players.stepwise import rollout
from tests.support.forgetting import LOSSES, make_forgetful
from tests.support.language import prompts, steered_language_model
from tests.support.tiny import BATCH, N_Z, environment

pytestmark = pytest.mark.versions


def propose(rows: Tensor, _: Tensor) -> Tensor:
    return torch.zeros(len(rows), N_Z)


@pytest.mark.parametrize("read", [0, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_base_that_loses_the_past_is_an_error(
    loss: str, read: int, steered: SteeredModel, observations: Tensor
) -> None:
    decoding = steered.start(BATCH)
    for t in range(read):
        steered.step(observations[:, t], decoding, propose)
    make_forgetful(steered.base, loss)
    message = f"TrajectoryModel left {read} steps in the cache that it was given, expected {read + 1}"
    with pytest.raises(InternalRLError, match=message):
        steered.peek(observations[:, read], decoding)
    with pytest.raises(InternalRLError, match=message):
        steered.step(observations[:, read], decoding, propose)


@pytest.mark.parametrize("read", [0, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_language_model_that_loses_the_past_is_an_error(loss: str, read: int) -> None:
    steered, tokens = steered_language_model(), prompts(BATCH, 5)
    decoding, held = steered.start(BATCH), 0
    for t in range(read):
        steered.step(tokens if not t else tokens[:, :1], decoding, propose)
        held = 5 + t
    make_forgetful(steered.base, loss)
    with pytest.raises(InternalRLError, match=f"LlamaForCausalLM left {held} steps"):
        steered.step(tokens if not read else tokens[:, :1], decoding, propose)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_episode_is_played_without_the_past(loss: str, steered: SteeredModel) -> None:
    make_forgetful(steered.base, loss)
    with pytest.raises(InternalRLError, match="it decodes without its past"):
        rollout(steered, environment(4), propose)


def test_upper_blocks_alone_take_no_cache(steered: SteeredModel, observations: Tensor) -> None:
    residual, code = steered.residual(observations), torch.zeros(N_Z)
    for name in ("cache", "past_key_values"):
        with pytest.raises(InternalRLError, match="no cache can be filled"):
            steered(residual, code, **{name: steered.base.empty_cache()})
