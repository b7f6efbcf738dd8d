"""Settings of the three stages: a dataclass each, a docstring per field; the command line is made from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from internalrl.domains.grid.layouts import GridConfig
from internalrl.errors import OptionError
from internalrl.run.metrics import TrackerName
from internalrl.settings.ranges import Checked, Count, Fraction, Natural, NotNegative, Positive, Range


def require_even_heads(width: int, heads: int) -> None:
    """OptionError unless `width` splits into `heads` of even size, which rotary positions need."""
    if width % (2 * heads):
        raise OptionError("heads", f"is {heads}; the width, {width}, must split into heads of even size.")


@dataclass(frozen=True)
class BaseConfig(Checked):
    """The base model: a trajectory model on a Llama-style backbone."""

    encoder: Literal["planner", "one-hot"] = "planner"
    """Observation encoder: learned shortest paths, or the paper's one-hot path."""
    layers: Count = 4
    """Decoder blocks L."""
    width: Count = 128
    """Residual width n_e."""
    heads: Count = 4
    """Attention heads."""
    mlp: Count = 192
    """Hidden width of the gated MLP."""
    relative_buckets: Annotated[int, Range(2)] = 32
    """Buckets of the relative position bias."""
    relative_distance: Count = 64
    """Distance from which all steps share the last bucket."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_even_heads(self.width, self.heads)
        if self.relative_distance <= self.relative_buckets // 2:
            raise OptionError(
                "relative_distance",
                f"is {self.relative_distance}; give more than half the number of buckets, {self.relative_buckets}.",
            )


@dataclass(frozen=True)
class MetacontrollerConfig(Checked):
    """Sizes of the metacontroller (paper, C.4)."""

    layer: Annotated[int | Literal["middle"], Range(1)] = "middle"
    """Number of blocks below the tap."""
    n_z: Count = 8
    """Size of a code."""
    n_h: Count = 32
    """Size of the history."""
    view: Literal["inferred", "following"] = "inferred"
    """What the encoder's features are taken from: what the base has inferred, or, of texts, the tokens that follow."""
    slow_features: Count = 4
    """Features that the encoder sees, and all that it sees."""
    horizon: Count = 12
    """Steps, from the present one on, whose slow features the encoder sees."""
    n_s: Count = 64
    """Size of the sequence embedding."""
    encoder_hidden: Count = 128
    """Hidden width of the encoder."""
    switch_hidden: Count = 32
    """Hidden width of the switch."""
    controller_hidden: Count = 32
    """Hidden width of the hypernetwork that turns a code into a controller."""
    rank: Count = 16
    """Rank of the controller."""
    controller_init: Positive = 0.03
    """Standard deviation of the controller's factors at the start."""
    encoder_gain: Positive = 6.0
    """Factor on the encoder's output weights at the start: codes that differ from the beginning survive the KL."""
    encoder_log_std: Annotated[float, Range(-5, 2)] = -2.0
    """Logarithm of the proposals' standard deviation at the start."""
    switch_bias: float = -1.5
    """Logit of an ignorant switch."""


@dataclass(frozen=True)
class RehearseConfig(Checked):
    """Stage 2b, first half: episodes with the context broken at every switch."""

    rounds: Count = 1
    """Times that the episodes are broken anew, at the switches as they are then."""
    steps: Count = 350
    """Optimiser steps of a round."""
    batch_size: Count = 128
    """Episodes per step."""
    batches: Count = 60
    """Batches whose lower-half residuals are computed once and then reused."""
    lr: Positive = 2e-3
    """AdamW learning rate; it falls linearly to zero over the second half."""
    kl_coef_start: NotNegative = 0.1
    """α at first."""
    kl_coef: NotNegative = 0.3
    """α in the second half."""
    switch_coef: NotNegative = 0.3
    """Weight of the switches."""


@dataclass(frozen=True)
class ConsolidateConfig(Checked):
    """Stage 2b: consolidation, which makes a code mean the same in every context."""

    enabled: bool = True
    """Off: the paper's discovery alone."""
    rehearse: RehearseConfig = field(default_factory=RehearseConfig)
    """The first half."""
    episodes: Count = 3072
    """Reward-free episodes that the teacher plays; they count towards internal RL's episodes."""
    steps: Natural = 1200
    """Optimiser steps of the second half; 0 leaves it out. Texts have none: in rehearsal they are already whole."""
    batch_size: Count = 32
    """Episodes per step."""
    lr: Positive = 2e-3
    """AdamW learning rate; it falls linearly to zero over the second half."""
    switch_coef: NotNegative = 0.3
    """Weight of imitating the teacher's switches."""


