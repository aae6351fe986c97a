"""Group-relative advantages."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_ids: Tensor, normalize: str = "std") -> Tensor:
    """Group-relative advantages A = (R - mean) / (std + 1e-6), with the unbiased std of the group (DeepSeekMath).

    Args:
        rewards: [S], floating point.
        group_ids: [S], integers in any order; rollouts of one prompt share an id.
        normalize: "std", or "none" for A = R - mean (Dr. GRPO).

    Returns:
        [S] advantages. A group of one keeps its reward, A = R.

    Raises:
        ValueError, TypeError: mismatched shapes, dtypes, or an unknown `normalize`.
    """
    if not isinstance(rewards, Tensor) or not rewards.dtype.is_floating_point:
        raise TypeError(f"rewards must be a floating-point tensor; got {getattr(rewards, 'dtype', type(rewards))}")
    if not isinstance(group_ids, Tensor) or group_ids.dtype.is_floating_point:
        raise TypeError(f"group_ids must be an integer tensor; got {getattr(group_ids, 'dtype', type(group_ids))}")
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards and group_ids must share a shape [S]; got {list(rewards.shape)} and {list(group_ids.shape)}"
        )
    if normalize not in ("std", "none"):
        raise ValueError(f"normalize must be 'std' or 'none'; got {normalize!r}")
    if not len(rewards):
        return rewards.clone()
    # Sorted by group, each group is a segment; no host sync, no float atomics.
    order = torch.sort(group_ids, stable=True).indices
    values, ids = rewards.detach()[order].double(), group_ids[order]
    new = torch.cat([torch.zeros_like(ids[:1]), (ids[1:] != ids[:-1]).to(ids.dtype)])
    group = new.long().cumsum(0)
    sizes = torch.zeros_like(group).scatter_add_(0, group, torch.ones_like(group))
    offsets = torch.cat([torch.zeros_like(sizes[:1]), sizes.cumsum(0)])

    def over_groups(data: Tensor, reduction: str) -> Tensor:
        return torch.segment_reduce(data, reduction, offsets=offsets, unsafe=True, initial=None)[group]

    size = sizes[group].double()
    # Relative to the group's minimum, so that equal rewards give exactly zero.
    lowest = over_groups(values, "min")
    centred = values - lowest
    centred = centred - over_groups(centred, "sum") / size
    if normalize == "std":
        spread = over_groups(centred.square(), "sum") / (size - 1).clamp(min=1.0)
        centred = centred / (spread.sqrt() + 1e-6)
    advantages = torch.where(size > 1, centred, values)
    return torch.empty_like(rewards).scatter_(0, order, advantages.to(rewards.dtype))
