"""What steered generation did: its codes and segments, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerBase

from internalrl.controller.steering import Share, Steering


@dataclass
class Segment:
    """Generated tokens `start` to `stop` − 1 of a row, made under one `code` (n_z,); `text` with a tokenizer."""

    start: int
    stop: int
    code: Tensor
    text: str | None


@dataclass
class Trace:
    """Of B rows with N generated tokens each; a row ends with its first end-of-sequence token.

    switch: (B, N) bool, the token opens a segment; False in rows that were not steered and after a row's end.
    logit: (B, N), the switch's; the first decision is forced, whatever its logit.
    code: (B, N, n_z), in force as the token was generated; n_z is the largest of the adapters, codes of others
        have zeros at the end.
    mask: (B, N) bool, tokens before the row's end, that token included.
    segments: per row.
    """

    switch: Tensor
    logit: Tensor
    code: Tensor
    mask: Tensor
    segments: list[list[Segment]]

    def along(self, prompt: int) -> dict[str, Tensor]:
        """`code` and `where` that make `forward` on sequences[:, :-1] do what generation did.

        Args:
            prompt: P, the number of prompt tokens with their padding.
        """
        where = self.switch.cumsum(1) > 0
        return {"code": F.pad(self.code, (0, 0, prompt - 1, 0)), "where": F.pad(where, (prompt - 1, 0))}


def make_trace(
    tokens: Tensor,
    shares: Sequence[Share],
    steerings: Sequence[Steering],
    settings: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Trace:
    """The trace of generated `tokens` (B, N) from what `steerings`, one per share, remember."""
    rows, steps = tokens.shape
    mask = before_end(tokens, settings)
    n_z = max((share.adapter.metacontroller.config.n_z for share in shares), default=0)
    switch = torch.zeros(rows, steps, dtype=torch.bool, device=tokens.device)
    logit = torch.zeros(rows, steps, device=tokens.device)
    code = torch.zeros(rows, steps, n_z, device=tokens.device)
    for share, steering in zip(shares, steerings, strict=True):
        own = slice(None) if share.rows is None else share.rows
        switch[own] = torch.stack(steering.switch[:steps], 1).to(tokens.device)
        logit[own] = torch.stack(steering.logit[:steps], 1).to(tokens.device)
        made = torch.stack(steering.code[:steps], 1).to(tokens.device)
        code[own] = F.pad(made, (0, n_z - made.shape[-1]))
    switch &= mask
    segments: list[list[Segment]] = []
    for row, length in enumerate(mask.sum(1).tolist()):
        starts = switch[row].nonzero().squeeze(-1).tolist()
        segments.append([])
        for start, stop in pairwise([*starts, length]):
            text = None if tokenizer is None else str(tokenizer.decode(tokens[row, start:stop]))
            segments[-1].append(Segment(start, stop, code[row, start], text))
    return Trace(switch, logit, code, mask, segments)


def before_end(tokens: Tensor, settings: GenerationConfig) -> Tensor:
    """(B, N) bool: tokens up to a row's first end-of-sequence token, without padding that followed another end."""
    ends = settings.eos_token_id
    if ends is None:  # then transformers does not pad rows that have ended
        return torch.ones_like(tokens, dtype=torch.bool)
    ended = torch.isin(tokens, torch.tensor(ends, device=tokens.device))
    real = ended.cumsum(1) - ended.long() == 0
    if settings.pad_token_id is not None:
        padding = (tokens == settings.pad_token_id) & ~ended
        real &= ~padding.flip(1).long().cumprod(1).flip(1).bool()
    return real
