"""Advantages of rollouts from outcome rewards, estimator by estimator in Python floats; GRPO's are in selection.py.

Sources: RLOO (arXiv 2402.14740), OPO (2505.23585), REINFORCE++ (2501.03262), GDPO (2601.05242) as verl and TRL state
them, with sigma + 1e-6 for every division by a standard deviation.
"""

import math
from math import fsum

import torch
from torch import Tensor

from .selection import group_advantages, one_of

EPSILON = 1e-6


def estimated_advantages(rewards: Tensor, group_ids, estimator: str, lengths: Tensor | None = None) -> Tensor:
    """[S] advantages in float64. A group of one keeps its reward."""
    one_of("estimator", estimator, ("rloo", "opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"))
    values = rewards.double().tolist()
    if estimator == "reinforce_plus_plus":
        return torch.tensor(whitened(values, lengths), dtype=torch.float64)
    ids = group_ids.tolist() if hasattr(group_ids, "tolist") else list(group_ids)
    found = []
    for i, reward in enumerate(values):
        members = [j for j in range(len(ids)) if ids[j] == ids[i]]
        others = [j for j in members if j != i]
        if not others:
            baseline = 0.0
        elif estimator == "rloo":
            baseline = fsum(values[j] for j in others) / len(others)
        elif estimator == "opo":
            tokens = fsum(float(lengths[j]) for j in members)
            baseline = fsum(float(lengths[j]) * values[j] for j in members) / tokens if tokens else 0.0
        else:
            baseline = fsum(values[j] for j in members) / len(members)
        found.append(reward - baseline)
    if estimator == "reinforce_plus_plus_baseline":
        found = whitened(found, lengths)
    return torch.tensor(found, dtype=torch.float64)


def multi_reward_advantages(
    rewards: Tensor, group_ids, weights: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """GDPO: the rewards [S, K] normalised one by one in their groups, summed with weights, whitened over the batch."""
    factors = [1.0] * rewards.shape[1] if weights is None else weights.double().tolist()
    columns = [group_advantages(column.double(), group_ids).tolist() for column in rewards.unbind(1)]
    totals = [fsum(w * a for w, a in zip(factors, row, strict=True)) for row in zip(*columns, strict=True)]
    return torch.tensor(whitened(totals, lengths), dtype=torch.float64)


def whitened(values: list[float], lengths: Tensor | None) -> list[float]:
    """(v - mean) / (unbiased std + 1e-6) of a list in which each value is there once, or `lengths` times."""
    times = [1] * len(values) if lengths is None else [int(n) for n in lengths]
    repeated = [v for v, n in zip(values, times, strict=True) for _ in range(n)]
    if len(repeated) < 2:
        return [0.0] * len(values)
    mean = fsum(repeated) / len(repeated)
    deviation = math.sqrt(fsum((v - mean) ** 2 for v in repeated) / (len(repeated) - 1))
    return [(v - mean) / (deviation + EPSILON) for v in values]
