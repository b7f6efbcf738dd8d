"""The base model: its encoders, causality, cache and save format, and the tap on it and on other models."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from internalrl.base.encoders import GAIN, UNREACHED, PlanningEncoder
from internalrl.base.residual import ResidualTap, find_blocks
from internalrl.base.trajectory import TrajectoryModel, relative_bucket
from internalrl.domains.grid.world import observe
from internalrl.errors import InternalRLError
from tests.support.tiny import GRID, WIDTH, layouts, tiny_base, walks, widen

ENCODERS = ("one-hot", "planner")


def close(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(params=ENCODERS)
def base(request: pytest.FixtureRequest) -> TrajectoryModel:
    return tiny_base(request.param)


# ---------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("relative_buckets", [0, 32])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_saving_and_loading_keeps_every_bit(encoder: str, relative_buckets: int, tmp_path: Path) -> None:
    base, observations = tiny_base(encoder, relative_buckets=relative_buckets), walks(3, 6)
    base.save_pretrained(tmp_path)
    for loaded in (TrajectoryModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, TrajectoryModel)
        assert not loaded.training
        expected, found = base(observations), loaded(observations)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.next_observation_logits, expected.next_observation_logits)
        theirs = loaded.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("relative_buckets", [0, 32])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_future_does_not_change_the_past(encoder: str, relative_buckets: int) -> None:
    base = tiny_base(encoder, relative_buckets=relative_buckets)
    observations = walks(3, 8)
    changed = observations.clone()
    changed[:, 5:] = walks(3, 8, seed=1)[:, 5:]
    expected, found = base(observations), base(changed)
    for name in ("logits", "next_observation_logits"):
        close(found[name][:, :5], expected[name][:, :5])
        assert (found[name][:, 5:] - expected[name][:, 5:]).abs().max() > 0.01


def test_the_past_changes_the_future(base: TrajectoryModel) -> None:
    """The model is more than a function of the last observation."""
    observations = walks(3, 8)
    changed = observations.clone()
    changed[:, 2] = walks(3, 8, seed=1)[:, 2]
    assert (base(changed).logits - base(observations).logits)[:, 7].abs().max() > 1e-3


@pytest.mark.parametrize("relative_buckets", [0, 32])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_cache_continues_where_it_stopped(encoder: str, relative_buckets: int) -> None:
    """Over parts of any length, and over several growths of the buffers."""
    base, observations = tiny_base(encoder, relative_buckets=relative_buckets), walks(2, 45)
    expected = base(observations)
    cache, found, begin = None, [], 0
    for length in (3, 1, 1, 20, *[1] * 20):
        part = base(observations[:, begin : begin + length], cache=cache, use_cache=True)
        cache, begin = part.cache, begin + length
        found.append(part)
        assert cache.length == begin
    assert begin == 45
    for name in ("logits", "next_observation_logits"):
        close(torch.cat([part[name] for part in found], 1), expected[name])


def test_cache_follows_its_rows(base: TrajectoryModel) -> None:
    observations = walks(4, 6)
    cache = base(observations[:, :5], use_cache=True).cache
    rows = torch.tensor([3, 1])
    cache.select(rows)
    found = base(observations[rows, 5:], cache=cache, use_cache=True)
    close(found.logits[:, -1], base(observations).logits[rows, -1])


def test_rewound_cache_forgets_a_pass_that_was_stopped(base: TrajectoryModel) -> None:
    observations, other = walks(4, 6), walks(4, 6, seed=1)
    cache = base(observations[:, :5], use_cache=True).cache
    ResidualTap(base).read(base, observations=other[:, 5:], cache=cache, use_cache=True)
    cache.rewind()
    found = base(observations[:, 5:], cache=cache, use_cache=True)
    close(found.logits[:, -1], base(observations).logits[:, -1])


def test_embeddings_can_stand_for_observations(base: TrajectoryModel) -> None:
    observations = walks(3, 6)
    embeddings, _ = base.encoder(observations)
    assert torch.equal(base(inputs_embeds=embeddings).logits, base(observations).logits)


def test_segments_need_the_relative_bias() -> None:
    base, segments = tiny_base(relative_buckets=0), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="segments need a backbone with relative_buckets > 0"):
        base(walks(2, 4), segments=segments)


def test_relative_buckets() -> None:
    distance = torch.arange(200)
    bucket = relative_bucket(distance, 32, 64)
    assert torch.equal(bucket[:16], distance[:16])  # the first half is exact
    assert (bucket.diff() >= 0).all()
    assert set(bucket.tolist()) == set(range(32))
    assert (bucket[64:] == 31).all()
    widths = torch.bincount(bucket[:64])
    assert (widths[16:31].float().diff() >= -1).all()  # wider and wider, but for rounding


# ---------------------------------------------------------------------------------- encoders


def test_position_is_read_back_from_the_observation() -> None:
    everywhere = np.tile(np.arange(GRID.cells), (5, 1))
    observations = torch.from_numpy(observe(GRID, layouts(5).contents, everywhere))
    for encoder in ENCODERS:
        model = tiny_base(encoder).encoder
        assert model.observation_size == GRID.observation_size == observations.shape[-1]
        assert model.target_size == GRID.cells
        assert torch.equal(model.position(observations), torch.from_numpy(everywhere))
        assert torch.equal(model.target(observations), torch.from_numpy(everywhere))


def neighbours(cell: int) -> list[int | None]:
    """Where up, right, down and left lead; None is off the grid."""
    row, column = divmod(cell, GRID.size)
    steps = ((row - 1, column), (row, column + 1), (row + 1, column), (row, column - 1))
    inside = range(GRID.size)
    return [r * GRID.size + c if r in inside and c in inside else None for r, c in steps]


def distances(contents: np.ndarray, color: int) -> dict[int, int]:
    """Moves from every cell to the colour's, breadth first from there; walls block, other colours do not."""
    goal = int(np.flatnonzero(contents == color)[0])
    found, queue = {goal: 0}, deque([goal])
    while queue:
        here = queue.popleft()
        for cell in neighbours(here):
            wall = cell is not None and GRID.colors <= contents[cell] < GRID.empty
            if cell is not None and not wall and cell not in found:
                found[cell] = found[here] + 1
                queue.append(cell)
    return found


