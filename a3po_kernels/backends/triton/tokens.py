"""Reads the N-sized arguments of a loss in one launch, and finds what the loss of a token is divided by in another."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard, triton_dtype

_BLOCK = 1024


@triton.jit
def segment_of(offsets_ptr, segment, n_segments, n_rows):
    """(start, stop, low, high): the rows of a segment, and with those that lie before the first or after the last."""
    start = tl.load(offsets_ptr + segment)
    stop = tl.load(offsets_ptr + segment + 1)
    low = tl.where(segment == 0, 0, start)
    high = tl.where(segment == n_segments - 1, n_rows, stop)
    return start, stop, low, high


@triton.jit
def _spread(pointer, out_ptr, at, inside, token, segment, PER_ROLLOUT: tl.constexpr):
    """Copies a value per token or per rollout; 0 where no token is. Gives what it stored."""
    if PER_ROLLOUT:
        value = tl.load(pointer + segment + at * 0, mask=token, other=0)
    else:
        value = tl.load(pointer + at, mask=token, other=0)
    value = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, value, mask=inside)
    return value


@triton.jit(do_not_specialize=["n_rows", "n_rollouts", "ignore_index"])
def read_tokens_kernel(
    targets_ptr, mask_ptr, offsets_ptr, advantages_ptr, polarity_ptr, importance_ptr, targets_out_ptr, tokens_ptr,
    rollout_ptr, advantages_out_ptr, polarity_out_ptr, importance_out_ptr, weights_ptr, counts_ptr,
    n_rows: tl.int64, n_rollouts: tl.int64, ignore_index: tl.int64, positive: tl.float64, negative: tl.float64,
    neutral: tl.float64,
    ADVANTAGES: tl.constexpr, POLARITY: tl.constexpr, IMPORTANCE: tl.constexpr, BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """The rows of one rollout: which are tokens, how many, their values and the weights of their polarity.

    Grid (rollouts,). ADVANTAGES, POLARITY, IMPORTANCE: whether those are per rollout.
    """
    rollout = tl.program_id(0).to(tl.int64)
    start, stop, low, high = segment_of(offsets_ptr, rollout, n_rollouts, n_rows)
    count = tl.full((), 0, tl.int32)
    for first in range(low, high, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < high
        token = (at >= start) & (at < stop)
        if mask_ptr is not None:
            token = token & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
        if targets_ptr is not None:
            target = tl.load(targets_ptr + at, mask=inside, other=0).to(tl.int64)
            target = tl.where(token, target, ignore_index)
            token = token & (target != ignore_index)
            tl.store(targets_out_ptr + at, target, mask=inside)
        tl.store(tokens_ptr + at, token.to(tl.int8), mask=inside)
        tl.store(rollout_ptr + at, (rollout + at * 0).to(tl.int32), mask=inside)
        advantage = _spread(advantages_ptr, advantages_out_ptr, at, inside, token, rollout, ADVANTAGES)
        sign = advantage
        if polarity_ptr is not None:
            sign = _spread(polarity_ptr, polarity_out_ptr, at, inside, token, rollout, POLARITY)
        if importance_ptr is not None:
            _spread(importance_ptr, importance_out_ptr, at, inside, token, rollout, IMPORTANCE)
        weight = tl.full((BLOCK,), neutral, COMPUTE)
        weight = tl.where(sign > 0, tl.full((), positive, COMPUTE), weight)
        weight = tl.where(sign < 0, tl.full((), negative, COMPUTE), weight)
        tl.store(weights_ptr + at, tl.where(token, weight, 0.0), mask=inside)
        count += tl.sum(token.to(tl.int32), axis=0)
    tl.store(counts_ptr + rollout, count.to(COMPUTE))


@triton.jit
def count_kept_kernel(weights_ptr, offsets_ptr, counts_ptr, BLOCK: tl.constexpr):
    """Tokens of a rollout whose weight is not 0. Grid (rollouts,)."""
    rollout = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + rollout)
    stop = tl.load(offsets_ptr + rollout + 1)
    count = tl.full((), 0, tl.int32)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        count += tl.sum((tl.load(weights_ptr + at, mask=at < stop, other=0.0) != 0).to(tl.int32), axis=0)
    tl.store(counts_ptr + rollout, count.to(counts_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["n_rollouts"])
def normalizer_kernel(
    counts_ptr, divisor_ptr, out_ptr, n_rollouts: tl.int32, divisor: tl.float64, max_length: tl.float64,
    TOTAL: tl.constexpr, PER_ROLLOUT: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """1 / (what a token's loss is divided by) of each rollout; 0 where that is 0, NaN if it is no divisor. Grid (1,).

    TOTAL: "given", "tokens", "rollouts" with a token, or "lengths", all rollouts at max_length. PER_ROLLOUT also
    divides by the rollout's own tokens.
    """
    lanes = tl.arange(0, BLOCK)
    if TOTAL == "given":
        total = tl.full((), divisor, COMPUTE)
        if divisor_ptr is not None:
            total = tl.load(divisor_ptr).to(COMPUTE)
    elif TOTAL == "lengths":
        total = n_rollouts.to(COMPUTE) * tl.full((), max_length, COMPUTE)
    else:
        sums = tl.zeros((BLOCK,), COMPUTE)
        for first in range(0, n_rollouts, BLOCK):
            count = tl.load(counts_ptr + first + lanes, mask=first + lanes < n_rollouts, other=0.0)
            sums += count if TOTAL == "tokens" else (count > 0).to(COMPUTE)
        total = tl.sum(sums, axis=0)
    # 1 / inf would be a quiet 0, and so would a divisor below 0.
    scale = tl.where((total > 0) & (total < float("inf")), 1.0 / total, tl.where(total == 0, 0.0, float("nan")))
    for first in range(0, n_rollouts, BLOCK):
        inside = first + lanes < n_rollouts
        value = tl.zeros((BLOCK,), COMPUTE) + scale
        if PER_ROLLOUT:
            count = tl.load(counts_ptr + first + lanes, mask=inside, other=0.0)
            value = tl.where(count > 0, value / count, 0.0)
        tl.store(out_ptr + first + lanes, value, mask=inside)


def read_tokens(
    targets: Tensor | None, mask: Tensor | None, offsets: Tensor, advantages: Tensor, polarity: Tensor | None,
    importance: Tensor | None, per_rollout: tuple[bool, bool, bool], polarity_weights: tuple[float, float, float],
    ignore_index: int, out: tuple[Tensor | None, ...],
) -> None:  # fmt: skip
    """Fills `out`: targets, tokens, rollout, advantages, polarity, importance, weights [N] and counts [S]."""
    tokens, counts = out[1], out[-1]
    assert tokens is not None and counts is not None
    if counts.numel() == 0:
        return
    with device_guard(tokens):
        read_tokens_kernel[(counts.numel(),)](
            targets, mask, offsets, advantages, polarity, importance, *out, tokens.numel(), counts.numel(),
            ignore_index, *polarity_weights, ADVANTAGES=per_rollout[0], POLARITY=per_rollout[1],
            IMPORTANCE=per_rollout[2], BLOCK=_BLOCK, COMPUTE=triton_dtype(counts.dtype),
        )  # fmt: skip


def count_kept(weights: Tensor, offsets: Tensor) -> Tensor:
    """[S]: tokens of each rollout whose weight is not 0."""
    counts = weights.new_empty(offsets.numel() - 1)
    if counts.numel():
        with device_guard(weights):
            count_kept_kernel[(counts.numel(),)](weights, offsets, counts, BLOCK=_BLOCK)
    return counts


def normalizer(counts: Tensor, total: str, per_rollout: bool, divisor: float | Tensor, max_length: float) -> Tensor:
    """[S]: see ops.tokens.normalizer."""
    out = torch.empty_like(counts)
    tensor = divisor if isinstance(divisor, Tensor) else None
    if counts.numel():
        with device_guard(counts):
            normalizer_kernel[(1,)](
                counts, tensor, out, counts.numel(), 0.0 if tensor is not None else divisor, max_length,
                TOTAL=total, PER_ROLLOUT=per_rollout, BLOCK=256, COMPUTE=triton_dtype(counts.dtype),
            )  # fmt: skip
    return out
