"""Nothing leaks: from row to row, from padding, or from the tap into later forward passes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from internalrl.base.residual import ResidualTap
from internalrl.controller.steered import SteeredModel
from internalrl.errors import InternalRLError
from tests.support.tiny import (
    BATCH,
    LEARNING_MODES,
    STEPS,
    WIDTH,
    close,
    codes,
    decode,
    discovery,
    tiny_base,
    tiny_steered,
    walks,
)

# ---------------------------------------------------------------------------------- rows do not leak


def test_rows_are_independent(steered: SteeredModel, observations: Tensor) -> None:
    changed = observations.clone()
    changed[1:] = walks(BATCH, STEPS, seed=5)[1:]
    proposals, others = codes(BATCH, STEPS), codes(BATCH, STEPS)
    others[1:] = codes(BATCH, STEPS, seed=5)[1:]
    for forget in (False, True):
        first, _ = decode(steered, observations, proposals, forget)
        second, _ = decode(steered, changed, others, forget)
        for name in ("logits", "switch_logit", "code"):
            close(getattr(first, name)[0], getattr(second, name)[0])
        assert (first.logits[1:] - second.logits[1:]).abs().max() > 0.01
    full = [steered(steered.residual(o), p)[0] for o, p in ((observations, proposals), (changed, others))]
    close(*full)


@pytest.mark.parametrize("forget", [False, True])
def test_dropping_rows_leaves_the_others_as_they_were(
    forget: bool, steered: SteeredModel, observations: Tensor
) -> None:
    proposals, kept = codes(BATCH, STEPS), torch.arange(BATCH)
    whole, _ = decode(steered, observations, proposals, forget)
    decoding = steered.start(BATCH, forget)
    for t in range(STEPS):
        step = steered.step(observations[kept, t], decoding, lambda rows, _, t=t, kept=kept: proposals[kept[rows], t])
        close(step.logits, whole.logits[kept, t])
        close(step.switch_logit, whole.switch_logit[kept, t])
        if t in (2, 5):  # the first and the last row leave, then the others change places
            left = torch.tensor([1, 2] if t == 2 else [1, 0])
            decoding.select(left)
            kept = kept[left]


@pytest.mark.parametrize("mode", LEARNING_MODES)
def test_padding_is_ignored(mode: str, observations: Tensor) -> None:
    """Loss, what is logged, and every gradient are the same whatever stands after an episode's end."""
    lengths = torch.tensor([STEPS, 5, 7, 3])
    mask = torch.arange(STEPS) < lengths[:, None]
    results = []
    for seed in (0, 5):
        steered = tiny_steered()
        padded = torch.where(mask[..., None], observations, walks(BATCH, STEPS, seed=seed + 1))
        torch.manual_seed(0)
        loss, metrics = discovery(steered, padded, mode, mask=mask)
        loss.backward()
        results.append((metrics, [p.grad for p in steered.metacontroller.parameters()]))
    (metrics, gradients), (other_metrics, other_gradients) = results
    assert metrics == pytest.approx(other_metrics, abs=1e-6)
    for ours, theirs in zip(gradients, other_gradients, strict=True):
        close(ours, theirs)


def test_padding_changes_no_episode(observations: Tensor) -> None:
    steered, length = tiny_steered(), 5
    meta = steered.metacontroller
    found = []
    for steps in (length, STEPS):
        mask = (torch.arange(steps) < length).expand(BATCH, -1)
        residual = steered.residual(observations[:, :steps])
        slow = meta.slow_features(steered.inferred(observations[:, :steps], residual))
        x, proposals = meta.read(residual), meta.propose(slow, mask)
        segments = meta.segment(x, meta.summarise(x), proposals.mean, "soft")
        logits = steered(residual, segments.code)
        found.append([part[:, :length] for part in (proposals.mean, proposals.std, segments.code, logits)])
    for short, long in zip(*found, strict=True):
        close(short, long)


