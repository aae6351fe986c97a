"""Reductions across data-parallel ranks; each is asked for by name, none is implicit."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.rounding import bounded_fraction


def _keys(metric: Tensor, high: bool) -> tuple[Tensor, int]:
    """int64 keys in the order of the floats (-0 equals 0, NaN is the largest; reversed for `high`), and their bits."""
    values = metric + 0.0
    bits = values.view(torch.int64 if metric.dtype == torch.float64 else torch.int32)
    width = 8 * metric.element_size()
    # Negative floats order backwards as integers: flip their magnitude bits.
    lowest = torch.iinfo(bits.dtype).min
    keys = torch.where(bits < 0, ~bits ^ lowest, bits)
    keys = torch.where(values.isnan(), torch.iinfo(bits.dtype).max, keys)
    return (~keys if high else keys).long(), width


def select_global(
    metric: Tensor, eligible: Tensor, ratio: float, high: bool, ceil: bool, at_least: int, required: int
) -> Tensor:
    """Bool [N]: this rank's share of the k lowest (or highest) tokens over all ranks of the default group.

    A radix search, one byte a round: every round all-reduces 256 integer counts, so all ranks agree to the token. Ties
    go to the lower rank, then to the earlier position. Without an initialised process group it is the batch.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0

    def total(counts: Tensor) -> Tensor:
        if ranks > 1:
            dist.all_reduce(counts)
        return counts

    n = total(eligible.sum())
    # The number of tokens over all ranks is on the device; 2^31 bounds it, and keeps the products within 64 bits.
    fraction = bounded_fraction(ratio, 2**31 - 1, ceil)
    k = (n * fraction.numerator + (fraction.denominator - 1 if ceil else 0)) // fraction.denominator
    k = k.clamp(min=at_least)
    left = torch.where(k < required, 0, torch.minimum(k, n))

    keys, width = _keys(metric, high)
    open_, below = eligible, torch.zeros_like(eligible)
    for shift in range(width - 8, -1, -8):
        digit = (keys >> shift) & 255
        if shift == width - 8:
            digit = digit ^ 128  # The top byte carries the sign.
        counts = total(torch.zeros(256, dtype=torch.int64, device=metric.device).scatter_add_(0, digit, open_.long()))
        running = counts.cumsum(0)
        chosen = (running < left).sum()
        below = below | (open_ & (digit < chosen) & (left > 0))
        left = left - torch.where(torch.arange(256, device=metric.device) < chosen, counts, 0).sum()
        open_ = open_ & (digit == chosen)
    tied = open_.sum()
    if ranks > 1:
        each = [torch.zeros_like(tied) for _ in range(ranks)]
        dist.all_gather(each, tied)
        left = left - torch.stack(each)[:rank].sum()
    return below | (open_ & (open_.long().cumsum(0) <= left))