@dataclass(frozen=True)
class DiscoverConfig(Checked):
    """Stage 2: discovery of abstract actions (paper, C.4), and the schedule that makes aligned switching reliable."""

    base: Path = Path("runs/pretrain")
    """Run folder of the base model; of a language model also the folder that it and its tokenizer were saved to."""
    data: Path | None = None
    """JSONL file of texts, with `text`, `prompt` and `completion`, or `messages`: with it the base is a language
    model; without, the grid's. See the preset `text`."""
    domain: Literal["text", "code", "code-large"] = "text"
    """What is known of the texts: nothing, or that they are programs of the code domain (or of its large preset)."""
    metacontroller: MetacontrollerConfig = field(default_factory=MetacontrollerConfig)
    """Sizes of the metacontroller."""
    consolidate: ConsolidateConfig = field(default_factory=ConsolidateConfig)
    """Stage 2b."""
    slow_lag: Natural = 4
    """Steps over which a slow feature persists; 0 takes those that vary most."""
    form_steps: Natural = 500
    """Steps with random switches and nearly free information, in which codes form."""
    squeeze_steps: Natural = 100
    """Steps with random switches in which α rises, so that codes keep only what pays: the subgoal."""
    switch_steps: Count = 450
    """Steps in which the switch is learned."""
    recrop_steps: Count = 150
    """Of these, the steps after which crops begin where the learned switch fires, instead of at random."""
    random_switch: Fraction = 0.12
    """Probability of a random switch; its inverse is the time for which codes learn to persist."""
    batch_size: Count = 128
    """Episodes per step."""
    batches: Count = 104
    """Batches whose lower-half residuals are computed once and then reused."""
    crop: Fraction = 0.7
    """Probability that an episode is cut to begin at a later step, so that codes cannot lean on what came before."""
    lr: Positive = 2e-3
    """AdamW learning rate."""
    switch_lr: Positive = 6e-3
    """AdamW learning rate of the switch."""
    decay: NotNegative = 1.5
    """The learning rates fall linearly to zero over the last `decay` · `switch_steps`, but not before the switch is
    learned (above 1, they then begin lower); 0 keeps them constant."""
    weight_decay: NotNegative = 0.03
    """AdamW weight decay."""
    switch: Literal["counterfactual", "straight-through", "gumbel", "soft"] = "counterfactual"
    """How β is sampled and learned."""
    kl: Literal["switch-weighted", "every-step"] = "switch-weighted"
    """KL counted where a code is adopted (the exact ELBO, E.1) or at every step (the paper's loss, C.4)."""
    kl_coef_form: NotNegative = 0.003
    """α while codes form, in nats of action NLL per nat of KL."""
    kl_coef_squeeze: NotNegative = 0.03
    """α at the end of the squeeze."""
    kl_coef: NotNegative = 0.1
    """Final α."""
    switch_cost_start: NotNegative = 0.03
    """Nats charged per switch when the switch begins to learn."""
    switch_cost: NotNegative = 0.1
    """Nats charged per switch in the end."""
    hold_steps: Natural = 80
    """Steps for which α and the switch cost stay where they are when the switch begins to learn."""
    rise_steps: Natural = 200
    """Steps over which they then rise to their final values."""


@dataclass(frozen=True)
class PolicyGradientConfig(Checked):
    """Stage 3 on whatever is played: budget, update and policy."""

    agent: Literal["internal", "raw-action"] = "internal"
    """Who learns: a policy over codes, or, as the baseline, the base model's own distribution of actions or tokens."""
    episodes: Count = 300_000
    """Most episodes, played in whole batches; one batch is always played."""
    target: Annotated[float | None, Range(0, above=True)] = 0.97
    """Stop when the mean success of the last five iterations reaches this."""
    batch_size: Annotated[int, Range(2)] = 1024
    """Episodes per iteration N."""
    lr: Positive = 4e-3
    """Adam learning rate; it falls linearly to zero over the second half."""
    epochs: Count = 6
    """Passes over each batch of segments."""
    clip_coef: Positive = 0.2
    """Clip of the probability ratio."""
    replay: Natural = 0
    """Successes that a policy over codes learns from again with every batch, the newest; for rewards so rare that one
    iteration's learning from them is lost."""
    decision_cost: NotNegative = 1.0
    """Where nothing is rewarded and outcomes are known: what a decision costs, in nats of novelty."""
    initial_std: Positive = 1.2
    """Standard deviation of the policy's codes at the start; 1 is the prior's."""
    policy_hidden: Count = 64
    """Width of the policy's recurrent layer."""
    temperature: NotNegative = 0.0
    """Temperature of the base model's actions or tokens; 0 is greedy."""


@dataclass(frozen=True)
class CompletionConfig(PolicyGradientConfig):
    """Stage 3 on text: how completions are made and compared."""

    max_completion_length: Count = 256
    """The most tokens of a completion."""
    num_generations: Annotated[int, Range(2)] = 8
    """Completions per prompt in a batch; those of the same prompt are compared with one another."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward function; by default 1."""


