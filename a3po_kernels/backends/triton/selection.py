"""Exact selection of the lowest or highest k entries of each segment by a radix search."""

from fractions import Fraction

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.forms import RuleForm
from ...core.rounding import bounded_fraction
from ..torch.selection import select as select_by_sorting
from .launch import device_guard
from .tokens import segment_of

_BLOCK = 512
# One program walks a segment; above this length a sort of the whole batch is faster.
LONGEST_SEGMENT = 8192


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


@triton.jit
def _is_eligible(eligible_ptr, weights_ptr, polarity_ptr, at, inside, POLARITY: tl.constexpr):
    """By flags, or by weights that are not 0 and the sign of the polarity."""
    if weights_ptr is None:
        return tl.load(eligible_ptr + at, mask=inside, other=0) != 0
    else:
        open_ = tl.load(weights_ptr + at, mask=inside, other=0.0) != 0
        if POLARITY != 0:
            open_ = open_ & (tl.load(polarity_ptr + at, mask=inside, other=0.0) * POLARITY > 0)
        return open_


@triton.jit
def _quota(count, numerator, denominator, at_least, required, CEIL: tl.constexpr):
    """How many of `count` are selected."""
    k = count * numerator
    if CEIL:
        k += denominator - 1
    k = tl.maximum(k // denominator, at_least)
    return tl.where(k < required, 0, tl.minimum(k, count))


@triton.jit
def _threshold(
    metric_ptr, eligible_ptr, weights_ptr, polarity_ptr, start, stop, k, POLARITY: tl.constexpr, HIGH: tl.constexpr,
    DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(key of the k-th smallest, how many of it are taken) by a radix search, four bits a pass; (0, 0) without any.

    No atomics: every count is a sum in a fixed order.
    """
    bins = tl.arange(0, 16)
    if DIGITS == 16:
        prefix = tl.full((), 0, tl.uint64)
    else:
        prefix = tl.full((), 0, tl.uint32)
    left = k
    for step in range(tl.where(k > 0, DIGITS, 0)):
        down = 4 * (DIGITS - 1 - step)
        histogram = tl.zeros((16,), tl.int32)
        for first in range(start, stop, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < stop
            keys = _order_keys(tl.load(metric_ptr + at, mask=inside, other=0.0), HIGH, DIGITS) >> down
            open_ = _is_eligible(eligible_ptr, weights_ptr, polarity_ptr, at, inside, POLARITY)
            open_ = open_ & ((keys >> 4) == prefix)
            digit = tl.where(open_, (keys & 15).to(tl.int32), 16)
            histogram += tl.sum((digit[:, None] == bins[None, :]).to(tl.int32), axis=0)
        below = tl.cumsum(histogram, axis=0)
        digit = tl.sum((below < left).to(tl.int32), axis=0)
        left -= tl.sum(tl.where(bins < digit, histogram, 0), axis=0)
        prefix = (prefix << 4) | digit.to(prefix.dtype)
    return prefix, left


@triton.jit
def _choose(metric_ptr, at, inside, eligible, prefix, left, ties, HIGH: tl.constexpr, DIGITS: tl.constexpr):
    """(selected, entries tied with the threshold so far); ties go to the earlier position."""
    keys = _order_keys(tl.load(metric_ptr + at, mask=inside, other=0.0), HIGH, DIGITS)
    tied = (eligible & (keys == prefix)).to(tl.int32)
    rank = ties + tl.cumsum(tied, axis=0) - tied
    chosen = eligible & ((keys < prefix) | ((tied != 0) & (rank < left)))
    return chosen, ties + tl.sum(tied, axis=0)


@triton.jit
def _count_eligible(
    eligible_ptr, weights_ptr, polarity_ptr, start, stop, POLARITY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    count = tl.full((), 0, tl.int64)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        open_ = _is_eligible(eligible_ptr, weights_ptr, polarity_ptr, at, at < stop, POLARITY)
        count += tl.sum(open_.to(tl.int32), axis=0)
    return count


@triton.jit(do_not_specialize=["numerator", "denominator", "at_least", "required"])
def select_kernel(
    metric_ptr, eligible_ptr, offsets_ptr, out_ptr,
    numerator: tl.int64, denominator: tl.int64, at_least: tl.int64, required: tl.int64,
    HIGH: tl.constexpr, CEIL: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Marks the k smallest keys of one segment. Grid (segments,)."""
    segment = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + segment)
    stop = tl.load(offsets_ptr + segment + 1)
    count = _count_eligible(eligible_ptr, None, None, start, stop, 0, BLOCK)
    k = _quota(count, numerator, denominator, at_least, required, CEIL)
    prefix, left = _threshold(metric_ptr, eligible_ptr, None, None, start, stop, k, 0, HIGH, DIGITS, BLOCK)
    ties = tl.full((), 0, tl.int64)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < stop
        eligible = tl.load(eligible_ptr + at, mask=inside, other=0) != 0
        chosen, ties = _choose(metric_ptr, at, inside, eligible, prefix, left, ties, HIGH, DIGITS)
        tl.store(out_ptr + at, chosen.to(tl.int8), mask=inside)


@triton.jit
def _apply_rule(
    metric_ptr, polarity_ptr, from_ptr, weights_ptr, selected_ptr, start, stop, low, high, numerator, denominator,
    scale, rest, FIRST: tl.constexpr, POLARITY: tl.constexpr, HIGH: tl.constexpr, CEIL: tl.constexpr,
    DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiplies the weights of one rollout; those of no rollout are copied. FIRST: nothing was selected before."""
    count = _count_eligible(None, from_ptr, polarity_ptr, start, stop, POLARITY, BLOCK)
    k = _quota(count, numerator, denominator, 1, 0, CEIL)
    prefix, left = _threshold(metric_ptr, None, from_ptr, polarity_ptr, start, stop, k, POLARITY, HIGH, DIGITS, BLOCK)
    ties = tl.full((), 0, tl.int64)
    for first in range(low, high, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = (at >= start) & (at < stop)
        weight = tl.load(from_ptr + at, mask=at < high, other=0.0)
        eligible = _is_eligible(None, from_ptr, polarity_ptr, at, inside, POLARITY)
        chosen, ties = _choose(metric_ptr, at, inside, eligible, prefix, left, ties, HIGH, DIGITS)
        weight = tl.where(chosen, weight * scale, tl.where(eligible, weight * rest, weight))
        before = chosen & ~chosen
        if not FIRST:
            before = tl.load(selected_ptr + at, mask=inside, other=0) != 0
        tl.store(selected_ptr + at, (chosen | before).to(tl.int8), mask=at < high)
        tl.store(weights_ptr + at, weight, mask=at < high)


@triton.jit
def _scale_of(pointer, value, like_ptr):
    if pointer is None:
        return tl.full((), value, like_ptr.dtype.element_ty)
    else:
        return tl.load(pointer).to(like_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=[
    "n_segments", "n_rows", "numerator_a", "denominator_a", "numerator_b", "denominator_b",
])  # fmt: skip
def token_rules_kernel(
    weights_ptr, polarity_ptr, offsets_ptr, metric_a_ptr, metric_b_ptr, scale_a_ptr, scale_b_ptr, out_ptr, selected_ptr,
    n_segments: tl.int64, n_rows: tl.int64, numerator_a: tl.int64, denominator_a: tl.int64, numerator_b: tl.int64,
    denominator_b: tl.int64, scale_a: tl.float64, scale_b: tl.float64, rest_a: tl.float64, rest_b: tl.float64,
    FIRST: tl.constexpr, TWO: tl.constexpr, POLARITY_A: tl.constexpr, POLARITY_B: tl.constexpr, HIGH_A: tl.constexpr,
    HIGH_B: tl.constexpr, CEIL_A: tl.constexpr, CEIL_B: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One rule, or two after each other, on the weights of a rollout. Grid (rollouts,)."""
    segment = tl.program_id(0).to(tl.int64)
    start, stop, low, high = segment_of(offsets_ptr, segment, n_segments, n_rows)
    _apply_rule(
        metric_a_ptr, polarity_ptr, weights_ptr, out_ptr, selected_ptr, start, stop, low, high, numerator_a,
        denominator_a, _scale_of(scale_a_ptr, scale_a, out_ptr), tl.full((), rest_a, out_ptr.dtype.element_ty), FIRST,
        POLARITY_A, HIGH_A, CEIL_A, DIGITS, BLOCK,
    )  # fmt: skip
    if TWO:
        tl.debug_barrier()  # The second rule reads what other threads of this program wrote.
        _apply_rule(
            metric_b_ptr, polarity_ptr, out_ptr, out_ptr, selected_ptr, start, stop, low, high, numerator_b,
            denominator_b, _scale_of(scale_b_ptr, scale_b, out_ptr), tl.full((), rest_b, out_ptr.dtype.element_ty),
            False, POLARITY_B, HIGH_B, CEIL_B, DIGITS, BLOCK,
        )  # fmt: skip


def select(
    metric: Tensor, eligible: Tensor, offsets: Tensor, fraction: Fraction, high: bool, ceil: bool, at_least: int,
    required: int,
) -> Tensor:  # fmt: skip
    """Bool [N]: the k lowest (or highest) eligible entries of each segment."""
    segments = offsets.numel() - 1
    # One long segment leaves a GPU to one program: sort instead. The result is the same, to the token.
    if segments == 1 and metric.numel() > LONGEST_SEGMENT:
        return select_by_sorting(metric, eligible, offsets, fraction, high, ceil, at_least, required)
    out = torch.zeros_like(eligible)
    with device_guard(metric):
        select_kernel[(segments,)](
            metric, eligible.view(torch.int8), offsets, out.view(torch.int8),
            fraction.numerator, fraction.denominator, at_least, required,
            HIGH=high, CEIL=ceil, DIGITS=2 * metric.element_size(), BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def apply_rules(
    weights: Tensor, polarity: Tensor, offsets: Tensor, rules: list[RuleForm]
) -> tuple[Tensor, Tensor]:
    """(weights, selected) [N] after the rules, two in a launch."""
    rows, segments = weights.numel(), offsets.numel() - 1
    out, selected = torch.empty_like(weights), torch.empty(rows, dtype=torch.bool, device=weights.device)
    if segments == 0 or rows == 0:
        return weights.clone(), selected.zero_()
    with device_guard(weights):
        for at in range(0, len(rules), 2):
            pair = rules[at : at + 2]
            a, b = pair[0], pair[-1]
            shares = [bounded_fraction(rule.ratio, rows, rule.ceil) for rule in (a, b)]
            scales = [rule.scale if isinstance(rule.scale, Tensor) else None for rule in (a, b)]
            numbers = [1.0 if isinstance(rule.scale, Tensor) else rule.scale for rule in (a, b)]
            token_rules_kernel[(segments,)](
                out if at else weights, polarity, offsets, a.metric, b.metric, *scales, out, selected.view(torch.int8),
                segments, rows, shares[0].numerator, shares[0].denominator, shares[1].numerator, shares[1].denominator,
                *numbers, a.rest, b.rest,
                FIRST=at == 0, TWO=len(pair) == 2, POLARITY_A=a.polarity, POLARITY_B=b.polarity, HIGH_A=a.high,
                HIGH_B=b.high, CEIL_A=a.ceil, CEIL_B=b.ceil, DIGITS=2 * weights.element_size(), BLOCK=_BLOCK,
                num_warps=4,
            )  # fmt: skip
    return out, selected