def test_planner_finds_shortest_paths() -> None:
    """With every free cell at cost 1 and walls far above, the distances are those of breadth-first search."""
    encoder = PlanningEncoder(GRID, WIDTH)
    with torch.no_grad():
        encoder.log_cost[:, GRID.colors : GRID.empty] = 10.0 / GAIN
    grids = layouts(20).contents
    table = encoder.plan(torch.from_numpy(observe(GRID, grids, np.zeros(20, np.int64)))).detach()
    moves, rest = table.split([4 * GRID.colors, table.shape[-1] - 4 * GRID.colors], -1)
    checked = 0
    for n, contents in enumerate(grids):
        for color in range(GRID.colors):
            found = distances(contents, color)
            for cell in range(GRID.cells):
                if GRID.colors <= contents[cell] < GRID.empty:
                    continue
                planned = float(rest[n, cell, color]) * GRID.size
                assert planned == pytest.approx(found.get(cell, UNREACHED), abs=1e-4)
                if planned == 0 or cell not in found:
                    continue
                onward = [found.get(next_cell, 99) for next_cell in neighbours(cell)]
                best = [distance == found[cell] - 1 for distance in onward]
                assert (moves[n, cell, 4 * color : 4 * color + 4] > 0.99).tolist() == best
                checked += 1
    assert checked > 500


def test_planner_describes_the_cell() -> None:
    """After the moves and distances come the coordinates, down and to the right, and the cell's content."""
    encoder = tiny_base("planner").encoder
    grids = layouts(3).contents
    table = encoder.plan(torch.from_numpy(observe(GRID, grids, np.zeros(3, np.int64)))).detach()
    assert table.shape == (3, GRID.cells, encoder.features)
    y, x, content = table[..., 5 * GRID.colors :].split([1, 1, GRID.empty + 1], -1)
    row = torch.linspace(-1, 1, GRID.size)
    close(y[0, :, 0], row.repeat_interleave(GRID.size))
    close(x[0, :, 0], row.repeat(GRID.size))
    assert torch.equal(content.argmax(-1), torch.from_numpy(grids.astype(np.int64)))
    assert torch.equal(content.sum(-1), torch.ones(3, GRID.cells))


