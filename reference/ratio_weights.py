"""Constant factors of the surrogate that are made of the log ratios (SPEC section 3)."""

import math

import torch
from torch import Tensor

from .batch import Batch
from .objectives import Objective, OffPolicyMask, Topr, Vespo

FLOOR = math.log(1e-8)


def reads_importance_weights(objective: Objective) -> bool:
    """VESPO takes the importance weights into the rollout's ratio; they are not multiplied onto its loss again."""
    return any(isinstance(weight, Vespo) for weight in objective.ratio_weights)


def ratio_factors(objective: Objective, batch: Batch, log_ratio: Tensor) -> Tensor:
    """The product of the ratio weights of every token, as [N]; 1 at rows that are no tokens. No gradient."""
    log_ratio = log_ratio.detach()
    result = torch.ones_like(log_ratio)
    for weight in objective.ratio_weights:
        factor_of = {OffPolicyMask: off_policy_mask, Vespo: vespo, Topr: topr}[type(weight)]
        for rows in batch.tokens:  # all tokens of the rollout, those that shaping drops too
            if rows:
                factor = factor_of(weight, batch.advantages[rows], log_ratio[rows], batch, rows)
                result[rows] = result[rows] * factor
    return result


def off_policy_mask(weight: OffPolicyMask, advantages: Tensor, d: Tensor, batch: Batch, rows: list[int]) -> Tensor:
    """DeepSeek-V3.2 (arXiv 2512.02556), eq. 9: 0 where A < 0 and mean(l_old - l) > threshold."""
    far = (-d).mean() > weight.threshold
    return torch.where((advantages < 0) & far, 0.0, 1.0).to(d.dtype)


def vespo(weight: Vespo, advantages: Tensor, d: Tensor, batch: Batch, rows: list[int]) -> Tensor:
    """VESPO (arXiv 2602.10693), as its authors and TRL release it; A = 0 takes the positive constants.

    They turn a NaN into 0; here it stays one, as everywhere.
    """
    total = d.clamp(-20.0, 20.0).sum()
    if batch.importance_weights is not None:
        logs = batch.importance_weights[rows].log().clamp(FLOOR, 20.0)
        total = total + (logs[0] if batch.weighs_rollouts else logs.sum())  # a weight of the rollout counts once
    log_w = total.clamp(FLOOR, 20.0)
    positive = advantages >= 0
    k = torch.where(positive, weight.k_positive, weight.k_negative).to(d.dtype)
    lam = torch.where(positive, weight.lambda_positive, weight.lambda_negative).to(d.dtype)
    factor = (lam + k * log_w - lam * log_w.exp()).exp()
    return torch.where(factor.isinf(), 0.0, factor)


def topr(weight: Topr, advantages: Tensor, d: Tensor, batch: Batch, rows: list[int]) -> Tensor:
    """TOPR (arXiv 2503.14286), eq. 8: rollouts of positive advantage as they are, the others weighed down."""
    x = {"sequence": d.sum(), "geometric": d.mean(), "token": d}[weight.level]
    tapered = x.clamp(-20.0, 20.0).exp().clamp(weight.low, weight.high)
    return torch.where(advantages >= 0, torch.ones_like(d), tapered)
