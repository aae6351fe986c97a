"""Softmax statistics of the rows of logits: one read of each.

Exponents are in base 2: with u the capped logit and k = log2(e) / temperature (times the logit scale
where no softcap stands between), y = k * u and p = 2^(y - shift) / sum.
The pair (shift, log2 sum) is kept rather than their sum, which would cost p its low digits when logits are large.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.transform import Transform
from .launch import device_guard, is_aligned, triton_dtype, vector_width
from .math import LN2, LOWEST, clamp_min, exponent_floor, load_capped, merge_statistics
from .rows import RUN_TIME, exponent_scale_of, row_offset

# Columns of one program: a function of nothing but this constant and V, for batch invariance.
SPLIT = 32768
_LANES = 256
_WARPS = 4
_CAPPED_LANES = 128 if torch.version.hip is None else 256  # tanh needs registers; an AMD warp has 64 threads
_FINISH_ROWS = 128


@triton.jit
def _exponents(u, k, shift, COMPUTE: tl.constexpr):
    """t = k * u - shift in one rounding, kept finite below so that 2^t * t is 0 where 2^t is."""
    t = tl.fma(u, tl.zeros_like(u) + k, tl.zeros_like(u) - shift)
    return clamp_min(t, exponent_floor(COMPUTE))


@triton.jit
def _fold(m, total, dot, u0, u1, k, COMPUTE: tl.constexpr):
    """Folds two [LANES, VEC] tiles into the running statistics of each lane: no barrier, no shuffle in the loop."""
    m_new = tl.maximum(m, k * tl.maximum(tl.max(u0, axis=1), tl.max(u1, axis=1)))
    t0 = _exponents(u0, k, m_new[:, None], COMPUTE)
    t1 = _exponents(u1, k, m_new[:, None], COMPUTE)
    e0 = tl.exp2(t0)
    e1 = tl.exp2(t1)
    move = m - m_new
    scale = tl.exp2(move)
    dot = scale * (dot + move * total) + tl.sum(e0 * t0 + e1 * t1, axis=1)
    total = scale * total + tl.sum(e0 + e1, axis=1)
    return m_new, total, dot


@triton.jit(do_not_specialize=RUN_TIME)
def partial_statistics_kernel(
    logits_ptr, targets_ptr, temperature_ptr, partial_ptr,
    n_rows: tl.int64, n_columns, rows_per_batch: tl.int32, batch_stride: tl.int64, row_stride: tl.int64, column_stride,
    temperature_stride: tl.int64, ignore_index: tl.int64,
    exponent_scale: tl.float64, logit_scale: tl.float64, softcap: tl.float64,
    HAS_SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, SPLIT: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Statistics of SPLIT columns of one row. Grid (rows, ceil(columns / SPLIT)); partial is [splits, 3, rows].

    The split depends on the vocabulary alone, so a row's bits do not depend on which rows share the batch.
    """
    row32 = tl.program_id(0)
    row = row32.to(tl.int64)
    split = tl.program_id(1)
    if tl.load(targets_ptr + row).to(tl.int64) == ignore_index:
        return
    k = exponent_scale_of(exponent_scale, temperature_ptr, temperature_stride, row, COMPUTE)
    scale = tl.full((), logit_scale, COMPUTE)
    cap = tl.full((), softcap, COMPUTE)
    start = split * SPLIT
    stop = tl.minimum(start + SPLIT, n_columns)
    base = logits_ptr + row_offset(row32, rows_per_batch, batch_stride, row_stride, ALIGNED, VEC)
    half: tl.constexpr = LANES * VEC
    columns = (tl.arange(0, LANES) * VEC)[:, None] + tl.arange(0, VEC)[None, :]
    offsets = columns.to(tl.int64) * column_stride
    second = tl.cast(half, tl.int64) * column_stride

    m = tl.full((LANES,), LOWEST, COMPUTE)
    total = tl.zeros((LANES,), COMPUTE)
    dot = tl.zeros((LANES,), COMPUTE)
    whole = start + (stop - start) // (2 * half) * (2 * half)
    for first in range(start, whole, 2 * half):
        pointers = base + tl.cast(first, tl.int64) * column_stride + offsets
        u0 = load_capped(pointers, None, scale, cap, False, HAS_SOFTCAP, COMPUTE)
        u1 = load_capped(pointers + second, None, scale, cap, False, HAS_SOFTCAP, COMPUTE)
        m, total, dot = _fold(m, total, dot, u0, u1, k, COMPUTE)
    if whole < stop:
        pointers = base + whole.to(tl.int64) * column_stride + offsets
        u0 = load_capped(pointers, whole + columns < stop, scale, cap, True, HAS_SOFTCAP, COMPUTE)
        u1 = load_capped(pointers + second, whole + half + columns < stop, scale, cap, True, HAS_SOFTCAP, COMPUTE)
        m, total, dot = _fold(m, total, dot, u0, u1, k, COMPUTE)

    shift = tl.max(m, axis=0)
    move = m - shift
    weight = tl.exp2(move)
    out = partial_ptr + split * 3 * n_rows + row
    tl.store(out, shift)
    tl.store(out + n_rows, tl.sum(weight * total, axis=0))
    tl.store(out + 2 * n_rows, tl.sum(weight * (dot + move * total), axis=0))


