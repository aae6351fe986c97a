"""Rollouts, exact top-k selection by sorting (SPEC sections 1 and 3), and group-relative advantages (section 4)."""

import math
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from .statistics import read_mask


def select_tokens(
    metric: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ratio: float,
    side: str,
    scope: str = "rollout",
    rounding: str = "floor",
) -> Tensor:
    """Exactly k = max(1, floor(n ratio)) of the n eligible tokens of every scope, as a bool mask.

    metric is [B, T] (a rollout per row) or [N] (a rollout per segment of cu_seqlens; without it, one rollout).
    "global" is "batch" here: the reference is one process.
    """
    check_selection(ratio, side, scope, rounding)
    eligible = read_mask(mask, metric.shape)
    values = metric.detach().reshape(-1).tolist()
    if metric.dim() == 1 and cu_seqlens is None:
        rollouts = [range(len(values))]
    else:
        rollouts = rollouts_of(metric.shape, cu_seqlens)
    groups = [[i for i in rollout if eligible[i]] for rollout in rollouts]
    selected = torch.zeros(len(values), dtype=torch.bool)
    for positions in scopes_of(groups, scope):
        for i in pick(values, positions, quota(len(positions), ratio, rounding), side):
            selected[i] = True
    return selected.reshape(metric.shape).to(metric.device)


def pick(values: list[float], positions: list[int], k: int, side: str) -> list[int]:
    """The k positions with the lowest or highest values.

    NaN counts as the largest value of all, -0.0 equals 0.0, and ties go to the earlier position: Python's sort is
    stable and `positions` are in order.
    """

    def key(i: int) -> tuple[bool, float]:
        is_nan = math.isnan(values[i])
        value = 0.0 if is_nan else values[i]
        return (is_nan, value) if side == "low" else (not is_nan, -value)

    return sorted(positions, key=key)[:k]


def quota(n: int, ratio: float, rounding: str = "floor") -> int:
    """k of n tokens, from integers: floor(100 * .29) is 29 although 100 * .29 < 29 in floating point.

    floor is the default; the released code of fork tokens (arXiv 2506.01939) rounds up.
    """
    if n == 0:
        return 0
    exact = n * Fraction(str(ratio))
    return max(1, math.floor(exact) if rounding == "floor" else math.ceil(exact))


def scopes_of(groups: list[list[int]], scope: str) -> list[list[int]]:
    """The sets of positions within which tokens compete: each rollout, or all rollouts together in order."""
    return groups if scope == "rollout" else [[i for group in groups for i in group]]


def check_selection(ratio, side, scope, rounding) -> None:
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    one_of("side", side, ("low", "high"))
    one_of("scope", scope, ("rollout", "batch", "global"))
    one_of("rounding", rounding, ("floor", "ceil"))


def one_of(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def rollouts_of(shape: torch.Size, cu_seqlens: Tensor | None) -> list[range]:
    """The flat row indices of every rollout: the rows of [B, T], or the segments of [N] (SPEC section 1)."""
    if len(shape) == 2:
        if cu_seqlens is not None:
            raise ValueError(f"cu_seqlens belongs to packed [N] data, got it with data of shape {tuple(shape)}")
        return [range(b * shape[1], (b + 1) * shape[1]) for b in range(shape[0])]
    if len(shape) != 1:
        raise ValueError(f"per-token data must be [B, T] or [N], got shape {tuple(shape)}")
    if cu_seqlens is None:
        raise ValueError(f"packed data of shape {tuple(shape)} needs cu_seqlens")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens must be int32 or int64 [S + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != shape[0] or sorted(bounds) != bounds:
        raise ValueError(f"cu_seqlens must rise from 0 to {shape[0]}, got {bounds}")
    return [range(start, end) for start, end in pairwise(bounds)]


def group_advantages(rewards: Tensor, group_ids, normalize: str = "std") -> Tensor:
    """Group-relative advantages: A = (R - mu_g) / (sigma_g + 1e-6), sigma unbiased (GRPO, DeepSeekMath 2402.03300).

    normalize="none" leaves the division out (Dr.GRPO, arXiv 2503.20783). A group of one has no spread to compare
    with: A = R, exactly. A group of equal rewards has A = 0, exactly: the mean of equal numbers can miss them by a
    rounding error, which the division by sigma + 1e-6 would blow up to 0.1 in float32.

    `group_ids` is a tensor or a sequence of anything hashable.
    """
    one_of("normalize", normalize, ("std", "none"))
    ids = group_ids.tolist() if hasattr(group_ids, "tolist") else list(group_ids)
    if rewards.dim() != 1 or len(ids) != rewards.shape[0]:
        raise ValueError(f"rewards must be [S] with S group_ids, got {tuple(rewards.shape)} and {len(ids)} group_ids")
    rewards = rewards.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)
    advantages = rewards.clone()
    for group in dict.fromkeys(ids):
        members = [i for i in range(len(ids)) if ids[i] == group]
        if len(members) == 1:
            continue
        of_group = rewards[members]
        if of_group.eq(of_group[0]).all():
            advantages[members] = 0.0
            continue
        centred = of_group - of_group.mean()
        advantages[members] = centred / (of_group.std(unbiased=True) + 1e-6) if normalize == "std" else centred
    return advantages
