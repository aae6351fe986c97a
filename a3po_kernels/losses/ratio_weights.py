"""Factors of the surrogate that read the log ratio: constants for the gradient, as importance weights are."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..objectives import Objective, OffPolicyMask, Topr, Vespo
from .batch import TokenBatch

_LOWEST = math.log(1e-8)


def reads_rollout(objective: Objective) -> bool:
    """Whether a factor depends on other tokens of the rollout."""
    return any(not isinstance(w, Topr) or w.level != "token" for w in objective.ratio_weights)


def importance_of(objective: Objective, batch: TokenBatch, logprobs: Tensor) -> Tensor | None:
    """[N]: the importance weights, times the objective's ratio weights at these log-probs."""
    importance = batch.importance
    if not objective.ratio_weights:
        return importance
    tokens, rollout = batch.tokens, batch.rollout.long()

    def total(values: Tensor) -> Tensor:
        return batch.sums(values)[rollout]

    def mean(values: Tensor) -> Tensor:
        return total(values) / batch.counts.clamp(min=1.0)[rollout]

    logp = torch.where(tokens, logprobs.detach(), 0.0)
    gap = torch.zeros_like(logp) if batch.old is None else logp - torch.where(tokens, batch.old, 0.0)
    if any(isinstance(weight, Vespo) for weight in objective.ratio_weights):
        importance = None  # it is in the ratio instead
    for weight in objective.ratio_weights:
        if isinstance(weight, OffPolicyMask):
            factor = torch.where((batch.advantages < 0) & (mean(-gap) > weight.threshold), 0.0, 1.0).to(gap.dtype)
        elif isinstance(weight, Topr):
            level = {"sequence": total, "geometric": mean, "token": lambda x: x}[weight.level]
            ratio = level(gap).clamp(-20.0, 20.0).exp().clamp(weight.low, weight.high)
            factor = torch.where(batch.advantages < 0, ratio, torch.ones_like(ratio))
        else:
            factor = _vespo(weight, batch, total(gap.clamp(-20.0, 20.0)), total if batch.importance_each else mean)
        importance = factor if importance is None else importance * factor
    return importance


def _vespo(weight: Vespo, batch: TokenBatch, log_ratio: Tensor, join: Callable[[Tensor], Tensor]) -> Tensor:
    """VESPO's factor; the importance weights are in its ratio, as join makes one of a rollout's."""
    if batch.importance is not None:
        log_ratio = log_ratio + join(batch.importance.log().clamp(_LOWEST, 20.0))
    log_w = log_ratio.clamp(_LOWEST, 20.0)
    up = batch.advantages >= 0
    k = torch.where(up, weight.k_positive, weight.k_negative).to(log_w.dtype)
    rate = torch.where(up, weight.lambda_positive, weight.lambda_negative).to(log_w.dtype)
    factor = (rate + k * log_w - rate * log_w.exp()).exp()
    # Not a NaN of the log ratio's: that stays one.
    return torch.where(factor.isinf(), 0.0, factor)
