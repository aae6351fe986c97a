"""Reads the N-sized arguments of a loss, and finds what the loss of a token is divided by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.segments import segment_of, segment_sum


def read_tokens(
    targets: Tensor | None, mask: Tensor | None, offsets: Tensor, advantages: Tensor, polarity: Tensor | None,
    importance: Tensor | None, per_rollout: tuple[bool, bool, bool], polarity_weights: tuple[float, float, float],
    ignore_index: int, out: tuple[Tensor | None, ...],
) -> None:  # fmt: skip
    """Fills `out`: targets, tokens, rollout, advantages, polarity, importance, weights [N] and counts [S]."""
    targets_out, tokens, rollout, advantages_out, polarity_out, importance_out, weights, counts = out
    assert tokens is not None and rollout is not None and weights is not None and counts is not None
    if counts.numel() == 0:
        return
    rows = torch.arange(tokens.numel(), device=tokens.device)
    found = segment_of(offsets, rows)
    rollout.copy_(found.clamp(0, counts.numel() - 1))
    tokens.copy_((found >= 0) & (found < counts.numel()))
    if mask is not None:
        tokens &= mask != 0
    if targets is not None and targets_out is not None:
        targets_out.copy_(torch.where(tokens, targets.long(), ignore_index))
        tokens &= targets_out != ignore_index
    given = ((advantages, advantages_out), (polarity, polarity_out), (importance, importance_out))
    for (values, into), shared in zip(given, per_rollout, strict=True):
        if values is not None and into is not None:
            into.copy_(torch.where(tokens, values[rollout] if shared else values, 0))
    sign = advantages_out if polarity_out is None else polarity_out
    assert sign is not None
    positive, negative, neutral = polarity_weights
    weights.fill_(neutral).masked_fill_(sign > 0, positive).masked_fill_(sign < 0, negative)
    weights.masked_fill_(~tokens, 0.0)
    counts.copy_(segment_sum(tokens.to(counts.dtype), offsets))


def count_kept(weights: Tensor, offsets: Tensor) -> Tensor:
    """[S]: tokens of each rollout whose weight is not 0."""
    return segment_sum((weights != 0).to(weights.dtype), offsets)


def normalizer(counts: Tensor, total: str, per_rollout: bool, divisor: float | Tensor, max_length: float) -> Tensor:
    """[S]: see ops.tokens.normalizer."""
    if total == "given":
        whole = divisor.to(counts.dtype) if isinstance(divisor, Tensor) else counts.new_full((), divisor)
    elif total == "lengths":
        whole = torch.full((), counts.numel() * max_length, dtype=counts.dtype, device=counts.device)
    else:
        whole = counts.sum() if total == "tokens" else (counts > 0).sum().to(counts.dtype)
    # 1 / inf would be a quiet 0, and so would a divisor below 0.
    scale = torch.where((whole > 0) & (whole < math.inf), 1.0 / whole, torch.where(whole == 0, 0.0, math.nan))
    scale = scale.expand(counts.numel())
    return torch.where(counts > 0, scale / counts, 0.0) if per_rollout else scale.contiguous()
