"""Stage 2: discovery of abstract actions in the frozen base, then consolidation (paper, C.4; consolidation is ours)."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from internalrl.base.loading import load_base as load_language_model
from internalrl.base.loading import load_tokenizer
from internalrl.base.pretrain_text import save_language_model
from internalrl.base.text_data import tokenise
from internalrl.base.trajectory import TrajectoryModel, load_trajectory_model, save_trajectory_model
from internalrl.controller.adapter import Adapter
from internalrl.controller.metacontroller import Metacontroller
from internalrl.controller.steered import SteeredModel
from internalrl.discovery.consolidate import consolidate
from internalrl.discovery.grid import GridMaterial
from internalrl.discovery.material import Material
from internalrl.discovery.objective import Coefficients, discovery_loss
from internalrl.discovery.programs import CodeDomain
from internalrl.discovery.slow import slow_features
from internalrl.discovery.text import TextMaterial
from internalrl.domains.code.grammar import CodeConfig
from internalrl.domains.code.tokenizer import load_tokenizer as load_code_tokenizer
from internalrl.errors import InternalRLError
from internalrl.run.folder import RunFolder
from internalrl.run.loop import Loop, optimise
from internalrl.run.streams import Stream
from internalrl.settings.stages import DiscoverConfig

LOG_EVERY = 10
SLOW_EPISODES = 1024  # that slow features are found on
EVALUATE_EVERY = 100


def main(config: DiscoverConfig, run: RunFolder) -> dict[str, Any]:
    """Discover and consolidate on the base model of another run; save base and adapter to `run`."""
    base = load_base(config)
    material = make_material(base, config, run.seed)
    if isinstance(base, TrajectoryModel):
        save_trajectory_model(base, run.path / "base")
    else:
        save_language_model(base, load_tokenizer(base_folder(config)), run.path / "base")
    torch.manual_seed(run.seed)
    steered = SteeredModel.from_base(base, config.metacontroller)
    seconds = discover(steered, material, config, run).seconds
    if config.consolidate.enabled:
        seconds += sum(consolidate(steered, material, config.consolidate, run).values())
    steered.save_pretrained(run.path / "adapter", {"discover": {"seed": run.seed}})
    return {**material.measure(steered), "seconds": seconds}


def check(config: DiscoverConfig) -> None:
    """InternalRLError where there is no base, or the metacontroller or the texts do not fit it."""
    make_material(load_base(config), config, seed=0)


def base_folder(config: DiscoverConfig) -> Path:
    """Where the base model is: in a run folder, or itself."""
    inside = config.base / "base"
    return inside if config.data is None or inside.exists() else config.base


def load_base(config: DiscoverConfig) -> PreTrainedModel:
    """The base model of `config`; InternalRLError where there is none, or the metacontroller does not fit it."""
    folder, meta = base_folder(config), config.metacontroller
    if config.data is None and meta.view == "following":
        raise InternalRLError("No tokens follow on the grid; give --metacontroller.view inferred, or --data.")
    base = load_trajectory_model(folder) if config.data is None else load_language_model(folder)
    Adapter(base, meta)
    return base


def make_material(base: PreTrainedModel, config: DiscoverConfig, seed: int) -> Material:
    """The texts of `config`, or else the grid that `base` knows."""
    if config.data is None:
        return GridMaterial(base.config.grid, seed)
    tokenizer, programs = load_tokenizer(base_folder(config)), None
    if config.domain != "text":
        code = CodeConfig() if config.domain == "code" else CodeConfig.large()
        programs = CodeDomain(code, load_code_tokenizer(base_folder(config), code))
    return TextMaterial(tokenise(config.data, tokenizer, base.config), seed, programs)


def discover(steered: SteeredModel, material: Material, config: DiscoverConfig, run: RunFolder) -> Loop:
    """Train the metacontroller on the episodes of `material`, in three phases; the base stays frozen.

    Codes form under random switches, when information is nearly free; they are squeezed, still under random
    switches, until they hold little but the subgoal; only then is it worth asking when to switch. Once that is
    known, crops begin where the learned switch fires, so that a code always stands for a whole segment.
    """
    meta = steered.metacontroller
    find_slow_features(steered, material, config)
    segmenter, corpus = copy.deepcopy(meta), None
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
            corpus = material.corpus(steered, config, segmenter if step >= recrop_from else None)
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
                metrics |= material.measure(steered, thorough=False)
            loop.log(**metrics)
    warn_of_collapse(run.metrics("discover")[-1])
    return loop


def find_slow_features(steered: SteeredModel, material: Material, config: DiscoverConfig) -> None:
    """Give the metacontroller the features that its encoder reads, found on whole episodes."""
    meta, batch = steered.metacontroller, material.sample(SLOW_EPISODES)
    seen = meta.read(steered.view(batch.observations, steered.residual(batch.observations)))
    meta.slow_mean, meta.slow, _ = slow_features(seen, batch.mask, meta.config.slow_features, config.slow_lag)


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
    elif metrics["hard_switches"] > 5 * metrics.get("true_switches", float("inf")):
        warnings.warn("The switch has collapsed: a new code is sent at nearly every step.", stacklevel=2)
    if metrics["kl"] < 0.1:
        warnings.warn("The codes have collapsed onto the prior: they carry no information.", stacklevel=2)
