"""Log-probabilities among the tokens that min-p sampling keeps."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.checks import compute_dtype
from ...core.transform import Transform
from .launch import device_guard, is_aligned, triton_dtype, vector_width
from .math import LN2, load_capped
from .rows import RUN_TIME, row_offset

_BLOCK = 4096


@triton.jit(do_not_specialize=RUN_TIME)
def min_p_kernel(
    logits_ptr, targets_ptr, out_ptr,
    n_columns, rows_per_batch: tl.int32, batch_stride: tl.int64, row_stride: tl.int64, column_stride,
    ignore_index: tl.int64, log2_min_p: tl.float64,
    exponent_scale: tl.float64, logit_scale: tl.float64, softcap: tl.float64,
    HAS_SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
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
    base = logits_ptr + row_offset(row32, rows_per_batch, batch_stride, row_stride, ALIGNED, VEC)
    columns = tl.arange(0, BLOCK)
    offsets = columns.to(tl.int64) * column_stride

    largest = tl.full((BLOCK,), float("-inf"), COMPUTE)
    for first in range(0, n_columns, BLOCK):
        pointers = base + tl.cast(first, tl.int64) * column_stride + offsets
        u = load_capped(pointers, first + columns < n_columns, scale, cap, True, HAS_SOFTCAP, COMPUTE)
        largest = tl.maximum(largest, u)
    largest_u = tl.max(largest, axis=0)

    total = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, n_columns, BLOCK):
        pointers = base + tl.cast(first, tl.int64) * column_stride + offsets
        inside = first + columns < n_columns
        u = load_capped(pointers, inside, scale, cap, True, HAS_SOFTCAP, COMPUTE)
        t = (u - largest_u) * k  # exactly 0 at the maximum, which min_p = 1 keeps
        # "not below" rather than "at least": a NaN is kept, and makes the row NaN.
        total += tl.where(inside & ~(t < floor), tl.exp2(t), 0.0)
    log_sum = tl.log2(tl.sum(total, axis=0))

    known = (target >= 0) & (target < n_columns)
    u = load_capped(base + target * column_stride, known, scale, cap, True, HAS_SOFTCAP, COMPUTE)
    t = (u - largest_u) * k
    logp = (t - log_sum) * LN2
    logp = tl.where((t < floor) & (log_sum == log_sum), float("-inf"), logp)
    tl.store(out_ptr + row, tl.where(known, logp, float("nan")))


def min_p(logits: Tensor, targets: Tensor, min_p: float, transform: Transform) -> Tensor:
    """[N] of logits [batch, rows, V]; the transform's temperature plays no part."""
    out = torch.empty(targets.numel(), dtype=compute_dtype(logits.dtype), device=logits.device)
    if targets.numel() == 0:
        return out
    with device_guard(logits):
        min_p_kernel[(targets.numel(),)](
            logits, targets, out, logits.shape[-1], logits.shape[1], logits.stride(0), logits.stride(1),
            logits.stride(2), transform.ignore_index, math.log2(min_p), transform.exponent_scale,
            transform.logit_scale, transform.softcap or 1.0,
            HAS_SOFTCAP=bool(transform.softcap), ALIGNED=is_aligned(logits), VEC=vector_width(logits), BLOCK=_BLOCK,
            COMPUTE=triton_dtype(logits.dtype), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
