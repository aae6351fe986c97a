"""Triton kernels of the token statistics: softmax statistics of a row, the gradient of its logits, min-p log-probs.

Exponents are in base 2: with u the capped logit and k = log2(e) / temperature (times the logit scale
where no softcap stands between), y = k * u and p = 2^(y - shift) / sum.
The pair (shift, log2 sum) is kept rather than their sum, which would cost p its low digits when logits are large.
"""

import triton
import triton.language as tl

from ._math import LN2, LOWEST, clamp_min, exponent_floor, load_capped, merge_statistics, softcap_slope

# Run-time values of a step: none of them may make a new kernel. Alignment is the flag ALIGNED instead.
_RUN_TIME = [
    "n_rows", "rows_per_batch", "batch_stride", "row_stride", "grad_batch_stride", "grad_row_stride",
    "temperature_stride", "grad_logp_stride", "grad_entropy_stride", "ignore_index", "first_column", "state_stride",
]  # fmt: skip


@triton.jit
def _row_offset(row, rows_per_batch, batch_stride, row_stride, ALIGNED: tl.constexpr, VEC: tl.constexpr):
    """Offset of a row of logits [batch, rows_per_batch, columns], in 64 bits; the division needs only 32."""
    batch = row // rows_per_batch
    offset = batch.to(tl.int64) * batch_stride + (row - batch * rows_per_batch).to(tl.int64) * row_stride
    if ALIGNED:
        offset = tl.multiple_of(offset, VEC)
    return offset


@triton.jit
def _exponent_scale(exponent_scale, temperature_ptr, temperature_stride, row, COMPUTE: tl.constexpr):
    """k with y = k * u; a temperature tensor divides what the host knows of it."""
    k = tl.full((), exponent_scale, COMPUTE)
    if temperature_ptr is not None:
        k = k / tl.load(temperature_ptr + row.to(tl.int64) * temperature_stride).to(COMPUTE)
    return k


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


@triton.jit(do_not_specialize=_RUN_TIME)
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
    k = _exponent_scale(exponent_scale, temperature_ptr, temperature_stride, row, COMPUTE)
    scale = tl.full((), logit_scale, COMPUTE)
    cap = tl.full((), softcap, COMPUTE)
    start = split * SPLIT
    stop = tl.minimum(start + SPLIT, n_columns)
    base = logits_ptr + _row_offset(row32, rows_per_batch, batch_stride, row_stride, ALIGNED, VEC)
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


@triton.jit(do_not_specialize=_RUN_TIME)
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


@triton.jit
def _load_coefficient(pointer, stride, row, COMPUTE: tl.constexpr):
    if pointer is None:
        return tl.full((), 0.0, COMPUTE)
    else:
        return tl.load(pointer + row * stride).to(COMPUTE)


@triton.jit(do_not_specialize=_RUN_TIME)
def logits_gradient_kernel(
    logits_ptr, targets_ptr, temperature_ptr, shift_ptr, log_sum_ptr, entropy_ptr, grad_logp_ptr, grad_entropy_ptr,
    grad_ptr, n_columns, rows_per_batch: tl.int32, batch_stride: tl.int64, row_stride: tl.int64, column_stride,
    grad_batch_stride: tl.int64, grad_row_stride: tl.int64, grad_column_stride, temperature_stride: tl.int64,
    grad_logp_stride: tl.int64, grad_entropy_stride: tl.int64, ignore_index: tl.int64,
    exponent_scale: tl.float64, logit_scale: tl.float64, softcap: tl.float64, first_column: tl.int64,
    HAS_SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dL/dz of BLOCK columns of one row. Grid (rows, ceil(columns / BLOCK)); grad may be the logits themselves.

    The logits are the columns from first_column on of the vocabulary that the targets count. A row whose coefficients
    are both zero is written without being read.
    """
    row32 = tl.program_id(0)
    row = row32.to(tl.int64)
    first = tl.program_id(1) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    mask = columns < n_columns
    offsets = tl.arange(0, BLOCK).to(tl.int64)
    start = tl.cast(first, tl.int64)
    out = grad_ptr + _row_offset(row32, rows_per_batch, grad_batch_stride, grad_row_stride, ALIGNED, VEC)
    out += start * grad_column_stride + offsets * grad_column_stride

    target = tl.load(targets_ptr + row).to(tl.int64)
    grad_logp = _load_coefficient(grad_logp_ptr, grad_logp_stride, row, COMPUTE)
    grad_entropy = _load_coefficient(grad_entropy_ptr, grad_entropy_stride, row, COMPUTE)
    if (target == ignore_index) | ((grad_logp == 0.0) & (grad_entropy == 0.0)):
        tl.store(out, tl.zeros((BLOCK,), COMPUTE).to(grad_ptr.dtype.element_ty), mask=mask)
    else:
        k = _exponent_scale(exponent_scale, temperature_ptr, temperature_stride, row, COMPUTE)
        cap = tl.full((), softcap, COMPUTE)
        base = logits_ptr + _row_offset(row32, rows_per_batch, batch_stride, row_stride, ALIGNED, VEC)
        pointers = base + start * column_stride + offsets * column_stride
        u = load_capped(pointers, mask, tl.full((), logit_scale, COMPUTE), cap, True, HAS_SOFTCAP, COMPUTE)
        t = tl.fma(u, tl.zeros_like(u) + k, tl.zeros_like(u) - tl.load(shift_ptr + row))
        # d u / d z and d x / d u: k carries the temperature and, without a softcap, the logit scale too.
        slope = k * LN2
        if HAS_SOFTCAP:
            slope = slope * tl.full((), logit_scale, COMPUTE)
        log_sum = tl.load(log_sum_ptr + row)
        # Per row rather than per element: p = 2^t / sum, and log p + H = ln2 * (t - log2 sum) + H.
        weight = -slope * tl.exp2(-log_sum)
        if grad_entropy_ptr is None:
            grad = (weight * grad_logp) * tl.exp2(t)
        else:
            t = clamp_min(t, exponent_floor(COMPUTE))
            constant = weight * (grad_logp + grad_entropy * (tl.load(entropy_ptr + row) - LN2 * log_sum))
            grad = tl.exp2(t) * tl.fma(t, tl.zeros_like(t) + weight * grad_entropy * LN2, tl.zeros_like(t) + constant)
        grad = tl.where(columns == target - first_column, grad + grad_logp * slope, grad)
        if HAS_SOFTCAP:
            grad = grad * softcap_slope(u, cap)
        tl.store(out, grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_RUN_TIME)
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
    base = logits_ptr + _row_offset(row32, rows_per_batch, batch_stride, row_stride, ALIGNED, VEC)
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
