"""Exact selection of the lowest or highest k entries of each segment by a radix search."""

from fractions import Fraction

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch.selection import select as select_by_sorting
from .launch import device_guard

_BLOCK = 512
# One program walks a segment; above this length a sort of the whole batch is faster.
_LONGEST_SEGMENT = 8192


@triton.jit
def _order_keys(values, HIGH: tl.constexpr, DIGITS: tl.constexpr):
    """Unsigned integers in the order of the floats (-0 equals 0, NaN is the largest); reversed for HIGH."""
    values = values + 0.0
    if DIGITS == 16:
        bits = values.to(tl.int64, bitcast=True)
        keys = tl.where(bits < 0, ~bits, bits ^ (-0x7FFFFFFFFFFFFFFF - 1))
    else:
        bits = values.to(tl.int32, bitcast=True)
        keys = tl.where(bits < 0, ~bits, bits ^ (-0x7FFFFFFF - 1))
    keys = tl.where(values == values, keys, -1)
    if HIGH:
        keys = ~keys
    if DIGITS == 16:
        return keys.to(tl.uint64, bitcast=True)
    else:
        return keys.to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["numerator", "denominator", "at_least", "required"])
def select_kernel(
    metric_ptr, eligible_ptr, offsets_ptr, out_ptr,
    numerator: tl.int64, denominator: tl.int64, at_least: tl.int64, required: tl.int64,
    HIGH: tl.constexpr, CEIL: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Marks the k smallest keys of one segment by a radix search, four bits a pass. Grid (segments,).

    No atomics: every count is a sum in a fixed order. Ties go to the earlier position.
    """
    segment = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + segment)
    stop = tl.load(offsets_ptr + segment + 1)
    lanes = tl.arange(0, BLOCK)
    count = tl.full((), 0, tl.int64)
    for first in range(start, stop, BLOCK):
        at = first + lanes
        count += tl.sum((tl.load(eligible_ptr + at, mask=at < stop, other=0) != 0).to(tl.int32), axis=0)
    k = count * numerator
    if CEIL:
        k += denominator - 1
    k = tl.maximum(k // denominator, at_least)
    k = tl.where(k < required, 0, tl.minimum(k, count))

    bins = tl.arange(0, 16)
    if DIGITS == 16:
        prefix = tl.full((), 0, tl.uint64)
    else:
        prefix = tl.full((), 0, tl.uint32)
    left = k
    for step in range(DIGITS):
        down = 4 * (DIGITS - 1 - step)
        histogram = tl.zeros((16,), tl.int32)
        for first in range(start, stop, BLOCK):
            at = first + lanes
            keys = _order_keys(tl.load(metric_ptr + at, mask=at < stop, other=0.0), HIGH, DIGITS) >> down
            open_ = (tl.load(eligible_ptr + at, mask=at < stop, other=0) != 0) & ((keys >> 4) == prefix)
            digit = tl.where(open_, (keys & 15).to(tl.int32), 16)
            histogram += tl.sum((digit[:, None] == bins[None, :]).to(tl.int32), axis=0)
        below = tl.cumsum(histogram, axis=0)
        digit = tl.sum((below < left).to(tl.int32), axis=0)
        left -= tl.sum(tl.where(bins < digit, histogram, 0), axis=0)
        prefix = (prefix << 4) | digit.to(prefix.dtype)

    ties = tl.full((), 0, tl.int64)
    for first in range(start, stop, BLOCK):
        at = first + lanes
        inside = at < stop
        keys = _order_keys(tl.load(metric_ptr + at, mask=inside, other=0.0), HIGH, DIGITS)
        eligible = tl.load(eligible_ptr + at, mask=inside, other=0) != 0
        tied = (eligible & (keys == prefix)).to(tl.int32)
        rank = ties + tl.cumsum(tied, axis=0) - tied
        chosen = eligible & (((keys < prefix) & (k > 0)) | ((tied != 0) & (rank < left)))
        tl.store(out_ptr + at, chosen.to(tl.int8), mask=inside)
        ties += tl.sum(tied, axis=0)


def select(
    metric: Tensor, eligible: Tensor, offsets: Tensor, fraction: Fraction, high: bool, ceil: bool, at_least: int,
    required: int,
) -> Tensor:  # fmt: skip
    """Bool [N]: the k lowest (or highest) eligible entries of each segment."""
    segments = offsets.numel() - 1
    # One long segment leaves a GPU to one program: sort instead. The result is the same, to the token.
    if segments == 1 and metric.numel() > _LONGEST_SEGMENT:
        return select_by_sorting(metric, eligible, offsets, fraction, high, ceil, at_least, required)
    out = torch.zeros_like(eligible)
    with device_guard(metric):
        select_kernel[(segments,)](
            metric, eligible.view(torch.int8), offsets, out.view(torch.int8),
            fraction.numerator, fraction.denominator, at_least, required,
            HIGH=high, CEIL=ceil, DIGITS=2 * metric.element_size(), BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out
