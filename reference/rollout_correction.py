"""Importance weights of tokens that another engine sampled, token by token and rollout by rollout in Python floats.

Sources: truncated importance sampling (Yao et al., 2025), masked importance sampling (Liu et al., 2025), IcePop
(arXiv 2510.18855), rejection by Schulman's k2 and k3 as verl's rollout_rs has it; the veto is slime's mis.py, the
metrics are verl's and TRL's.
"""

import math
from math import fsum

import torch
from torch import Tensor

from .selection import one_of, rollouts_of
from .statistics import read_mask


def rollout_correction(
    logprobs_trainer: Tensor,
    logprobs_rollout: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    level: str = "token",
    mode: str = "truncate",
    estimator: str = "k1",
    low: float | None = None,
    high: float | None = 2.0,
    veto: float | None = None,
    batch_normalize: bool = False,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(weights in float64, keep, metrics) of tokens with the ratio e^(trainer - rollout), for finite log-probs."""
    one_of("level", level, ("token", "sequence", "geometric", "max"))
    one_of("estimator", estimator, ("k1", "k2", "k3"))
    one_of("mode", mode, ("truncate", "mask", "icepop"))
    shape = logprobs_trainer.shape
    is_token = read_mask(mask, shape)
    trainer, rollout = logprobs_trainer.double().reshape(-1).tolist(), logprobs_rollout.double().reshape(-1).tolist()
    groups = [[i for i in rows if is_token[i]] for rows in rollouts_of(shape, cu_seqlens)]
    groups = [tokens for tokens in groups if tokens]

    raw, weights, keep = {}, [0.0] * len(trainer), [False] * len(trainer)
    estimates = {}  # of each token that decides, or of the first token of each rollout that does
    vetoed = 0
    for tokens in groups:
        x = {i: trainer[i] - rollout[i] for i in tokens}
        veto_it = veto is not None and any(math.exp(x[i]) < veto for i in tokens)
        vetoed += veto_it
        divergence = {i: kullback(x[i], estimator) for i in tokens}
        for i in tokens:
            exponent = {"sequence": fsum(x.values()), "geometric": fsum(x.values()) / len(x)}.get(level, x[i])
            raw[i] = math.exp(min(max(exponent, -20.0), 20.0))
            inside = (low is None or raw[i] >= low) and (high is None or raw[i] <= high)
            decides = {
                "token": divergence[i], "sequence": fsum(divergence.values()), "max": max(divergence.values()),
                "geometric": fsum(divergence.values()) / len(tokens),
            }[level]  # fmt: skip
            if estimator == "k1":
                decides = min(max(-exponent, -20.0), 20.0)
            else:
                inside = decides <= high
            if level == "token" or i == tokens[0]:
                estimates[i] = decides
            keep[i] = not veto_it and (inside or mode != "mask")
            if not keep[i]:
                weights[i] = 0.0
            elif inside:
                weights[i] = raw[i]
            elif mode == "icepop":
                weights[i] = 0.0
            else:
                weights[i] = low if low is not None and raw[i] < low else high

    metrics = measures(trainer, rollout, groups, raw, weights, keep, level, low, high)
    if estimator != "k1":
        metrics["fraction_high"], metrics["fraction_low"] = mean([e > high for e in estimates.values()]), 0.0
    metrics["estimate_mean"] = mean(list(estimates.values()))
    metrics["estimate_max"] = max(estimates.values(), default=0.0)
    metrics["vetoed"] = vetoed / len(groups) if groups else 0.0
    metrics["batch_norm_factor"] = 1.0
    if batch_normalize:
        if level in ("token", "max"):
            values = [weights[i] for tokens in groups for i in tokens if keep[i]]
        else:
            values = [next(weights[i] for i in tokens if keep[i]) for tokens in groups if any(keep[i] for i in tokens)]
        if mean(values) > 1e-8:
            metrics["batch_norm_factor"] = mean(values)
            weights = [w / mean(values) for w in weights]
    return torch.tensor(weights, dtype=torch.float64).reshape(shape), torch.tensor(keep).reshape(shape), metrics


def measures(trainer, rollout, groups, raw, weights, keep, level, low, high) -> dict[str, float]:
    """What verl and TRL log, of rollouts with a token; a unit is a token or, at the levels of a rollout, a rollout."""
    tokens = [i for group in groups for i in group]
    x = {i: trainer[i] - rollout[i] for i in tokens}
    near = {i: min(max(x[i], -20.0), 20.0) for i in tokens}
    sums = [min(max(fsum(x[i] for i in group), -20.0), 20.0) for group in groups]
    units = [raw[i] for i in tokens] if level in ("token", "max") else [raw[group[0]] for group in groups]
    used = [weights[i] for i in tokens]
    above = high if high is not None else 1 / low
    below = low if low is not None else 1 / high
    squares = fsum(w * w for w in used)
    return {
        "kept": mean([keep[i] for i in tokens]),
        "rollouts_kept": mean([all(keep[i] for i in group) for group in groups]),
        "eff_sample_size": fsum(used) ** 2 / (len(used) * squares) if squares else 0.0,
        "weight_mean": mean(used),
        "weight_std": deviation(used),
        "weight_max": max(used, default=0.0),
        "weight_min": min(used, default=0.0),
        "weight_rollout_mean": mean([mean([weights[i] for i in group]) for group in groups]),
        "ratio_mean": mean(units),
        "ratio_std": deviation(units),
        "ratio_max": max(units, default=0.0),
        "ratio_min": min(units, default=0.0),
        "fraction_high": mean([r > above for r in units]),
        "fraction_low": mean([r < below for r in units]),
        "kl": mean([-x[i] for i in tokens]),
        "k3_kl": mean([math.exp(near[i]) - 1 - x[i] for i in tokens]),
        "chi2_token": mean([math.exp(near[i]) ** 2 - 1 for i in tokens]),
        "chi2_seq": mean([math.exp(total) ** 2 - 1 for total in sums]),
        "logp_difference_mean": mean([abs(x[i]) for i in tokens]),
        "logp_difference_max": max((abs(x[i]) for i in tokens), default=0.0),
    }


def kullback(x: float, estimator: str) -> float:
    """k1, k2 or k3 of KL(rollout, trainer) at a token of log-ratio x, which k2 and k3 clamp to +-20."""
    near = min(max(x, -20.0), 20.0)
    return {"k1": -x, "k2": near * near / 2, "k3": math.exp(near) - 1 - near}[estimator]


def mean(values: list) -> float:
    return fsum(values) / len(values) if values else 0.0


def deviation(values: list) -> float:
    """The biased standard deviation."""
    return math.sqrt(mean([(v - mean(values)) ** 2 for v in values]))
