"""How likely whole completions are, where tokens are sampled at a temperature."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import PreTrainedModel

from internalrl.base.text_data import Examples


@torch.no_grad()
def completion_log_probs(
    model: PreTrainedModel, examples: Examples, temperatures: Sequence[float], size: int = 128
) -> NDArray[np.float64]:
    """(N, M): log-probability in nats of each completion, its end included, at each of M temperatures above 0."""
    order = np.argsort(examples.lengths, kind="stable")  # short with short
    found = np.zeros((len(examples), len(temperatures)))
    for begin in range(0, len(order), size):
        rows = order[begin : begin + size]
        batch = examples.batch(rows)
        logits = model(input_ids=batch.tokens, use_cache=False).logits[:, :-1].transpose(1, 2).double()
        for column, temperature in enumerate(temperatures):
            nll = F.cross_entropy(logits / temperature, batch.tokens[:, 1:], reduction="none")
            found[rows, column] = -(nll * batch.mask[:, 1:]).sum(1).numpy()
    return found
