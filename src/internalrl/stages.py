"""Settings of the three stages: a dataclass each, a docstring per field; the command line is made from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from internalrl.domains.grid_layouts import GridConfig


@dataclass(frozen=True)
class BaseConfig:
    """The base model: a trajectory model on a Llama-style backbone."""

    encoder: Literal["planner", "one-hot"] = "planner"
    """Observation encoder: learned shortest paths, or the paper's one-hot path."""
    layers: int = 4
    """Decoder blocks L."""
    width: int = 128
    """Residual width n_e."""
    heads: int = 4
    """Attention heads."""
    mlp: int = 192
    """Hidden width of the gated MLP."""
    relative_buckets: int = 32
    """Buckets of the relative position bias."""
    relative_distance: int = 64
    """Distance from which all steps share the last bucket."""


@dataclass(frozen=True)
class MetacontrollerConfig:
    """Sizes of the metacontroller (paper, C.4)."""

    layer: int | Literal["middle"] = "middle"
    """Number of blocks below the tap."""
    n_z: int = 8
    """Size of a code."""
    n_h: int = 32
    """Size of the history."""
    n_s: int = 64
    """Size of the sequence embedding."""
    encoder_hidden: int = 128
    """Hidden width of the encoder."""
    switch_hidden: int = 32
    """Hidden width of the switch."""
    controller_hidden: int = 32
    """Hidden width of the hypernetwork that turns a code into a controller."""
    rank: int = 16
    """Rank of the controller."""
    controller_init: float = 0.03
    """Standard deviation of the controller's factors at the start."""
    encoder_gain: float = 6.0
    """Factor on the encoder's output weights at the start: codes that differ from the beginning survive the KL."""
    encoder_log_std: float = -2.0
    """Logarithm of the proposals' standard deviation at the start."""
    switch_bias: float = -1.5
    """Logit of an ignorant switch."""


@dataclass(frozen=True)
class ConsolidateConfig:
    """Stage 2b: consolidation, which makes a code mean the same in every context."""

    enabled: bool = True
    """Off: the paper's discovery alone."""
    episodes: int = 4096
    """Reward-free episodes that the teacher plays; they count towards internal RL's episodes."""
    steps: int = 500
    """Optimiser steps."""
    batch_size: int = 64
    """Episodes per step."""
    lr: float = 4e-3
    """AdamW learning rate; it falls linearly to zero over the second half."""
    switch_coef: float = 0.3
    """Weight of imitating the teacher's switches."""


@dataclass(frozen=True)
class DiscoverConfig:
    """Stage 2: discovery of abstract actions (paper, C.4), and the schedule that makes aligned switching reliable."""

    base: Path = Path("runs/pretrain")
    """Run folder of the base model."""
    metacontroller: MetacontrollerConfig = field(default_factory=MetacontrollerConfig)
    """Sizes of the metacontroller."""
    consolidate: ConsolidateConfig = field(default_factory=ConsolidateConfig)
    """Stage 2b."""
    form_steps: int = 225
    """Steps with random switches and nearly free information, in which codes form."""
    squeeze_steps: int = 225
    """Steps with random switches in which α rises, so that codes keep only what pays: the subgoal."""
    switch_steps: int = 700
    """Steps in which the switch is learned."""
    random_switch: float = 0.2
    """Probability of a random switch; its inverse is the time for which codes learn to persist."""
    batch_size: int = 128
    """Episodes per step."""
    batches: int = 300
    """Batches whose lower-half residuals are computed once and then reused."""
    crop: float = 0.7
    """Probability that an episode is cut to begin at a random step, so that codes cannot lean on what came before."""
    lr: float = 6e-3
    """AdamW learning rate."""
    switch_lr: float = 1.5e-2
    """AdamW learning rate of the switch."""
    weight_decay: float = 0.03
    """AdamW weight decay."""
    switch: Literal["counterfactual", "straight-through", "gumbel", "soft"] = "counterfactual"
    """How β is sampled and learned."""
    kl: Literal["switch-weighted", "every-step"] = "switch-weighted"
    """KL counted where a code is adopted (the exact ELBO, E.1) or at every step (the paper's loss, C.4)."""
    kl_coef_form: float = 0.003
    """α while codes form, in nats of action NLL per nat of KL."""
    kl_coef_squeeze: float = 0.1
    """α at the end of the squeeze."""
    kl_coef: float = 0.14
    """Final α."""
    switch_cost_start: float = 0.15
    """Nats charged per switch when the switch begins to learn."""
    switch_cost: float = 0.2
    """Nats charged per switch in the end."""
    hold_steps: int = 60
    """Steps for which α and the switch cost stay where they are when the switch begins to learn."""
    rise_steps: int = 80
    """Steps over which they then rise to their final values."""


