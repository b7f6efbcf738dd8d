"""Stage 2: discovery of abstract actions in the frozen base, then consolidation (paper, C.4; consolidation is ours)."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from internalrl.base.batches import demonstration_batches, held_out
from internalrl.base.trajectory import load_trajectory_model, save_trajectory_model
from internalrl.discovery.consolidate import consolidate
from internalrl.discovery.evaluate import alignment, pass_rates
from internalrl.discovery.objective import Coefficients, Episodes, discovery_loss
from internalrl.loop import Loop, optimise
from internalrl.metacontroller.model import Metacontroller
from internalrl.metacontroller.steered import SteeredModel
from internalrl.runlog import RunFolder
from internalrl.stages import DiscoverConfig

LOG_EVERY = 10
EVALUATE_EVERY = 100


def main(config: DiscoverConfig, run: RunFolder) -> dict[str, Any]:
    """Discover and consolidate on the base model of another run; save base and adapter to `run`."""
    base = load_trajectory_model(config.base / "base")
    save_trajectory_model(base, run.path / "base")
    torch.manual_seed(run.seed)
    steered = SteeredModel.from_base(base, config.metacontroller)
    seconds = discover(steered, config, run).seconds
    if config.consolidate.enabled:
        seconds += consolidate(steered, config.consolidate, run).seconds
    steered.save_pretrained(run.path / "adapter", {"discover": {"seed": run.seed}})
    return {**evaluate(steered, run.seed), "seconds": seconds}


def discover(steered: SteeredModel, config: DiscoverConfig, run: RunFolder) -> Loop:
    """Train the metacontroller on demonstrations, in three phases; the base stays frozen.

    Codes form under random switches, when information is nearly free; they are squeezed, still under random
    switches, until they hold little but the subgoal; only then is it worth asking when to switch.
    """
    meta, grid = steered.metacontroller, steered.base.config.grid
    corpus = read_corpus(steered, config, run.seed)
    unseen = held_out(grid, 256, run.seed)
    optimizer = make_optimizer(meta, config)
    choice = torch.Generator().manual_seed(run.seed)
    learn_from = config.form_steps + config.squeeze_steps
    total = learn_from + config.switch_steps
    loop = Loop(run, "discover", total, {"metacontroller": meta}, {"adamw": optimizer}, {"choice": choice})
    for step in loop:
        if step == learn_from:
            meta.reset_switch()
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


def read_corpus(steered: SteeredModel, config: DiscoverConfig, seed: int) -> list[Episodes]:
    """Demonstrations with the frozen lower half's residuals, computed once."""
    stream = demonstration_batches(steered.base.config.grid, config.batch_size, seed + 1, crop=config.crop)
    batches = (next(stream) for _ in range(config.batches))
    return [Episodes(steered.residual(batch.observations), batch.actions, batch.mask) for batch in batches]


def make_optimizer(meta: Metacontroller, config: DiscoverConfig) -> torch.optim.Optimizer:
    """AdamW, with its own rate for the switch."""
    switch = meta.parameters_of("switch")
    rest = meta.parameters_of("history", "encoder", "controller")
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": switch, "lr": config.switch_lr}]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def coefficients_at(step: int, config: DiscoverConfig) -> Coefficients:
    """α and c at a step: both rise geometrically, α in the squeeze and again, with c, as the switch is learned."""
    squeezed = min(max(step - config.form_steps, 0) / max(config.squeeze_steps, 1), 1.0)
    rising = step - config.form_steps - config.squeeze_steps - config.hold_steps
    risen = min(max(rising, 0) / max(config.rise_steps, 1), 1.0)
    return Coefficients(
        config.kl_coef_form ** (1 - squeezed) * config.kl_coef_squeeze ** (squeezed - risen) * config.kl_coef**risen,
        config.switch_cost_start ** (1 - risen) * config.switch_cost**risen,
        config.kl,
    )


def rate_at(step: int, config: DiscoverConfig) -> float:
    """Learning-rate factor: 1 while codes form and are squeezed, then linearly from 2/3 to 0."""
    learning = (step - config.form_steps - config.squeeze_steps) / max(config.switch_steps, 1)
    return 1.0 if learning < 0 else 2 / 3 * (1 - learning)


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
