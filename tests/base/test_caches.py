"""The cache is filled, or it is an error: a step that lacks its past is never taken in silence."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Cache

from internalrl.base.caches import PreallocatedLayer, TokenCache, cache_input, require_filled, token_cache
from internalrl.base.residual import ResidualTap
from internalrl.base.trajectory import TrajectoryCache, TrajectoryModel
from internalrl.errors import InternalRLError
from tests.support.forgetting import LOSSES, make_forgetful
from tests.support.language import language_model, prompts
from tests.support.tiny import close, tiny_base, walks

OBSERVATIONS = walks(4, 6)

pytestmark = pytest.mark.versions


def read(base: TrajectoryModel, steps: int = 5) -> TrajectoryCache:
    """The cache of so many steps."""
    cache = base(OBSERVATIONS[:, :steps], use_cache=True).cache
    assert isinstance(cache, TrajectoryCache)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("loss", LOSSES)
def test_backbone_that_loses_the_past_is_an_error(loss: str) -> None:
    base = tiny_base(relative_buckets=0)
    cache = read(base)
    make_forgetful(base.backbone, loss)
    with pytest.raises(InternalRLError, match="LlamaModel left 5 steps in the cache that it was given, expected 6"):
        base(OBSERVATIONS[:, 5:], cache=cache)


def test_given_cache_is_continued_whether_or_not_one_is_asked_for() -> None:
    base = tiny_base()
    found = base(OBSERVATIONS[:, 5:], cache=read(base))
    close(found.logits[:, -1], base(OBSERVATIONS).logits[:, -1])
    assert found.cache.length == 6


def test_steps_without_the_encoders_state_are_an_error() -> None:
    base = tiny_base("planner")
    cache = read(base)
    cache.encoder = None
    with pytest.raises(InternalRLError, match="holds 5 steps, but not what the encoder must remember"):
        base(OBSERVATIONS[:, 5:], cache=cache)


def test_observations_cannot_follow_embeddings() -> None:
    """The encoder has not seen the step before, which its state would say it has."""
    base = tiny_base("planner")
    cache = read(base, 4)
    embeddings = base.encoder(OBSERVATIONS)[0]
    for step in (4, 5):
        found = base(inputs_embeds=embeddings[:, step : step + 1], cache=cache)
    close(found.logits[:, -1], base(OBSERVATIONS).logits[:, -1])
    with pytest.raises(InternalRLError, match="not what the encoder must remember"):
        base(OBSERVATIONS[:, 5:], cache=cache)


def test_a_pass_that_was_stopped_must_be_rewound() -> None:
    base = tiny_base()
    cache = read(base)
    ResidualTap(base).read(base, observations=OBSERVATIONS[:, 5:], cache=cache)
    with pytest.raises(InternalRLError, match=r"holds 5 whole steps, but some block holds 6: .*call rewind"):
        base(OBSERVATIONS[:, 5:], cache=cache)


def test_a_pass_that_was_stopped_at_the_first_step_leaves_an_empty_cache() -> None:
    base = tiny_base()
    cache = base.empty_cache()
    ResidualTap(base).read(base, observations=OBSERVATIONS[:, :1], cache=cache)
    cache.rewind()
    close(base(OBSERVATIONS, cache=cache).logits, base(OBSERVATIONS).logits)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_of_other_rows_is_an_error(rows: int) -> None:
    """One row would be written into all of them."""
    base, language = tiny_base("one-hot"), language_model()
    with pytest.raises(InternalRLError, match=f"the past of 4 rows, but the step is of {rows}"):
        base(OBSERVATIONS[:rows, 5:], cache=read(base))
    cache = token_cache(language)
    language(prompts(4, 5), **cache_input(language, cache))
    with pytest.raises(InternalRLError, match=f"the past of 4 rows, but the step is of {rows}"):
        language(prompts(rows, 1), **cache_input(language, cache))


@pytest.mark.parametrize("shape", [(4, 1), (1, 6), (4, 5)])
def test_segments_must_number_every_step(shape: tuple[int, int]) -> None:
    with pytest.raises(InternalRLError, match=r"segments have the shape .*, expected \(4, 6\)"):
        tiny_base()(OBSERVATIONS, segments=torch.zeros(shape, dtype=torch.long))


def test_blocks_must_all_be_filled() -> None:
    base = language_model()
    cache = token_cache(base)
    base(prompts(2, 5), **cache_input(base, cache))
    require_filled(cache, 5, base)
    cache.layers[2] = PreallocatedLayer()
    with pytest.raises(InternalRLError, match=r"LlamaForCausalLM left 0 or 5 steps .* expected 5"):
        require_filled(cache, 5, base)
    require_filled(cache, 5, base, blocks=2)
    with pytest.raises(InternalRLError, match="left no steps"):
        require_filled(Cache(layers=[]), 5, base)


def test_cache_goes_by_the_name_that_the_model_has_for_it() -> None:
    class Newer(nn.Module):
        def forward(self, tokens: object, cache: object = None, **more: object) -> None: ...

    class Older(nn.Module):
        def forward(self, tokens: object, past_key_values: object = None) -> None: ...

    class Without(nn.Module):
        def forward(self, tokens: object, **more: object) -> None: ...

    cache = TokenCache()
    assert cache_input(Newer(), cache) == {"cache": cache}
    assert cache_input(Older(), cache) == {"past_key_values": cache}
    with pytest.raises(InternalRLError, match="Without takes no cache of keys and values"):
        cache_input(Without(), cache)
