"""Exact selection of the lowest or highest k tokens of each rollout, on the device and with no host sync."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..distributed import select_global
from ._dispatch import check_backend, check_floating, check_tensor, device_guard, uses_triton
from ._layout import token_layout
from ._rounding import bounded_fraction

SIDES = ("low", "high")
SCOPES = ("rollout", "batch", "global")
ROUNDINGS = ("floor", "ceil")
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


def _select_torch(metric, eligible, offsets, fraction, high, ceil, at_least, required):
    """The same by stable sorts: a row a segment, where padding to the longest is cheap, else by metric and segment."""
    count, segments = metric.numel(), offsets.numel() - 1
    position = torch.arange(count, device=metric.device)
    segment = torch.searchsorted(offsets, position, right=True) - 1
    running = torch.cat([offsets.new_zeros(1), eligible.long().cumsum(0)])
    n = running[offsets[1:]] - running[offsets[:-1]]
    k = n * fraction.numerator + (fraction.denominator - 1 if ceil else 0)
    k = (k // fraction.denominator).clamp(min=at_least)
    k = torch.where(k < required, 0, torch.minimum(k, n))
    # + 0.0 turns -0.0 into 0.0, which a radix sort would tell apart.
    keys = metric + 0.0
    # The longest segment of several is read on the host: on a CPU alone.
    width = count if segments == 1 else int((offsets[1:] - offsets[:-1]).max()) if metric.device.type == "cpu" else 0
    if 0 < segments * width <= 4 * count:
        place = None if segments * width == count else segment * width + position - offsets[segment]

        def padded(x: Tensor) -> Tensor:
            flat = x if place is None else x.new_zeros(segments * width).scatter_(0, place, x)
            return flat.view(segments, width)

        order = torch.sort(padded(keys), dim=1, stable=True, descending=high).indices
        open_ = padded(eligible).gather(1, order)
        chosen = open_ & (open_.cumsum(1) <= k.unsqueeze(1))
        out = torch.empty_like(open_).scatter_(1, order, chosen).flatten()
        return out if place is None else out[place]
    order = torch.sort(keys, stable=True, descending=high).indices
    group = segment * 2 + (~eligible).long()
    order = order[torch.sort(group[order], stable=True).indices]
    chosen = (position - offsets[segment] < k[segment])[torch.arange(count, device=metric.device)]
    return torch.empty_like(eligible).scatter_(0, order, chosen)


@torch.library.custom_op("a3po::select_tokens", mutates_args=())
def _select_tokens(
    metric: Tensor, eligible: Tensor, offsets: Tensor, ratio: float, high: bool, ceil: bool, at_least: int,
    required: int, backend: str,
) -> Tensor:  # fmt: skip
    """Bool [N]: in each segment of offsets [S + 1] the k lowest (or highest) eligible entries of metric [N].

    k is n * ratio rounded, at least `at_least`, and 0 where that is below `required`.
    """
    count, segments = metric.numel(), offsets.numel() - 1
    if count == 0 or segments <= 0:
        return torch.zeros_like(eligible)
    fraction = bounded_fraction(ratio, count, ceil)
    # One long segment leaves a GPU to one program: sort instead. The result is the same, to the token.
    if not uses_triton(backend, metric.device) or (segments == 1 and count > _LONGEST_SEGMENT):
        return _select_torch(metric, eligible, offsets, fraction, high, ceil, at_least, required)
    out = torch.zeros_like(eligible)
    with device_guard(metric):
        select_kernel[(segments,)](
            metric, eligible.view(torch.int8), offsets, out.view(torch.int8),
            fraction.numerator, fraction.denominator, at_least, required,
            HIGH=high, CEIL=ceil, DIGITS=2 * metric.element_size(), BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


@_select_tokens.register_fake
def _(metric, eligible, *_):
    return torch.empty_like(eligible)


def select_flat(
    metric: Tensor, eligible: Tensor, offsets: Tensor, *, ratio: float, side: str, scope: str, rounding: str,
    at_least: int = 1, required: int = 0, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """select_tokens on flat [N] tensors and offsets [S + 1], after every check."""
    metric = metric.detach().contiguous()
    if metric.dtype not in (torch.float32, torch.float64):
        metric = metric.float()
    eligible = eligible.contiguous()
    if scope == "global":
        return select_global(metric, eligible, ratio, side == "high", rounding == "ceil", at_least, required)
    if scope == "batch":
        offsets = torch.stack([torch.zeros_like(offsets[0]), torch.full_like(offsets[0], metric.numel())])
    return _select_tokens(
        metric, eligible, offsets, float(ratio), side == "high", rounding == "ceil", at_least, required, backend
    )


def check_selection(ratio: object, side: str, scope: str, rounding: str) -> None:
    """Raises ValueError or TypeError unless 0 < ratio <= 1 and the words are known."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio must be a number; got {type(ratio).__name__}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1]; got {ratio}")
    for name, value, known in (("side", side, SIDES), ("scope", scope, SCOPES), ("rounding", rounding, ROUNDINGS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def select_tokens(
    metric: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ratio: float,
    side: str,
    scope: str = "rollout",
    rounding: str = "floor",
    validate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Marks exactly k = max(1, n * ratio rounded) of the n eligible tokens of each scope (none where n = 0).

    The product is taken in integers from the decimal ratio, so 0.29 of 100 is 29. Ties go to the earlier position,
    -0.0 equals 0.0, NaN counts as the largest. Deterministic, no host synchronisation.

    Args:
        metric: [B, T], or [N] with `cu_seqlens` (without it: one rollout); floating point, never differentiated.
        mask: eligible tokens, of the metric's shape, bool or 0/1; all if None.
        cu_seqlens: [S + 1] int32 or int64 offsets of packed rollouts.
        ratio: share to select, in (0, 1].
        side: "low" or "high" values of the metric.
        scope: "rollout", "batch", or "global" (over the ranks of the default torch.distributed group).
        rounding: "floor" or "ceil".

    Returns:
        A bool mask of the metric's shape.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range.
    """
    check_tensor("metric", metric)
    check_floating("metric", metric)
    check_selection(ratio, side, scope, rounding)
    check_backend(backend, metric.device)
    layout = token_layout("metric", metric, cu_seqlens, validate=validate, one_rollout=True)
    eligible = layout.flat_mask(mask)
    if eligible is None:
        eligible = torch.ones(layout.count, dtype=torch.bool, device=metric.device)
    chosen = select_flat(
        metric.reshape(-1), eligible, layout.offsets, ratio=ratio, side=side, scope=scope, rounding=rounding,
        backend=backend,
    )  # fmt: skip
    return chosen.view(metric.shape)
