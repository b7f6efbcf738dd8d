"""Stage 2: discovery of abstract actions in the frozen base, then consolidation (paper, C.4; consolidation is ours)."""

from __future__ import annotations

import copy
import warnings
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from internalrl.base.batches import Batch, demonstration_batches, held_out
from internalrl.base.trajectory import TrajectoryModel, load_trajectory_model, save_trajectory_model
from internalrl.discovery.consolidate import consolidate
from internalrl.discovery.evaluate import alignment, pass_rates
from internalrl.discovery.objective import Coefficients, Episodes, discovery_loss
from internalrl.discovery.slow import slow_features
from internalrl.loop import Loop, optimise
from internalrl.metacontroller.adapter import Adapter
from internalrl.metacontroller.model import Metacontroller
from internalrl.metacontroller.steered import SteeredModel
from internalrl.runlog import RunFolder
from internalrl.stages import DiscoverConfig
from internalrl.streams import Stream

LOG_EVERY = 10
SLOW_EPISODES = 1024  # that slow features are found on
EVALUATE_EVERY = 100


def main(config: DiscoverConfig, run: RunFolder) -> dict[str, Any]:
    """Discover and consolidate on the base model of another run; save base and adapter to `run`."""
    base = load_base(config)
    save_trajectory_model(base, run.path / "base")
    torch.manual_seed(run.seed)
    steered = SteeredModel.from_base(base, config.metacontroller)
    seconds = discover(steered, config, run).seconds
    if config.consolidate.enabled:
        seconds += sum(consolidate(steered, config.consolidate, run).values())
    steered.save_pretrained(run.path / "adapter", {"discover": {"seed": run.seed}})
    return {**evaluate(steered, run.seed), "seconds": seconds}


def load_base(config: DiscoverConfig) -> TrajectoryModel:
    """The base model of `config`; InternalRLError where there is none, or the metacontroller does not fit it."""
    base = load_trajectory_model(config.base / "base")
    Adapter(base, config.metacontroller)
    return base


def discover(steered: SteeredModel, config: DiscoverConfig, run: RunFolder) -> Loop:
    """Train the metacontroller on demonstrations, in three phases; the base stays frozen.

    Codes form under random switches, when information is nearly free; they are squeezed, still under random
    switches, until they hold little but the subgoal; only then is it worth asking when to switch. Once that is
    known, crops begin where the learned switch fires, so that a code always stands for a whole segment.
    """
    meta, grid = steered.metacontroller, steered.base.config.grid
    find_slow_features(steered, config, run.seed)
    segmenter, corpus = copy.deepcopy(meta), None
    unseen = held_out(grid, 256, run.seed)
    optimizer = make_optimizer(meta, config)
    choice = Stream.DISCOVER.torch(run.seed)
    learn_from = config.form_steps + config.squeeze_steps
    total = learn_from + config.switch_steps
    recrop_from = learn_from + config.recrop_steps if config.crop else total  # without crops there is none to move
    modules = {"metacontroller": meta, "segmenter": segmenter}
    loop = Loop(run, "discover", total, modules, {"adamw": optimizer}, {"choice": choice})
    for step in loop:
        if step == learn_from:
            meta.reset_switch()
        if step == recrop_from:
            segmenter.load_state_dict(meta.state_dict())
        if corpus is None or step == recrop_from:
            corpus = read_corpus(steered, config, run.seed, segmenter if step >= recrop_from else None)
        episodes = corpus[int(torch.randint(len(corpus), (1,), generator=choice))]
        loss, metrics = discovery_loss(
            steered,
            episodes,
            coefficients_at(step, config),
            config.switch,
            random_switch=config.random_switch if step < learn_from else None,
        )
        for group, rate in zip(optimizer.param_groups, (config.lr, config.switch_lr), strict=True):
            group["lr"] = rate * rate_at(step, config)
        optimise(loss, optimizer)
        last = step == total - 1
        if step % LOG_EVERY == 0 or last:
            if step % EVALUATE_EVERY == 0 or last:
                metrics |= alignment(steered, unseen) | pass_rates(steered, grid, 64, run.seed)
            loop.log(**metrics)
    warn_of_collapse(run.metrics("discover")[-1])
    return loop