@dataclass(frozen=True)
class ReinforceConfig:
    """Stage 3: internal RL (paper, C.5)."""

    discovered: Path = Path("runs/discover")
    """Run folder of base and adapter."""
    agent: Literal["internal", "raw-action"] = "internal"
    """Who learns: a policy over codes, or, as the baseline, the base model's own action distribution."""
    controller: bool = True
    """Off: no write-back at all, so that raw-action RL starts from the bare base."""
    task: str = "0-1-2-3-4-5-6-7-0-1-2-3"
    """Colours to visit in order; reward 1 for the whole of it."""
    episodes: int = 300_000
    """Most episodes."""
    target: float = 0.97
    """Stop when the mean success of the last five iterations reaches this."""
    batch_size: int = 1024
    """Episodes per iteration N."""
    lr: float = 4e-3
    """Adam learning rate."""
    epochs: int = 6
    """Passes over each batch of segments."""
    clip_coef: float = 0.2
    """Clip of the probability ratio."""
    initial_std: float = 1.0
    """Standard deviation of the policy's codes at the start; 1 is the prior's."""
    policy_hidden: int = 64
    """Width of the policy's recurrent layer."""
    temperature: float = 0.0
    """Temperature of the base model's actions; 0 is greedy."""
    forget: bool = False
    """Let the base model see the present segment alone, as consolidation's teacher does: codes then work in every
    context, at the price of a model that has to be decoded that way."""


@dataclass(frozen=True)
class PretrainConfig:
    """Stage 1: pretraining the base model on demonstrations (paper, C.1)."""

    grid: GridConfig = field(default_factory=GridConfig)
    """The grid world."""
    base: BaseConfig = field(default_factory=BaseConfig)
    """The base model."""
    steps: int = 1100
    """Optimiser steps."""
    batch_size: int = 128
    """Episodes per step."""
    observation_coef: float = 0.01
    """Weight λ of the next-observation loss."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon on the backbone's matrices and AdamW on the rest, or the paper's AdamW on all."""
    lr: float = 3e-3
    """AdamW learning rate."""
    muon_lr: float = 0.02
    """Muon learning rate."""
    weight_decay: float = 0.1
    """Weight decay of both."""
    decay: float = 0.6
    """Last fraction of the steps over which the learning rate falls to zero; 0 keeps it constant."""
    crop: float = 0.0
    """Probability that an episode is cut to begin at a random step."""
    noise: float = 0.0
    """The expert's noise ε."""


@dataclass(frozen=True)
class EvaluateConfig:
    """How a finished run's model is put to the test."""

    task: str | None = None
    """Colours to visit in order, such as 0-1-4-5; by default the run's own task."""
    episodes: int = 1024
    """Episodes to play, each on a new layout."""
    controller: Literal["policy", "prior", "off"] = "policy"
    """Who chooses the codes: the trained policy, N(0, I), or nobody, which leaves the bare base model."""
    deterministic: bool = False
    """Take the policy's mean code; with the controller off, the base model's best action."""
    forget: bool = False
    """Let the base model see the present segment alone; needed for what was reinforced that way."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"--episodes is {self.episodes}; give 1 or more.")


@dataclass(frozen=True)
class ReportConfig:
    """What the report measures for itself."""

    episodes: int = 512
    """Demonstrations, and episodes of free play, behind each figure."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"--episodes is {self.episodes}; give 1 or more.")


@dataclass(frozen=True)
class DemoConfig:
    """All three stages on the grid world; `discover.base` and `reinforce.discovered` are the demo's own."""

    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Stage 1."""
    discover: DiscoverConfig = field(default_factory=DiscoverConfig)
    """Stages 2 and 2b."""
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    """Stage 3; its episodes include those of consolidation."""
