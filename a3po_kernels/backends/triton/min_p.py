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
from .statistics import RUN_TIME, lanes_of, warps_of
from .tiles import lane_max, lane_sum, load_tile, pair_sums, row_pointer, tile_columns


@triton.jit(do_not_specialize=RUN_TIME)
def min_p_kernel(
    logits_ptr, targets_ptr, out_ptr,
    n_columns, rows_per_batch: tl.int32, batch_stride: tl.int64, row_stride: tl.int64, column_stride,
    temperature_stride: tl.int64, ignore_index: tl.int64, exponent_scale: tl.float64, logit_scale: tl.float64,
    softcap: tl.float64, log2_min_p: tl.float64,
    HAS_SOFTCAP: tl.constexpr, LOADS: tl.constexpr, EVEN: tl.constexpr, LANES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Log-probability of the target among the tokens with p >= min_p * max p. Grid (rows,); two reads of the row."""
    row32 = tl.program_id(0)
    row = row32.to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    if target == ignore_index:
        tl.store(out_ptr + row, 0.0)
        return
    scale = tl.full((), logit_scale, COMPUTE)
    cap = tl.full((), softcap, COMPUTE)
    k = tl.full((), exponent_scale, COMPUTE)
    floor = tl.full((), log2_min_p, COMPUTE)
    base = row_pointer(logits_ptr, row32, rows_per_batch, batch_stride, row_stride)
    tile: tl.constexpr = LANES * (128 // logits_ptr.dtype.element_ty.primitive_bitwidth)

    largest = tl.full((LANES,), float("-inf"), COMPUTE)
    for first in range(0, n_columns, tile):
        u = load_tile(
            base, first, n_columns, column_stride, scale, cap, True, LOADS, EVEN, HAS_SOFTCAP, LANES, COMPUTE, ""
        )
        largest = tl.maximum(largest, lane_max(u))
    largest_u = tl.max(largest, axis=0)

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
    log_sum = tl.log2(total_all)

    known = (target >= 0) & (target < n_columns)
    logp = (t_target - log_sum) * LN2
    logp = tl.where((t_target < floor) & (log_sum == log_sum), float("-inf"), logp)
    tl.store(out_ptr + row, tl.where(known, logp, float("nan")))


def min_p_logprobs(logits: Tensor, targets: Tensor, min_p: float, transform: Transform) -> Tensor:
    """[N] of logits [batch, rows, V]; the transform has no temperature."""
    out = torch.empty(targets.numel(), dtype=compute_dtype(logits.dtype), device=logits.device)
    if targets.numel() == 0:
        return out
    lanes = lanes_of(logits.shape[-1], logits.element_size())
    with device_guard(logits):
        min_p_kernel[(targets.numel(),)](
            logits, targets, out, logits.shape[-1], *row_arguments(logits, transform), math.log2(min_p),
            HAS_SOFTCAP=bool(transform.softcap), LOADS=loads_of(logits), EVEN=is_even(logits), LANES=lanes,
            COMPUTE=triton_dtype(logits.dtype), num_warps=warps_of(lanes), **VOCABULARY_OPTIONS,
        )  # fmt: skip
    return out
