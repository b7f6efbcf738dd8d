"""Logits where they are needed: behind the last token alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


def logits_at(base: PreTrainedModel, positions: Sequence[int] = (-1,)) -> dict[str, Tensor]:
    """What tells the forward pass of `base` to compute logits at these positions alone; {} where it cannot be told.

    The positions are a tensor, as the base then copies what its head reads. Told by a number it cuts a slice, and for a
    slice of several rows torch reads the whole head once per row. In bfloat16 it copies it, too: 58 GB for 1,024 rows
    of a small model.
    """
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return {}
    return {"logits_to_keep": torch.tensor(positions, dtype=torch.long, device=base.device)}