# ---------------------------------------------------------------------------------- hooks


def hooks(tap: ResidualTap) -> int:
    return sum(len(block._forward_hooks) for block in tap.blocks)


def test_hooks_are_removed_even_after_an_error(steered: SteeredModel, observations: Tensor) -> None:
    base, tap = steered.base, steered.tap
    before = base(observations).logits

    def fail(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), tap.steering(fail):
        base(observations)
    with pytest.raises(ZeroDivisionError), tap.skipping_lower_blocks(torch.zeros(1)), tap.steering(fail):
        base(observations)
    with pytest.raises(ZeroDivisionError):
        steered.step(observations[:, 0], steered.start(BATCH), lambda rows, x: fail(x))
    steered.residual(observations)
    assert hooks(tap) == 0
    assert not any("forward" in vars(block) for block in tap.blocks)
    assert torch.equal(base(observations).logits, before)


def test_hook_runs_once_under_gradient_checkpointing(observations: Tensor) -> None:
    """Checkpointing computes blocks again in the backward pass, when the tap is closed already."""
    gradients = []
    for checkpointing in (False, True):
        base = tiny_base("one-hot").requires_grad_(False)
        tap = ResidualTap(base)
        if checkpointing:
            base.backbone.activation_checkpointing_enable()
            base.train()
        offset, calls = torch.zeros(WIDTH, requires_grad=True), []

        def steer(e: Tensor, offset: Tensor = offset, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return e + offset

        with tap.steering(steer):
            logits = base(observations).logits
        logits.square().sum().backward()
        assert len(calls) == 1
        gradients.append(offset.grad)
    close(*gradients)


def test_discovery_is_the_same_under_gradient_checkpointing(observations: Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        steered = tiny_steered()
        if checkpointing:
            steered.base.backbone.activation_checkpointing_enable()
            steered.train()
        torch.manual_seed(0)
        discovery(steered, observations)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in steered.metacontroller.parameters()]))
    close(*gradients)


def test_every_forward_pass_comes_by_the_tap(observations: Tensor) -> None:
    """One that misses it is noticed, although others have come by."""
    base = tiny_base("one-hot")
    tap, untapped = ResidualTap(base), copy.deepcopy(base.backbone.layers[0])
    with tap.steering(lambda e: e + 1):
        assert torch.equal(base(observations).logits, base(observations).logits)
        base.backbone.layers[0] = untapped
        with pytest.raises(InternalRLError, match="never reached the tap after block 1"):
            base(observations)


def test_no_forward_pass_comes_by_the_tap_twice(observations: Tensor) -> None:
    """A block that is used again would be steered again."""
    base = tiny_base("one-hot")
    tap, (lower, upper) = ResidualTap(base), base.backbone.layers
    once = upper.forward
    upper.forward = lambda hidden, **inputs: once(lower(hidden, **inputs), **inputs)
    with pytest.raises(InternalRLError, match="Block 1 runs several times"), tap.steering(lambda e: e + 1):
        base(observations)
    assert hooks(tap) == 0


def test_base_compiled_beforehand_is_refused(observations: Tensor) -> None:
    """torch.compile does not look for hooks again: without the check the tap would silently do nothing."""
    base = tiny_base("one-hot")
    tap = ResidualTap(base)
    torch._dynamo.reset()
    compiled = torch.compile(base, backend="eager")
    with torch.no_grad():
        compiled(observations)
        with pytest.raises(InternalRLError, match=r"torch\.compile"), tap.steering(lambda e: e + 1):
            compiled(observations)
        with pytest.raises(InternalRLError, match="never reached the tap after block 1"):
            tap.read(compiled, observations=observations)
        with tap.steering(lambda e: e + 1):  # the model itself is as good as before
            steered = base(observations).logits
    assert hooks(tap) == 0
    assert (steered - base(observations).logits).abs().max() > 0.01
