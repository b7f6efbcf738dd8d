"""`SteeredModel.generate`: transformers' own generation, with the tap open while it runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import GenerationMode

from internalrl.base.logits import logits_at
from internalrl.base.residual import Steer
from internalrl.controller.choosers import Choose, Drawn, Given, Propose, RowNoise, asking, row_seeds
from internalrl.controller.steering import Share
from internalrl.controller.trace import make_trace
from internalrl.errors import InternalRLError

if TYPE_CHECKING:
    from internalrl.controller.steered import SteeredModel

Source = Literal["policy", "prior", "off"] | Propose


@torch.no_grad()
def generate(
    self: SteeredModel,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    steering: Source | None = None,
    codes: Tensor | None = None,
    code_temperature: float = 1.0,
    adapter_names: Sequence[str | None] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    return_trace: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
    **options: Any,
) -> Any:
    """Generate as the base does, steered.

    The prompt but its last token enters the history and is not steered; at the last token a first segment begins, so
    that it begins with the first generated token. Whatever transformers' `generate` takes works: sampling options,
    processors, stopping criteria, streamers, static caches. What has no single sequence per row that grows by a token
    at a time (beam search, assisted decoding) is refused.

    Args:
        input_ids: (B, P) prompts, padded on the left.
        attention_mask: (B, P), 0 at padding; by default the tokenizer's pad token tells, as in transformers.
        steering: who chooses the codes: the policy, the prior N(0, I), a function of the rows that switch and what
            they read, or nobody ("off"). By default the policy where an adapter has one, else the prior.
        codes: chosen beforehand instead: (n_z,), (B, n_z), or one per segment (B, S, n_z), of which the last stays.
        code_temperature: factor on the standard deviation of policy or prior; 0 takes the mean.
        adapter_names: the adapter of each row, None for the bare base; by default the active one is everyone's.
        generator: for the codes: one per row, which makes a row's codes independent of the batch, or one for all.
            Tokens are sampled by transformers, with torch's global generator.
        return_trace: return `(output, Trace)`, which tells codes and segments.
        tokenizer: makes the trace's segments text; goes on to transformers as well.
        generation_config, options: transformers' own. `num_return_sequences` works with greedy tokens too.

    Raises:
        InternalRLError: for prompts, options, codes or adapters that do not fit, in one sentence.
    """
    base = self.base
    if not base.can_generate():
        raise InternalRLError(f"{type(base).__name__} does not generate tokens; give a causal language model.")
    asked = options.pop("num_return_sequences", None)  # transformers refuses greedy ones, which differ in their codes
    settings, inputs = settings_of(base, generation_config, options)
    _refuse_options(settings, inputs)
    input_ids, mask = _prompts(base, input_ids, attention_mask, settings)
    batch, copies = len(input_ids), asked or settings.num_return_sequences or 1
    codes, settings.num_return_sequences = per_segment(codes, batch), 1
    if copies > 1:
        input_ids, mask, codes = (_repeat(value, batch, copies) for value in (input_ids, mask, codes))
        inputs = {name: _repeat(value, batch, copies) for name, value in inputs.items()}
        adapter_names = adapter_names and [name for name in adapter_names for _ in range(copies)]
    settings.disable_compile = True  # torch.compile does not see the tap

    shares = [] if steering == "off" else self.shares(len(input_ids), adapter_names)
    seeds = row_seeds(generator, batch, copies) if shares and codes is None else []
    padded = None if mask.all() else mask
    steerings = [
        share.deciding(
            chooser(share, steering, codes, code_temperature, seeds), len(input_ids), input_ids.shape[1] - 1, padded
        )
        for share in shares
    ]
    # In float32, unsteered text is the base's own to the last bit, which costs 0.01 s a row where prompts end.
    last = {} if base.dtype == torch.float32 else logits_at(base)
    with self.open_taps(*(share.at_tap(steer) for share, steer in zip(shares, steerings, strict=True))):
        output = base.generate(
            input_ids=input_ids,
            attention_mask=mask.long(),
            generation_config=settings,
            **({} if tokenizer is None else {"tokenizer": tokenizer}),
            **{**last, **inputs},
        )
    if not return_trace:
        return output
    tokens = (output if isinstance(output, Tensor) else output.sequences)[:, input_ids.shape[1] :]
    return output, make_trace(tokens, shares, steerings, settings, tokenizer)


def deciding(shares: Sequence[Share], batch: int, inputs: dict[str, Any]) -> list[Steer]:
    """Steers for one forward pass over whole sequences: every step is decided, as if none were a prompt.

    Args:
        inputs: of the base; a 2D attention_mask tells which steps are padded.
    """
    mask = inputs.get("attention_mask")
    if _holds_tokens(inputs):
        raise InternalRLError(
            "forward was given a cache, but not what the metacontroller knew when it was filled; use generate, or "
            "give the codes."
        )
    mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    seeds = row_seeds(None, batch)
    return [share.deciding(chooser(share, None, None, 1.0, seeds), batch, mask=mask) for share in shares]


def settings_of(
    base: PreTrainedModel, generation_config: GenerationConfig | None, options: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """The options in force, by the order of precedence of transformers, and those that are none of its settings."""
    settings = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
    settings.update(**base.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    return settings, settings.update(**options)


def _refuse_options(settings: GenerationConfig, inputs: dict[str, Any]) -> None:
    """InternalRLError for options under which the tap would not see every row's tokens once and in order."""
    mode = settings.get_generation_mode(inputs.get("assistant_model"))
    refused = {
        mode.value.replace("_", " "): mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
        "custom_generate": inputs.get("custom_generate") is not None,
        "use_cache=False": settings.use_cache is False,
        "a paged cache": settings.cache_implementation == "paged",
        "a cache that is not empty": _holds_tokens(inputs),
        "inputs_embeds": inputs.get("inputs_embeds") is not None,
        "guidance_scale": settings.guidance_scale not in (None, 1),
        "token_healing": bool(settings.token_healing),
    }
    for what, asked in refused.items():
        if asked:
            raise InternalRLError(
                f"Steered generation does not work with {what}: every row must grow from its prompt by one token per "
                "forward pass; use greedy search or sampling, without it."
            )