def find_slow_features(steered: SteeredModel, config: DiscoverConfig, seed: int) -> None:
    """Give the metacontroller the slow features that its encoder reads, found on whole demonstrations."""
    meta, grid = steered.metacontroller, steered.base.config.grid
    batch = held_out(grid, SLOW_EPISODES, seed, Stream.SLOW)
    inferred = meta.read(steered.inferred(batch.observations, steered.residual(batch.observations)))
    meta.slow_mean, meta.slow, _ = slow_features(inferred, batch.mask, meta.config.slow_features, config.slow_lag)


def read_corpus(
    steered: SteeredModel, config: DiscoverConfig, seed: int, segmenter: Metacontroller | None = None
) -> list[Episodes]:
    """Demonstrations with the frozen lower half's residuals, computed once; crops begin after the hard switches of
    `segmenter` if there is one."""

    @torch.no_grad()
    def openings(batch: Batch) -> np.ndarray:
        assert segmenter is not None
        episodes = Episodes.of(steered, batch)
        segments, _ = segmenter.parse(episodes.residual, episodes.slow, batch.mask)
        return F.pad(segments.switch[:, 1:-1] > 0.5, (2, 0)).numpy()  # the step after a switch

    batches = demonstration_batches(
        steered.base.config.grid,
        config.batch_size,
        seed,
        crop=config.crop,
        stream=Stream.DISCOVER,
        openings=openings if segmenter is not None else None,
    )
    return [Episodes.of(steered, batch) for batch in islice(batches, config.batches)]


def make_optimizer(meta: Metacontroller, config: DiscoverConfig) -> torch.optim.Optimizer:
    """AdamW, with its own rate for the switch."""
    switch = meta.parameters_of("switch")
    rest = meta.parameters_of("history", "encoder", "controller")
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": switch, "lr": config.switch_lr}]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def coefficients_at(step: int, config: DiscoverConfig) -> Coefficients:
    """α and c at a step: both rise geometrically, α in the squeeze and again, with c, as the switch is learned."""
    squeezing = step - config.form_steps
    rising = squeezing - config.squeeze_steps - config.hold_steps
    squeezed, risen = _share(squeezing, config.squeeze_steps), _share(rising, config.rise_steps)
    return Coefficients(
        config.kl_coef_form ** (1 - squeezed) * config.kl_coef_squeeze ** (squeezed - risen) * config.kl_coef**risen,
        config.switch_cost_start ** (1 - risen) * config.switch_cost**risen,
        config.kl,
    )


def _share(steps: int, duration: int) -> float:
    """How much of a phase is over after `steps`; one that takes no time is over when it begins."""
    return min(max(steps / duration, 0.0), 1.0) if duration else float(steps >= 0)


def rate_at(step: int, config: DiscoverConfig) -> float:
    """Learning-rate factor: 1 while codes form and are squeezed, then falling to zero as `decay` says."""
    left = config.form_steps + config.squeeze_steps + config.switch_steps - step
    if left > config.switch_steps or not config.decay:
        return 1.0
    return min(left / (config.decay * config.switch_steps), 1.0)


def warn_of_collapse(metrics: dict[str, Any]) -> None:
    """Warn when hard switches are far from the time scale that codes were trained to persist for, or say nothing."""
    if metrics["hard_switches"] < 0.05:
        warnings.warn("The switch has collapsed: it never fires after the first step.", stacklevel=2)
    elif metrics["hard_switches"] > 5 * metrics["true_switches"]:
        warnings.warn("The switch has collapsed: a new code is sent at nearly every step.", stacklevel=2)
    if metrics["kl"] < 0.1:
        warnings.warn("The codes have collapsed onto the prior: they carry no information.", stacklevel=2)


def evaluate(steered: SteeredModel, seed: int) -> dict[str, Any]:
    """Alignment on fresh demonstrations and the pass rates of random codes."""
    grid = steered.base.config.grid
    return {**alignment(steered, held_out(grid, 1024, seed)), "pass_rates": pass_rates(steered, grid, 512, seed)}
