"""Log-probabilities among the tokens that min-p sampling keeps."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.checks import compute_dtype
from ...core.transform import Transform
from .launch import VOCABULARY_OPTIONS, device_guard, is_even, loads_of, row_arguments, triton_dtype
from .math import LN2
from .statistics import MERGED_ROWS, RUN_TIME, block_of_rows, lanes_of, warps_of
from .tiles import lane_max, lane_sum, load_tile, pair_sums, row_pointer, tile_columns


@triton.jit
def _kept_logprob(total, target_t, floor):
    """From the sum over what is kept and the target's exponent, NaN where that is unknown."""
    log_sum = tl.log2(total)
    logp = (target_t - log_sum) * LN2
    return tl.where((target_t < floor) & (log_sum == log_sum), float("-inf"), logp)


@triton.jit(do_not_specialize=RUN_TIME)
def min_p_kernel(
    logits_ptr, targets_ptr, out_ptr, largest_ptr,
    n_columns, rows_per_batch: tl.int32, batch_stride: tl.int64, row_stride: tl.int64, column_stride,
    temperature_stride: tl.int64, ignore_index: tl.int64, exponent_scale: tl.float64, logit_scale: tl.float64,
    softcap: tl.float64, first_column: tl.int64, state_stride: tl.int64, log2_min_p: tl.float64,
    STAGE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LOADS: tl.constexpr, EVEN: tl.constexpr, LANES: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Log-probability of the target among the tokens with p >= min_p * max p. Grid (rows,); two reads of the row.

    Of a part of the vocabulary STAGE "largest" writes the row's largest capped logit, and "part", which reads that of
    the whole row, the sum [0, row] over what is kept and the target's exponent [1, row], NaN where it is not here.
    """
    row32 = tl.program_id(0)
    row = row32.to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    if target == ignore_index:
        if STAGE == "all":
            tl.store(out_ptr + row, 0.0)
        return
    target -= first_column
    scale = tl.full((), logit_scale, COMPUTE)
    cap = tl.full((), softcap, COMPUTE)
    k = tl.full((), exponent_scale, COMPUTE)
    floor = tl.full((), log2_min_p, COMPUTE)
    base = row_pointer(logits_ptr, row32, rows_per_batch, batch_stride, row_stride)
    tile: tl.constexpr = LANES * (128 // logits_ptr.dtype.element_ty.primitive_bitwidth)

    if STAGE == "part":
        largest_u = tl.load(largest_ptr + row)
    else:
        largest = tl.full((LANES,), float("-inf"), COMPUTE)
        for first in range(0, n_columns, tile):
            u = load_tile(
                base, first, n_columns, column_stride, scale, cap, True, LOADS, EVEN, HAS_SOFTCAP, LANES, COMPUTE, ""
            )
            largest = tl.maximum(largest, lane_max(u))
        largest_u = tl.max(largest, axis=0)
    if STAGE == "largest":
        tl.store(out_ptr + row, largest_u)
        return

    total = tl.zeros((LANES,), COMPUTE)
    target_t = tl.zeros((LANES,), COMPUTE)
    for first in range(0, n_columns, tile):
        u = load_tile(
            base, first, n_columns, column_stride, scale, cap, True, LOADS, EVEN, HAS_SOFTCAP, LANES, COMPUTE, ""
        )
        columns = tile_columns(first, LANES, logits_ptr.dtype.element_ty)
        t = (u - largest_u) * k  # exactly 0 at the maximum, which min_p = 1 keeps
        # "not below" rather than "at least": a NaN is kept, and makes the row NaN.
        total += lane_sum(tl.where((columns < n_columns) & ~(t < floor), tl.exp2(t), 0.0))
        # The very number that was compared: computed a second time it could be another.
        target_t += lane_sum(tl.where(columns == target, t, 0.0))
    total_all, t_target = pair_sums(total, target_t)
    known = (target >= 0) & (target < n_columns)
    t_target = tl.where(known, t_target, float("nan"))
    if STAGE == "part":
        tl.store(out_ptr + row, total_all)
        tl.store(out_ptr + state_stride + row, t_target)
    else:
        tl.store(out_ptr + row, _kept_logprob(total_all, t_target, floor))


@triton.jit(do_not_specialize=RUN_TIME)
def finish_min_p_kernel(
    parts_ptr, targets_ptr, out_ptr, n_rows, n_parts, ignore_index: tl.int64, log2_min_p: tl.float64,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The log-probabilities from the parts [parts, 2, rows] of a vocabulary, in their order. Grid (blocks of rows,)."""
    row, here, active = block_of_rows(targets_ptr, n_rows, ignore_index, BLOCK)
    stride = n_rows.to(tl.int64)
    total = tl.zeros((BLOCK,), COMPUTE)
    target_t = tl.full((BLOCK,), float("nan"), COMPUTE)
    for part in range(n_parts):
        at = parts_ptr + part * 2 * stride + row
        total += tl.load(at, mask=active, other=1.0)
        found = tl.load(at + stride, mask=active, other=float("nan"))
        target_t = tl.where(target_t == target_t, target_t, found)
    logp = _kept_logprob(total, target_t, tl.full((), log2_min_p, COMPUTE))
    tl.store(out_ptr + row, tl.where(active, logp, 0.0), mask=here)


def _launch(
    stage: str, logits: Tensor, targets: Tensor, out: Tensor, largest: Tensor | None, min_p: float,
    transform: Transform, first_column: int,
) -> Tensor:  # fmt: skip
    if targets.numel() == 0:
        return out
    lanes = lanes_of(logits.shape[-1], logits.element_size())
    with device_guard(logits):
        min_p_kernel[(targets.numel(),)](
            logits, targets, out, largest, logits.shape[-1], *row_arguments(logits, transform), first_column,
            targets.numel(), math.log2(min_p), STAGE=stage, HAS_SOFTCAP=bool(transform.softcap),
            LOADS=loads_of(logits), EVEN=is_even(logits), LANES=lanes, COMPUTE=triton_dtype(logits.dtype),
            num_warps=warps_of(lanes), **VOCABULARY_OPTIONS,
        )  # fmt: skip
    return out


def _empty(logits: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=compute_dtype(logits.dtype), device=logits.device)


def min_p_logprobs(logits: Tensor, targets: Tensor, min_p: float, transform: Transform) -> Tensor:
    """[N] of logits [batch, rows, V]; the transform has no temperature."""
    return _launch("all", logits, targets, _empty(logits, targets.numel()), None, min_p, transform, 0)


def row_maxima(logits: Tensor, targets: Tensor, transform: Transform) -> Tensor:
    """[N]: the largest capped logit of each row; unspecified where the target is ignored."""
    return _launch("largest", logits, targets, _empty(logits, targets.numel()), None, 1.0, transform, 0)


def min_p_part(
    logits: Tensor, targets: Tensor, largest: Tensor, min_p: float, transform: Transform, first_column: int
) -> Tensor:
    """[2, N] of some columns: the sum over what is kept and the target's exponent, NaN where it is not here."""
    out = _empty(logits, 2, targets.numel())
    return _launch("part", logits, targets, out, largest, min_p, transform, first_column)


def finish_min_p(parts: Tensor, targets: Tensor, min_p: float, transform: Transform) -> Tensor:
    """[N] log-probs of the targets from the parts [parts, 2, N] of a vocabulary, in their order."""
    out = _empty(parts, targets.numel())
    with device_guard(targets):
        finish_min_p_kernel[(triton.cdiv(targets.numel(), MERGED_ROWS),)](
            parts, targets, out, targets.numel(), parts.shape[0], transform.ignore_index, math.log2(min_p),
            BLOCK=MERGED_ROWS, COMPUTE=triton_dtype(parts.dtype), num_warps=4, **VOCABULARY_OPTIONS,
        )  # fmt: skip
    return out