def given_cache(inputs: dict[str, Any]) -> Any:
    """The cache in `inputs`, by whichever of its names in transformers; None where there is none."""
    names = ("cache", "past_key_values", "cache_params")
    return next((inputs[name] for name in names if inputs.get(name) is not None), None)


def _holds_tokens(inputs: dict[str, Any]) -> bool:
    """Whether there is a cache in `inputs`, and something in it."""
    cache: Any = given_cache(inputs)
    try:
        return cache is not None and bool(cache.get_seq_length() > 0)
    except ValueError:  # it has no attention layer
        return bool(cache.has_previous_state())
    except AttributeError:  # it cannot tell
        return True


def _prompts(
    base: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, settings: GenerationConfig
) -> tuple[Tensor, Tensor]:
    """Tokens (B, P) and their mask (B, P) bool on the base's device, or InternalRLError."""
    if input_ids.ndim != 2 or not input_ids.numel() or input_ids.is_floating_point():
        raise InternalRLError(f"input_ids have the shape {tuple(input_ids.shape)}; give token numbers (rows, tokens).")
    input_ids, config = input_ids.to(base.device), base.config.get_text_config()
    if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < config.vocab_size:
        raise InternalRLError(
            f"input_ids hold tokens from {int(input_ids.min())} to {int(input_ids.max())}, but the base's vocabulary "
            f"has {config.vocab_size}; use the tokenizer that belongs to the base."
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and input_ids.shape[1] > context:
        raise InternalRLError(
            f"The prompts are {input_ids.shape[1]} tokens long, but the base's context is {context}; shorten them."
        )
    if attention_mask is None:  # as transformers infers it
        pad, ends = settings.pad_token_id, settings.eos_token_id
        known = pad is not None and pad not in (ends if isinstance(ends, list) else [ends])
        mask = input_ids != pad if known else torch.ones_like(input_ids, dtype=torch.bool)
    elif attention_mask.shape == input_ids.shape:
        mask = attention_mask.to(base.device).bool()
    else:
        shapes = tuple(attention_mask.shape), tuple(input_ids.shape)
        raise InternalRLError(f"attention_mask has the shape {shapes[0]}, expected that of input_ids, {shapes[1]}.")
    if not mask[:, -1].all():
        raise InternalRLError(
            "Some prompts are padded on the right, or empty: generation would go on after the padding; use a "
            "tokenizer with padding_side='left'."
        )
    if not mask.all() and not heeds_padding(base):
        raise InternalRLError(
            f"{type(base).__name__} reads padding as if it were text, so that a padded prompt would be continued "
            "otherwise than alone; generate prompts of equal length together."
        )
    return input_ids, mask


_heeding: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def heeds_padding(base: PreTrainedModel) -> bool:
    """Whether a padded prompt is continued as if alone; some recurrent models take padding for text."""
    if base not in _heeding:
        generate: Any = base.generate
        settings = GenerationConfig(max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
        alone = torch.tensor([[1, 0]], device=base.device)
        padded, mask = F.pad(alone, (3, 0), value=1), F.pad(torch.ones_like(alone), (3, 0))
        logits = generate(alone, attention_mask=torch.ones_like(alone), generation_config=settings).logits[0]
        again = generate(padded, attention_mask=mask, generation_config=settings).logits[0]
        _heeding[base] = bool((logits - again).abs().max() < 0.05 * logits.std())
    return _heeding[base]


def per_segment(codes: Tensor | None, batch: int) -> Tensor | None:
    """Codes as one per row and segment, (B, S, n_z)."""
    if codes is None:
        return None
    if codes.ndim == 1:
        codes = codes.expand(batch, -1)
    codes = codes[:, None] if codes.ndim == 2 else codes
    if codes.ndim != 3 or len(codes) != batch or not codes.shape[1] or not codes.isfinite().all():
        raise InternalRLError(
            f"codes have the shape {tuple(codes.shape)} for {batch} prompts; give finite numbers of the shape (n_z,), "
            "(prompts, n_z) or (prompts, segments, n_z)."
        )
    return codes


def _repeat(value: Any, batch: int, copies: int) -> Any:
    """What has an entry per row of the batch, each of them `copies` times; anything else as it is."""
    per_row = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
    return value.repeat_interleave(copies, 0) if per_row else value


def chooser(
    share: Share, steering: Source | None, codes: Tensor | None, temperature: float, seeds: Sequence[int]
) -> Choose:
    """Who chooses the codes of a share; `codes` and `seeds` have an entry per row of the whole batch."""
    adapter, rows = share.adapter, share.rows
    n_z, like = adapter.metacontroller.config.n_z, adapter.metacontroller.down
    if codes is not None:
        if codes.shape[-1] != n_z:
            raise InternalRLError(f"codes have {codes.shape[-1]} numbers each, but the adapter's have n_z = {n_z}.")
        return Given(share.of(codes).to(like))
    if callable(steering):
        propose = steering
        return asking(propose if rows is None else lambda switched, x: propose(rows[switched], x))
    if steering not in (None, "policy", "prior"):
        raise InternalRLError(f"steering is {steering!r}; give 'policy', 'prior', 'off' or a function.")
    if steering == "policy" and adapter.policy is None:
        raise InternalRLError("The adapter has no policy yet; use steering='prior', or train one by internal RL.")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InternalRLError(f"code_temperature is {temperature}; give a number of 0 or more.")
    own = seeds if rows is None else [seeds[row] for row in rows.tolist()]
    return Drawn(RowNoise(own, n_z, like), temperature, None if steering == "prior" else adapter.policy)
