"""Stage 2b, first half: rehearsal, on demonstrations, of what a code must do when the context is cut at every switch.

Discovery's base remembers the whole episode, so a code need not say what the base can work out by itself, and the
controller need not make it heard. Here the base sees the present segment alone. The code has to say all, in fewer
nats, since α rises once more, now that no switch can be lost by it: they stay where the discovered metacontroller has
them. And the switch learns to see a segment end from within the segment. No labels, no reward.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from internalrl.base.batches import Batch
from internalrl.controller.metacontroller import Metacontroller, held_code
from internalrl.controller.steered import SteeredModel
from internalrl.discovery.material import Material
from internalrl.discovery.objective import Episodes, action_nll
from internalrl.run.folder import RunFolder
from internalrl.run.loop import Loop, optimise
from internalrl.run.streams import Stream
from internalrl.settings.stages import RehearseConfig

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
    """Episodes whose context is broken at the `switch` (B, T) bool; it is True at the first step.

    `episodes` are as the base sees them when it acts. The switch reads the residual `deciding` (B, T, n_e) and learns
    where it is `free` (B, T). Where the context is cut, `opened` and `alone` (B, T) are the segment numbers of what
    switch and base see.
    """

    episodes: Episodes
    switch: Tensor
    free: Tensor
    deciding: Tensor
    opened: Tensor | None = None
    alone: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def cut(cls, steered: SteeredModel, batch: Batch, segmenter: Metacontroller) -> Rehearsal:
        """`batch`, whose whole episodes are cut at the hard switches of `segmenter`."""
        whole = Episodes.of(steered, batch)
        segments, _ = segmenter.parse(whole.residual, whole.slow, batch.mask)
        switch = (segments.switch > 0.5) & batch.mask
        opened, alone = cut_contexts(switch)
        deciding, acting = (steered.residual(batch.observations, segments=numbers) for numbers in (opened, alone))
        free = batch.mask & ~F.pad(switch[:, :-1], (1, 0), value=True)  # the first step of a cut context knows nothing
        return cls(replace(whole, residual=acting), switch, free, deciding, opened, alone)


def rehearsal_loss(
    steered: SteeredModel, rehearsal: Rehearsal, kl_coef: float, switch_coef: float
) -> tuple[Tensor, dict[str, float]]:
    """−ELBO of the actions, per action, with the switches given and the context broken, + `switch_coef` · cross-entropy
    of the switches where they are free."""
    meta, r, episodes = steered.metacontroller, rehearsal, rehearsal.episodes
    proposals = meta.propose(episodes.slow, episodes.mask)
    code = held_code(proposals.sample, r.switch)
    more = {} if r.alone is None else {"segments": r.alone}
    logits = steered(episodes.residual, code, episodes.where, **more)
    nll = action_nll(logits, episodes.actions, episodes.mask)
    kl = proposals.kl()[r.switch].sum()
    x = meta.read(r.deciding)
    before = meta.summarise(x) if r.opened is None else meta.summarise_segments(x, r.opened)
    context = meta.switch_context(torch.cat([x, before], -1))
    logit = meta.switch_logit(context, F.pad(code[:, :-1], (0, 0, 1, 0)).detach())
    bce = F.binary_cross_entropy_with_logits(logit[r.free], r.switch[r.free].float(), reduction="sum")
    bce = bce / r.free.sum().clamp(min=1)  # a switch that always fires is never free
    loss = nll + kl_coef * kl / episodes.mask.sum() + switch_coef * bce
    return loss, {
        "nll": nll.item(),
        "kl_per_switch": (kl / r.switch.sum()).item(),
        "switch_loss": bce.item(),
    }


def rehearse(steered: SteeredModel, material: Material, config: RehearseConfig, run: RunFolder) -> Loop:
    """Train all of the metacontroller on episodes whose context is broken at its own switches, as they were when the
    round began."""
    meta = steered.metacontroller
    segmenter, corpus = copy.deepcopy(meta), None
    optimizer = torch.optim.AdamW(meta.parameters(), lr=config.lr, weight_decay=0.0)
    choice = Stream.REHEARSE.torch(run.seed)
    modules = {"metacontroller": meta, "segmenter": segmenter}
    total = config.rounds * config.steps
    loop = Loop(run, "rehearse", total, modules, {"adamw": optimizer}, {"choice": choice})
    for step in loop:
        if step % config.steps == 0:
            segmenter.load_state_dict(meta.state_dict())
            corpus = None
        corpus = corpus or material.rehearsals(steered, config, segmenter)
        rehearsal = corpus[int(torch.randint(len(corpus), (1,), generator=choice))]
        loss, metrics = rehearsal_loss(steered, rehearsal, kl_coef_at(step, config), config.switch_coef)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, 2 * (1 - step % config.steps / config.steps))
        optimise(loss, optimizer)
        if step % LOG_EVERY == 0 or step == total - 1:
            loop.log(loss=loss.item(), **metrics)
    return loop


def kl_coef_at(step: int, config: RehearseConfig) -> float:
    """α at a step: it rises geometrically over the first half of the first round."""
    risen = min(2 * step / config.steps, 1.0)
    return config.kl_coef_start ** (1 - risen) * config.kl_coef**risen