@triton.jit(do_not_specialize=RUN_TIME)
def finish_statistics_kernel(
    logits_ptr, targets_ptr, temperature_ptr, partial_ptr, state_ptr, logp_ptr, entropy_ptr, shift_ptr, log_sum_ptr,
    n_rows: tl.int64, n_columns, rows_per_batch: tl.int32, batch_stride: tl.int64, row_stride: tl.int64, column_stride,
    temperature_stride: tl.int64, ignore_index: tl.int64,
    exponent_scale: tl.float64, logit_scale: tl.float64, softcap: tl.float64, first_column: tl.int64,
    state_stride: tl.int64,
    HAS_SOFTCAP: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Merges the parts of ROWS rows in the order of the vocabulary and reads their target logits.

    The logits are the columns from first_column on of a wider vocabulary. What was found before them is read from the
    state [4, rows] (shift, sum, dot, target's capped logit) unless FIRST; LAST writes the results, else the state.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n_rows
    targets = tl.load(targets_ptr + rows, mask=inside, other=0).to(tl.int64)
    active = inside & (targets != ignore_index)
    k = tl.full((ROWS,), exponent_scale, COMPUTE)
    if temperature_ptr is not None:
        k = k / tl.load(temperature_ptr + rows * temperature_stride, mask=active, other=1.0).to(COMPUTE)

    if not (FIRST and LAST):
        state = state_ptr + rows
    if FIRST:
        shift = tl.full((ROWS,), LOWEST, COMPUTE)
        total = tl.zeros((ROWS,), COMPUTE)
        dot = tl.zeros((ROWS,), COMPUTE)
        target = tl.full((ROWS,), float("nan"), COMPUTE)
    else:
        shift = tl.load(state, mask=active, other=LOWEST)
        total = tl.load(state + state_stride, mask=active, other=0.0)
        dot = tl.load(state + 2 * state_stride, mask=active, other=0.0)
        target = tl.load(state + 3 * state_stride, mask=active, other=0.0)
    for split in tl.static_range(SPLITS):
        part = partial_ptr + split * 3 * n_rows + rows
        part_shift = tl.load(part, mask=active, other=LOWEST)
        part_total = tl.load(part + n_rows, mask=active, other=0.0)
        part_dot = tl.load(part + 2 * n_rows, mask=active, other=0.0)
        shift, total, dot = merge_statistics(shift, total, dot, part_shift, part_total, part_dot)
    local = targets - first_column
    known = active & (local >= 0) & (local < n_columns)
    offset = (rows // rows_per_batch) * batch_stride + (rows % rows_per_batch) * row_stride + local * column_stride
    scale = tl.full((), logit_scale, COMPUTE)
    cap = tl.full((), softcap, COMPUTE)
    here = load_capped(logits_ptr + offset, known, scale, cap, True, HAS_SOFTCAP, COMPUTE)
    target = tl.where(known, here, target)
    if LAST:
        # Nothing but -inf in the row: no distribution.
        total = tl.where(total == 0.0, float("nan"), total)
        log_sum = tl.log2(total)
        # The shift is rounded, so the largest exponent may pass 0. NaN: a target outside the vocabulary.
        logp = tl.minimum((tl.fma(target, k, -shift) - log_sum) * LN2, 0.0, propagate_nan=tl.PropagateNan.ALL)
        entropy = clamp_min((log_sum - dot / total) * LN2, 0.0)
        tl.store(logp_ptr + rows, tl.where(active, logp, 0.0), mask=inside)
        tl.store(entropy_ptr + rows, tl.where(active, entropy, 0.0), mask=inside)
        tl.store(shift_ptr + rows, tl.where(active, shift, 0.0), mask=inside)
        tl.store(log_sum_ptr + rows, tl.where(active, log_sum, 0.0), mask=inside)
    else:
        tl.store(state, shift, mask=active)
        tl.store(state + state_stride, total, mask=active)
        tl.store(state + 2 * state_stride, dot, mask=active)
        tl.store(state + 3 * state_stride, target, mask=active)


def fold_statistics(
    logits: Tensor, targets: Tensor, transform: Transform, results: tuple[Tensor, ...],
    *, first_column: int = 0, first: bool = True, last: bool = True, state: Tensor | None = None,
) -> None:  # fmt: skip
    """Folds logits [batch, rows, columns], the columns from first_column on of a vocabulary, into the rows' statistics.

    The last of a vocabulary's tiles writes `results`, (logp, entropy, shift, log2_sum) [N]; tiles before it keep in
    state [4, N] what merges: shift, sum, dot and the target's capped logit. shift and log2_sum are the softmax
    statistics that the same backend's gradient reads.
    """
    rows, columns = targets.numel(), logits.shape[-1]
    if rows == 0:
        return
    splits = triton.cdiv(columns, SPLIT)
    partial = torch.empty((splits, 3, rows), dtype=results[0].dtype, device=logits.device)
    shared = (
        rows, columns, logits.shape[1], logits.stride(0), logits.stride(1), logits.stride(2),
        transform.temperature_stride, transform.ignore_index, transform.exponent_scale, transform.logit_scale,
        transform.softcap or 1.0,
    )  # fmt: skip
    capped, compute = bool(transform.softcap), triton_dtype(logits.dtype)
    with device_guard(logits):
        partial_statistics_kernel[(rows, splits)](
            logits, targets, transform.temperature, partial, *shared,
            HAS_SOFTCAP=capped, ALIGNED=is_aligned(logits), SPLIT=SPLIT, LANES=_CAPPED_LANES if capped else _LANES,
            VEC=vector_width(logits), COMPUTE=compute, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        finish_statistics_kernel[(triton.cdiv(rows, _FINISH_ROWS),)](
            logits, targets, transform.temperature, partial, state, *results, *shared, first_column,
            0 if state is None else state.stride(0),
            HAS_SOFTCAP=capped, SPLITS=splits, ROWS=_FINISH_ROWS, FIRST=first, LAST=last, COMPUTE=compute,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