@dataclass(frozen=True)
class InternalRLConfig(CompletionConfig):
    """Settings of `InternalRLTrainer`."""

    output_dir: Path = Path("runs/reinforce")
    """Run folder: config, metrics, checkpoints and, at the end, the adapter."""
    seed: Natural = 0
    """Seed of all randomness."""
    overwrite_output_dir: bool = False
    """Replace the run in the folder."""
    report_to: TrackerName | None = None
    """Who gets the metrics as well; None: the folder alone."""
    target: Annotated[float | None, Range(0, above=True)] = None
    """Stop when the mean reward of the last five iterations reaches this; None: never."""


@dataclass(frozen=True)
class ReinforceConfig(CompletionConfig):
    """Stage 3: internal RL (paper, C.5)."""

    discovered: Path = Path("runs/discover")
    """Run folder of base and adapter."""
    controller: bool = True
    """Off: no write-back at all, so that raw-action RL starts from the bare base."""
    task: str = "0-1-2-3-4-5-6-7-0-1-2-3"
    """Colours to visit in order; reward 1 for the whole of it."""
    forget: bool = True
    """Cut the base model's context at every switch, as consolidation's teacher does: what came before a segment then
    cannot talk the base out of it. Off: the whole context. Language models always have the whole context."""
    limits: Path | None = None
    """YAML file of the strategies that the policy may not use; see docs/serving.md."""
    prompts: Path | None = None
    """JSONL file with a `prompt` in each line, and whatever columns the rewards read: with it the base is a language
    model; without, the grid's."""
    rewards: tuple[str, ...] = ()
    """Reward functions of completions, as dotted paths: package.module.function."""
    outcomes: str | None = None
    """Function like those of rewards, as a dotted path, that says as a string what a completion came to: with it the
    policy explores while nothing is rewarded."""
    environment: str | None = None
    """Dotted path of a class of environments, whose methods the model calls as tools."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limits is not None and self.agent == "raw-action":
            raise OptionError("limits", "is given, but raw-action RL has no codes to limit; leave it out.")


@dataclass(frozen=True)
class BaseTrainingConfig(Checked):
    """How a base model is trained, whatever it is."""

    steps: Count = 1100
    """Optimiser steps."""
    batch_size: Count = 128
    """Episodes, or texts, per step."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon on the backbone's matrices and AdamW on the rest, or the paper's AdamW on all."""
    lr: Positive = 3e-3
    """AdamW learning rate."""
    muon_lr: Positive = 0.02
    """Muon learning rate."""
    weight_decay: NotNegative = 0.1
    """Weight decay of both."""
    decay: Fraction = 0.6
    """Last fraction of the steps over which the learning rate falls to zero; 0 keeps it constant."""


@dataclass(frozen=True)
class PretrainConfig(BaseTrainingConfig):
    """Stage 1: pretraining the base model on demonstrations (paper, C.1)."""

    grid: GridConfig = field(default_factory=GridConfig)
    """The grid world."""
    base: BaseConfig = field(default_factory=BaseConfig)
    """The base model."""
    observation_coef: NotNegative = 0.01
    """Weight λ of the next-observation loss."""
    crop: Fraction = 0.25
    """Probability that an episode is cut to begin at a random step, so that the base knows what to do when its context
    is cut; 0 for the paper's whole episodes."""
    noise: Fraction = 0.0
    """The expert's noise ε."""


@dataclass(frozen=True)
class PretrainTextConfig(BaseTrainingConfig):
    """Stage 1 on text: a small Llama, trained from nothing."""

    steps: Count = 1400
    """Optimiser steps."""
    batch_size: Count = 64
    """Texts per step."""
    layers: Count = 4
    """Decoder blocks L."""
    width: Count = 128
    """Residual width n_e."""
    heads: Count = 4
    """Attention heads."""
    mlp: Count = 320
    """Hidden width of the gated MLP."""
    context: Count = 512
    """The longest text, in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_even_heads(self.width, self.heads)


@dataclass(frozen=True)
class EvaluateConfig(Checked):
    """How a finished run's model is put to the test."""

    task: str | None = None
    """Colours to visit in order, such as 0-1-4-5; by default the run's own task."""
    episodes: Count = 1024
    """Episodes to play, each on a new layout, or completions to write."""
    controller: Literal["policy", "prior", "off"] = "policy"
    """Who chooses the codes: the trained policy, N(0, I), or nobody, which leaves the bare base model."""
    deterministic: bool = False
    """Take the policy's mean code; with the controller off, the base model's best action."""
    forget: bool | None = None
    """Cut the base model's context at every switch; by default as the run was reinforced."""
    prompts: Path | None = None
    """Of a language model: JSONL file as for `reinforce`, whose prompts are completed in turn; by default the run's."""
    rewards: tuple[str, ...] = ()
    """Of a language model: reward functions of completions, as dotted paths; by default the run's."""
    max_completion_length: Annotated[int | None, Range(1)] = None
    """Of a language model: the most tokens of a completion; by default as the run was reinforced."""


@dataclass(frozen=True)
class ReportConfig(Checked):
    """What the report measures for itself."""

    episodes: Count = 512
    """Demonstrations, and episodes of free play, behind each figure."""
