"""Stage 2b, first half: rehearsal, on demonstrations, of what a code must do when the context is cut at every switch.

Discovery's base remembers the whole episode, so a code need not say what the base can work out by itself, and the
controller need not make it heard. Here the base sees the present segment alone. The code has to say all, in fewer
nats, since α rises once more, now that no switch can be lost by it: they stay where the discovered metacontroller has
them. And the switch learns to see a segment end from within the segment. No labels, no reward.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from internalrl.base.batches import Batch, demonstration_batches
from internalrl.discovery.objective import Episodes, action_nll
from internalrl.loop import Loop, optimise
from internalrl.metacontroller.model import Metacontroller, held_code
from internalrl.metacontroller.steered import SteeredModel
from internalrl.runlog import RunFolder
from internalrl.stages import RehearseConfig
from internalrl.streams import Stream

LOG_EVERY = 10


def cut_contexts(switch: Tensor) -> tuple[Tensor, Tensor]:
    """Segment numbers (B, T) that cut the context at each `switch` (B, T) bool, as decoding with `forget` does.

    Where the switch is decided, its step still belongs to the segment that it ends. Where the base then acts, it
    stands alone. Later steps see it in neither. The first step opens the first segment, whatever `switch` says.

    Returns:
        Numbers for deciding and for acting.
    """
    ended = switch.long()
    ended[:, 0] = 0
    opened = F.pad(ended.cumsum(1)[:, :-1], (1, 0))
    return opened, opened + ended.cumsum(1)


@dataclass
class Rehearsal:
    """Demonstrations, cut into segments: the `switch` (B, T) bool that cut them, True at the first step, slow features
    (B, T, k), actions and mask (B, T).

    `deciding` and `acting` are the residuals (B, T, n_e) that switch and base see, `opened` and `alone` (B, T) the
    segment numbers of their contexts.
    """

    deciding: Tensor
    acting: Tensor
    opened: Tensor
    alone: Tensor
    switch: Tensor
    slow: Tensor
    actions: Tensor
    mask: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, steered: SteeredModel, batch: Batch, segmenter: Metacontroller) -> Rehearsal:
        """`batch`, whose whole episodes are cut at the hard switches of `segmenter`."""
        whole = Episodes.of(steered, batch)
        segments, _ = segmenter.parse(whole.residual, whole.slow, batch.mask)
        switch = (segments.switch > 0.5) & batch.mask
        opened, alone = cut_contexts(switch)
        deciding, acting = (steered.residual(batch.observations, segments=numbers) for numbers in (opened, alone))
        return cls(deciding, acting, opened, alone, switch, whole.slow, batch.actions, batch.mask)


def rehearsal_loss(
    steered: SteeredModel, rehearsal: Rehearsal, kl_coef: float, switch_coef: float
) -> tuple[Tensor, dict[str, float]]:
    """−ELBO of the actions, per action, with the switches given and the context cut, + `switch_coef` · cross-entropy
    of the switches where they are free: not at the first step of a cut context."""
    meta, r = steered.metacontroller, rehearsal
    proposals = meta.propose(r.slow, r.mask)
    code = held_code(proposals.sample, r.switch)
    nll = action_nll(steered(r.acting, code, segments=r.alone), r.actions, r.mask)
    kl = proposals.kl()[r.switch].sum()
    x = meta.read(r.deciding)
    context = meta.switch_context(torch.cat([x, meta.summarise_segments(x, r.opened)], -1))
    logit = meta.switch_logit(context, F.pad(code[:, :-1], (0, 0, 1, 0)).detach())
    free = r.mask & ~F.pad(r.switch[:, :-1], (1, 0), value=True)
    bce = F.binary_cross_entropy_with_logits(logit[free], r.switch[free].float(), reduction="sum")
    bce = bce / free.sum().clamp(min=1)  # a switch that always fires is never free
    loss = nll + kl_coef * kl / r.mask.sum() + switch_coef * bce
    return loss, {
        "nll": nll.item(),
        "kl_per_switch": (kl / r.switch.sum()).item(),
        "switch_loss": bce.item(),
    }


def rehearse(steered: SteeredModel, config: RehearseConfig, run: RunFolder) -> Loop:
    """Train all of the metacontroller on demonstrations that were cut at its own switches."""
    meta, grid = steered.metacontroller, steered.base.config.grid
    segmenter, corpus = copy.deepcopy(meta), None
    optimizer = torch.optim.AdamW(meta.parameters(), lr=config.lr, weight_decay=0.0)
    choice = Stream.REHEARSE.torch(run.seed)
    modules = {"metacontroller": meta, "segmenter": segmenter}
    loop = Loop(run, "rehearse", config.steps, modules, {"adamw": optimizer}, {"choice": choice})
    for step in loop:
        if corpus is None:
            batches = demonstration_batches(grid, config.batch_size, run.seed, stream=Stream.REHEARSE)
            corpus = [Rehearsal.of(steered, batch, segmenter) for batch in islice(batches, config.batches)]
        rehearsal = corpus[int(torch.randint(len(corpus), (1,), generator=choice))]
        loss, metrics = rehearsal_loss(steered, rehearsal, kl_coef_at(step, config), config.switch_coef)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, 2 * (1 - step / config.steps))
        optimise(loss, optimizer)
        if step % LOG_EVERY == 0 or step == config.steps - 1:
            loop.log(loss=loss.item(), **metrics)
    return loop


def kl_coef_at(step: int, config: RehearseConfig) -> float:
    """α at a step: it rises geometrically over the first half."""
    risen = min(2 * step / config.steps, 1.0)
    return config.kl_coef_start ** (1 - risen) * config.kl_coef**risen
