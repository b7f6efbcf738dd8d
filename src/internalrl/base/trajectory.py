"""TrajectoryModel: observations in, actions out, around any Hugging Face backbone (paper, C.1)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Cache, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from internalrl.base.caches import PreallocatedLayer, cache_input, require_filled
from internalrl.base.encoders import ENCODERS, EncoderState
from internalrl.domains.grid.layouts import GridConfig
from internalrl.errors import InternalRLError
from internalrl.run.files import write_errors, write_together


class TrajectoryConfig(PretrainedConfig):
    """Configuration of a `TrajectoryModel`.

    Args:
        encoder: "one-hot" (the paper's) or "planner" (learned shortest paths).
        environment: the `GridConfig` that the observations come from, as a dict.
        encoder_options: further keyword arguments of the encoder, such as `hidden`.
        actions: number of discrete actions.
        backbone: configuration of any Hugging Face decoder as a dict with its `model_type`.
        relative_buckets: buckets of the learned relative position bias that replaces the backbone's own
            positions (paper: 32); 0 keeps the backbone's.
        relative_distance: distance from which all steps share the last bucket.
    """

    model_type = "internalrl-trajectory"

    def __init__(
        self,
        encoder: str = "planner",
        environment: dict[str, Any] | None = None,
        encoder_options: dict[str, Any] | None = None,
        actions: int = 4,
        backbone: dict[str, Any] | None = None,
        relative_buckets: int = 32,
        relative_distance: int = 64,
        **kwargs: Any,
    ):
        self.encoder = encoder
        self.environment = dict(environment or {})
        self.encoder_options = dict(encoder_options or {})
        self.actions = actions
        self.backbone = dict(backbone or llama_backbone())
        self.relative_buckets = relative_buckets
        self.relative_distance = relative_distance
        super().__init__(**kwargs)

    @property
    def grid(self) -> GridConfig:
        """The grid world that the observations come from."""
        return GridConfig(**self.environment)

    @property
    def hidden_size(self) -> int:
        return self.backbone["hidden_size"]

    @property
    def num_hidden_layers(self) -> int:
        return self.backbone["num_hidden_layers"]


def llama_backbone(layers: int = 4, width: int = 128, heads: int = 4, mlp: int = 192) -> dict[str, Any]:
    """A Llama-style backbone configuration without a vocabulary of its own."""
    return {
        "model_type": "llama",
        "vocab_size": 1,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "hidden_act": "silu",
    }


@dataclass
class TrajectoryOutput(ModelOutput):
    """Action logits (B, T, actions), logits of the next observation's class (B, T, targets), the cache."""

    logits: Tensor | None = None
    next_observation_logits: Tensor | None = None
    cache: TrajectoryCache | None = None  # `past_key_values` is a name of transformers' own since 5.24


class TrajectoryModel(PreTrainedModel):
    """p(a_t, o_{t+1} | o_1:t). Inputs are observations only: actions are seen through their effect (C.1)."""

    config_class = TrajectoryConfig
    main_input_name = "observations"
    _supports_sdpa = True

    def __init__(self, config: TrajectoryConfig):
        super().__init__(config)
        width = config.hidden_size
        self.encoder = ENCODERS[config.encoder](config.grid, width, **config.encoder_options)
        options = dict(config.backbone)
        self.backbone = AutoModel.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
        self.action_head = nn.Linear(width, config.actions)
        self.observation_head = nn.Linear(width, self.encoder.target_size)
        if config.relative_buckets:
            self.relative_bias = nn.Embedding(config.relative_buckets, options["num_attention_heads"])
            nn.init.zeros_(self.relative_bias.weight)
        self.post_init()
        for name, parameter in self.backbone.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)  # every block starts as the identity

    def _init_weights(self, module: nn.Module) -> None:
        """Submodules initialise themselves; nothing is initialised twice."""

    def forward(
        self,
        observations: Tensor | None = None,
        cache: TrajectoryCache | None = None,
        use_cache: bool = False,
        segments: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> TrajectoryOutput:
        """Predict actions and next observations.

        Args:
            observations: (B, T, observation_size); after padding on the right the padded steps are ignored by
                the causal mask and must be dropped from the loss.
            cache: from a former call or `empty_cache`; the T steps continue it, and are added to it.
            use_cache: return a cache to continue from.
            segments: (B, past + T) segment number of every step so far. Steps then see nothing before their
                own segment (used by consolidation); None lets them see the whole past.
            inputs_embeds: (B, T, n_e) in place of observations, as in every Hugging Face model. Observations cannot
                follow them in the cache.

        Raises:
            InternalRLError: the cache is not as a whole pass left it, lacks what the encoder must remember, has other
                rows, or the backbone does not fill it; `segments` do not number every step.
        """
        if cache is None and use_cache:
            cache = self.empty_cache()
        past = 0 if cache is None else cache.whole_steps()
        _require_segments(segments, observations if inputs_embeds is None else inputs_embeds, past)
        state = None
        if inputs_embeds is None:
            state = None if cache is None else cache.encoder_state()
            inputs_embeds, state = self.encoder(observations, state, _segment_starts(segments, past))
        length = inputs_embeds.shape[1]
        hidden = self.backbone(
            inputs_embeds=inputs_embeds,
            use_cache=cache is not None,
            **({} if cache is None else cache_input(self.backbone, cache)),
            **self._positions(length, past, segments, inputs_embeds),
        ).last_hidden_state
        if cache is not None:
            require_filled(cache, past + length, self.backbone)
            cache.length, cache.encoder = past + length, state
        return TrajectoryOutput(self.action_head(hidden), self.observation_head(hidden), cache)

    def empty_cache(self) -> TrajectoryCache:
        """A cache to begin with; `forward` fills it."""
        return TrajectoryCache(self.config.num_hidden_layers)

    def _positions(self, length: int, past: int, segments: Tensor | None, like: Tensor) -> dict[str, Tensor]:
        if not self.config.relative_buckets:
            if segments is not None:
                raise ValueError(
                    "segments need a backbone with relative_buckets > 0, so that attention is masked here."
                )
            return {}
        query = torch.arange(past, past + length, device=like.device)[:, None]
        distance = query - torch.arange(past + length, device=like.device)
        bucket = relative_bucket(distance.clamp(min=0), self.config.relative_buckets, self.config.relative_distance)
        bias = self.relative_bias(bucket).permute(2, 0, 1)[None]  # (1, heads, T, past + T)
        hidden = (distance < 0)[None, None]
        if segments is not None:
            hidden = hidden | (segments[:, past:, None] != segments[:, None, :])[:, None]
        # position 0 everywhere makes rotary embeddings the identity: the bias is the only notion of time
        zeros = torch.zeros(1, length, dtype=torch.long, device=like.device)
        return {
            "attention_mask": bias.masked_fill(hidden, torch.finfo(bias.dtype).min),
            "position_ids": zeros,
        }


def _require_segments(segments: Tensor | None, steps: Tensor | None, past: int) -> None:
    """InternalRLError unless `segments` number `past` steps and those in `steps` (B, T, …)."""
    if segments is None or steps is None:
        return
    expected = (len(steps), past + steps.shape[1])
    if segments.shape != expected:
        raise InternalRLError(
            f"segments have the shape {tuple(segments.shape)}, expected {expected}: give the number of every step's "
            "segment, those in the cache included."
        )


def _segment_starts(segments: Tensor | None, past: int) -> Tensor | None:
    """(B, T) bool: the steps after `past` that begin a segment."""
    if segments is None:
        return None
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return starts[:, past:]


def relative_bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each causal distance: half exact, half logarithmic up to `max_distance`, then shared."""
    exact = buckets // 2
    scale = (buckets - exact) / math.log(max_distance / exact)
    far = exact + (torch.log(distance.clamp(min=exact).float() / exact) * scale).long()
    return torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


class TrajectoryCache(Cache):
    """Keys, values and encoder state of a batch of trajectories; `select` drops finished rows.

    Attributes:
        length: steps of the forward passes that came to their end.
        encoder: what the encoder remembers of them; None before the first.
    """

    layers: list[Any]  # PreallocatedLayer

    def __init__(self, layers: int):
        super().__init__(layers=[PreallocatedLayer() for _ in range(layers)])
        self.length = 0
        self.encoder: EncoderState | None = None

    def whole_steps(self) -> int:
        """`length`, or InternalRLError while a pass that was stopped half-way has left steps in some blocks."""
        held = {layer.get_seq_length() for layer in self.layers}
        if held != {self.length}:
            raise InternalRLError(
                f"The cache holds {self.length} whole steps, but some block holds {max(held)}: a forward pass was "
                "stopped half-way; call rewind before the next one."
            )
        return self.length

    def encoder_state(self) -> EncoderState | None:
        """`encoder`, or InternalRLError when there are steps of which the encoder knows nothing."""
        if self.length and self.encoder is None:
            raise InternalRLError(
                f"The cache holds {self.length} steps, but not what the encoder must remember of them, as after steps "
                "that were given as embeddings; begin with an empty cache, or go on with embeddings."
            )
        return self.encoder

    def rewind(self) -> None:
        """Forget what a forward pass that was stopped half-way has left in the blocks it reached."""
        for layer in self.layers:
            layer.rewind(self.length)

    def drop(self, length: int) -> None:
        """Forget the first `length` steps: no later step may look back to them, whose segments are over."""
        for layer in self.layers:
            layer.drop(length)
        self.length -= length

    def select(self, rows: Tensor) -> None:
        """Keep only `rows` (an index tensor) of the batch."""
        self.batch_select_indices(rows)
        if self.encoder is not None:
            self.encoder = self.encoder.select(rows)


def save_trajectory_model(model: PreTrainedModel, folder: str | Path) -> None:
    """Write `model` to `folder` as Hugging Face does, but whole or not at all.

    A full disk raises InternalRLError and leaves an older model there as it was.
    """
    folder, config = Path(folder), model.config
    config.architectures, config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    data = safetensors.torch.save(tensors, {"format": "pt"})
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_together({folder / "model.safetensors": data, folder / "config.json": config.to_json_string().encode()})


def load_trajectory_model(folder: str | Path) -> TrajectoryModel:
    """The model that `save_trajectory_model` wrote to `folder`; InternalRLError when it is not there whole."""
    try:
        # without a config.json, Hugging Face would take the folder for a name on its hub
        kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["model_type"]
        if kind != TrajectoryConfig.model_type:
            raise ValueError(f"it holds a {kind} model")
        loaded: Any = TrajectoryModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        model, report = loaded
        if missing := report["missing_keys"]:
            raise ValueError(f"{len(missing)} tensors are missing, such as {min(missing)}")
    except Exception as error:  # many kinds: Hugging Face's, JSON's, those of wrong sizes
        why = f"{type(error).__name__}, {str(error).splitlines()[0]}"
        raise InternalRLError(
            f"{folder} holds no whole TrajectoryModel ({why}); give the folder that `pretrain` saved."
        ) from error
    return model


AutoConfig.register(TrajectoryConfig.model_type, TrajectoryConfig)
AutoModel.register(TrajectoryConfig, TrajectoryModel)
