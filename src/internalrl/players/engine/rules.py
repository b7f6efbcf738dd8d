"""What a base's own generation_config asks for: obeyed as `generate` does, or refused by its name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from internalrl.controller.generate import settings_of
from internalrl.errors import InternalRLError
from internalrl.players.engine.requests import Request

Rule = Callable[[Tensor, Tensor], Tensor]
"""Changed logits (1, V), from the tokens (1, T) so far and logits (1, V)."""

REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "guidance_scale": (None, 1),
    "penalty_alpha": (None, 0),
    "remove_invalid_values": (None, False),
    "stop_strings": (None,),
    "max_time": (None,),
    "token_healing": (None, False),
}
"""Settings that are not obeyed, and the values that ask for nothing."""
REFUSED_WHERE_SAMPLED: dict[str, tuple[Any, ...]] = {
    "top_h": (None,),
    "min_p": (None,),
    "typical_p": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
}
"""Those that matter with `do_sample` alone."""


class Rules:
    """Of one base: penalties, suppressed tokens and the like, and how it samples where a request leaves that open.

    Raises:
        InternalRLError: the base asks for what is not done here.
    """

    def __init__(self, base: PreTrainedModel):
        self._base = cast(Any, base)
        self._settings = cast(Any, settings_of(base, None, {})[0])
        settings, sampled = self._settings, bool(self._settings.do_sample)
        refused = {**REFUSED, **(REFUSED_WHERE_SAMPLED if sampled else {})}
        for name, right in refused.items():
            if (value := getattr(settings, name, None)) not in right:
                raise InternalRLError(
                    f"The base's generation_config has {name} = {value!r}, which the engine does not do; remove it."
                )
        self._left: dict[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        for name in self._left if sampled else ():
            if (value := getattr(settings, name)) is not None:
                self._left[name] = value
        settings.do_sample = False  # what is left are rules, not the ways of sampling
        self._base._prepare_special_tokens(settings, True, base.device)
        self._any = self._of((0,), 1) is not None

    def complete(self, request: Request) -> Request:
        """`request` with all that it left to the base."""
        left: dict[str, Any] = {name: value for name, value in self._left.items() if getattr(request, name) is None}
        return replace(request, **left)

    def rule(self, prompt: tuple[int, ...], most: int) -> Rule | None:
        """What changes the logits of an answer of at most so many tokens; None leaves them as they are."""
        return self._of(prompt, most) if self._any else None

    def _of(self, prompt: tuple[int, ...], most: int) -> Rule | None:
        settings = copy.copy(self._settings)
        settings.max_length = len(prompt) + most
        tokens = torch.tensor([prompt], device=self._base.device)
        found: Any = self._base._get_logits_processor(
            settings, len(prompt), encoder_input_ids=tokens, device=self._base.device, model_kwargs={}
        )
        return found or None