# ---------------------------------------------------------------------------------- the tap


@pytest.mark.parametrize("layer", [0, 2, -1, 7, "top", 1.5])
def test_layer_out_of_range_is_told_in_one_sentence(layer: int | str) -> None:
    with pytest.raises(InternalRLError) as error:
        ResidualTap(tiny_base(), layer)
    assert str(error.value) == f"layer is {layer}, but this model has 2 blocks: choose 1 to 1, or 'middle'."


def test_model_without_blocks_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.config = AutoConfig.for_model("llama", num_hidden_layers=3)
    with pytest.raises(InternalRLError, match="No list of 3 decoder blocks was found in Linear"):
        find_blocks(model)


LANGUAGE_MODELS = {
    "llama": {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 12},
    "gpt_neo": {"hidden_size": 16, "num_heads": 2, "num_layers": 3, "attention_types": [[["global"], 3]]},
    "falcon": {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3},
    "bloom": {"hidden_size": 16, "n_head": 2, "n_layer": 3},
}
"""A bare tensor from each block of the first; tuples from the others'."""
TOKENS = torch.arange(12).reshape(3, 4)


@pytest.fixture(params=LANGUAGE_MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(request.param, vocab_size=12, **ids, **LANGUAGE_MODELS[request.param])
    model = AutoModelForCausalLM.from_config(config)
    widen(model, 0.3, seed=0)
    return model.eval()


@pytest.mark.parametrize("layer", [1, 2])
def test_tap_reads_and_writes_any_decoder(model: PreTrainedModel, layer: int) -> None:
    tap = ResidualTap(model, layer)
    plain = model(TOKENS, output_hidden_states=True)
    residual = tap.read(model, input_ids=TOKENS)
    assert torch.equal(residual, plain.hidden_states[layer])
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))
    received: list[Tensor] = []
    handle = tap.blocks[layer].register_forward_pre_hook(lambda _, args: received.append(args[0]))
    with tap.steering(lambda e: e + direction):
        steered = model(TOKENS).logits
    handle.remove()
    assert torch.equal(received[0], residual + direction)
    assert (steered - plain.logits).abs().amax((1, 2)).min() > 1e-3  # in every row of the batch
    with tap.steering(lambda e: e):
        assert torch.equal(model(TOKENS).logits, plain.logits)
    assert torch.equal(model(TOKENS).logits, plain.logits)


@pytest.mark.parametrize("layer", [1, 2])
def test_upper_blocks_alone_continue_from_the_residual(model: PreTrainedModel, layer: int) -> None:
    """A block that returns a tuple must go on doing so: of a bare tensor the model takes the first row."""
    tap = ResidualTap(model, layer)
    plain, residual = model(TOKENS).logits, tap.read(model, input_ids=TOKENS)
    for fresh in (False, True):  # the tap has seen a forward pass, or not
        tap = ResidualTap(model, layer) if fresh else tap
        for _ in range(2):
            with tap.skipping_lower_blocks(residual):
                assert torch.equal(model(inputs_embeds=residual).logits, plain)
            with tap.skipping_lower_blocks(residual), tap.steering(lambda e: 0.5 * e):
                steered = model(inputs_embeds=residual).logits
            with tap.steering(lambda e: 0.5 * e):
                assert torch.equal(model(TOKENS).logits, steered)
    assert torch.equal(model(TOKENS).logits, plain)


def test_skipped_blocks_are_not_computed(model: PreTrainedModel) -> None:
    tap = ResidualTap(model, 2)
    residual, ran = tap.read(model, input_ids=TOKENS), []
    for index, block in enumerate(tap.blocks):
        inner = next(part for part in block.modules() if isinstance(part, nn.Linear))
        inner.register_forward_hook(lambda *_, index=index: ran.append(index))
    for expected in ([0, 2], [2]):  # what a block returns is learned once, by running one
        ran.clear()
        with tap.skipping_lower_blocks(residual):
            model(inputs_embeds=residual)
        assert ran == expected
