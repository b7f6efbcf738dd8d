"""Stage 2b, consolidation: distil forgetting into the controller, so that a code means the same in every context.

The corpus shows only some transitions between subgoals, so a discovered code is read relative to what the base
believes possible, and fails where the base has never gone. With the context cut at the last switch the same code
works everywhere. So the steered model with a cut context rehearses on demonstrations (`rehearse`), and is then the
teacher of the steered model with its full context: same codes, same frozen base, no labels and no reward. This step
goes beyond the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from internalrl.controller.steered import SteeredModel
from internalrl.discovery.material import Material
from internalrl.discovery.rehearse import rehearse
from internalrl.run.folder import RunFolder
from internalrl.run.loop import Loop, optimise
from internalrl.run.streams import Stream
from internalrl.settings.stages import ConsolidateConfig

LOG_EVERY = 10


@dataclass
class Lesson:
    """What the teacher did on one batch of its own episodes.

    residual (B, T, n_e) with the full context; code (B, T, n_z), switch (B, T) and action logits (B, T, A) with the
    cut one; mask (B, T).
    """

    residual: Tensor
    code: Tensor
    switch: Tensor
    logits: Tensor
    mask: Tensor


def consolidation_loss(steered: SteeredModel, lesson: Lesson, switch_coef: float) -> tuple[Tensor, dict[str, float]]:
    """KL(teacher ‖ student) of the actions + `switch_coef` · cross-entropy of the teacher's switches, per step."""
    meta = steered.metacontroller
    x = meta.read(lesson.residual)
    segments = meta.hold(x, meta.summarise(x), lesson.code, lesson.switch)
    student = F.log_softmax(steered(lesson.residual, segments.code)[lesson.mask], -1)
    teacher = F.log_softmax(lesson.logits[lesson.mask], -1)
    kl = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    decided = lesson.mask.clone()
    decided[:, 0] = False  # the first step always opens a segment
    bce = F.binary_cross_entropy_with_logits(segments.logit[decided], lesson.switch[decided].float())
    return kl + switch_coef * bce, {"kl": float(kl.detach()), "switch_loss": float(bce.detach())}


def consolidate(
    steered: SteeredModel, material: Material, config: ConsolidateConfig, run: RunFolder
) -> dict[str, float]:
    """Both halves, one after the other; their seconds by name."""
    seconds = {"rehearse": rehearse(steered, material, config.rehearse, run).seconds}
    return seconds | ({"consolidate": distil(steered, material, config, run).seconds} if config.steps else {})


def distil(steered: SteeredModel, material: Material, config: ConsolidateConfig, run: RunFolder) -> Loop:
    """Let the forgetful teacher play with random codes, then train the student on what it did."""
    meta = steered.metacontroller
    optimizer = torch.optim.AdamW(meta.parameters_of("history", "switch", "controller"), lr=config.lr, weight_decay=0.0)
    choice = Stream.CONSOLIDATE.torch(run.seed)
    loop = Loop(run, "consolidate", config.steps, {"metacontroller": meta}, {"adamw": optimizer}, {"choice": choice})
    lessons = material.lessons(steered, config)
    for step in loop:
        lesson = lessons[int(torch.randint(len(lessons), (1,), generator=choice))]
        loss, metrics = consolidation_loss(steered, lesson, config.switch_coef)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, 2 * (1 - step / config.steps))
        optimise(loss, optimizer)
        if step % LOG_EVERY == 0 or step == config.steps - 1:
            loop.log(loss=loss.item(), **metrics)
    return loop
