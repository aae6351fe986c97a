"""Softmax statistics of the rows of logits: one read of each.

Exponents are in base 2: with u the capped logit and k = log2(e) / temperature (times the logit scale
where no softcap stands between), y = k * u and p = 2^(y - shift) / sum.
The pair (shift, log2 sum) is kept rather than their sum, which would cost p its low digits when logits are large.

One program walks a row: each lane folds its own columns, and at the end the lanes are merged in pairs. The lanes depend
on the vocabulary and the dtype alone, and no sum depends on a layout (see tiles.py), so that the bits of a row depend
on nothing but what it holds. Programs that take a part of a row each were slower on an H200 from 8 rows on.
Every product that is added is written as an fma, since what a compiler fuses may differ from kernel to kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.transform import Transform
from .launch import (
    VOCABULARY_OPTIONS,
    device_guard,
    is_even,
    loads_of,
    registers,
    row_arguments,
    triton_dtype,
)
from .math import LN2, LOWEST, clamp_min, exponent_floor, merge_statistics, softcapped
from .tiles import exponent_scale_of, lane_max, lane_sum, load_tile, pair_sums, per_lane, row_pointer

_LANES_PER_THREAD = 2
# A row of many bytes takes more lanes: fewer rows are then under way at a time, and the second read of one finds it in
# the cache (one_launch.py). Tiles on their way and registers as measured on an H200.
_LONG_ROW, _SHORT_ROW = 128 << 10, 16 << 10
_UNROLL = {1024: 1, 512: 2, 128: 2}
_REGISTERS = {1024: 40, 512: 48, 128: 64}
MERGED_ROWS = 128
# Run-time values of a step: none of them may make a new kernel.
RUN_TIME = [
    "n_rows", "rows_per_batch", "batch_stride", "row_stride", "out_batch_stride", "out_row_stride",
    "temperature_stride", "ignore_index", "first_column", "state_stride", "grad_logp_stride", "grad_entropy_stride",
    "n_parts",
]  # fmt: skip


def lanes_of(columns: int, itemsize: int) -> int:
    """Lanes of a row's statistics: a function of the vocabulary and the dtype, for the bits follow from it."""
    size = columns * itemsize
    return 1024 if size > _LONG_ROW else 512 if size > _SHORT_ROW else 128


@triton.jit
def _fold(m, total, dot, u, k, COMPUTE: tl.constexpr):
    """Folds a tile into the running statistics of each lane: no barrier, no shuffle in the loop."""
    m_new = tl.maximum(m, k * lane_max(u))
    zero = tl.zeros_like(u)
    t = clamp_min(tl.fma(u, zero + k, zero - per_lane(m_new, u)), exponent_floor(COMPUTE))
    e = tl.exp2(t)
    move = m - m_new
    scale = tl.exp2(move)
    dot = tl.fma(scale, tl.fma(move, total, dot), lane_sum(e * t))
    total = tl.fma(scale, total, lane_sum(e))
    return m_new, total, dot


@triton.jit
def merge_lanes(m, total, dot):
    """Scalars (shift, sum, dot) of all lanes."""
    shift = tl.max(m, axis=0)
    move = m - shift
    weight = tl.exp2(move)
    total, dot = pair_sums(weight * total, weight * tl.fma(move, total, dot))
    return shift, total, dot


@triton.jit
def row_statistics(
    base, stop, column_stride, k, scale, cap,
    LOADS: tl.constexpr, EVEN: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    COMPUTE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """(shift, sum, dot) of a row of `stop` columns. UNROLL: tiles on their way at a time, 1 or 2."""
    m = tl.full((LANES,), LOWEST, COMPUTE)
    total = tl.zeros((LANES,), COMPUTE)
    dot = tl.zeros((LANES,), COMPUTE)
    vector: tl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth
    tile: tl.constexpr = LANES * vector
    # A shifted tile reads one vector more than it holds: the row must go on behind it.
    behind: tl.constexpr = vector if LOADS == "shifted" else 0
    step: tl.constexpr = UNROLL * tile
    whole = tl.maximum(stop - behind, 0) // step * step
    for first in range(0, whole, step):
        u = load_tile(
            base, first, stop, column_stride, scale, cap, False, LOADS, EVEN, HAS_SOFTCAP, LANES, COMPUTE, KEEP
        )
        if UNROLL == 2:
            v = load_tile(
                base, first + tile, stop, column_stride, scale, cap, False, LOADS, EVEN, HAS_SOFTCAP, LANES, COMPUTE,
                KEEP,
            )  # fmt: skip
        m, total, dot = _fold(m, total, dot, u, k, COMPUTE)
        if UNROLL == 2:
            m, total, dot = _fold(m, total, dot, v, k, COMPUTE)
    for first in range(whole, stop, tile):
        u = load_tile(
            base, first, stop, column_stride, scale, cap, True, LOADS, EVEN, HAS_SOFTCAP, LANES, COMPUTE, KEEP
        )
        m, total, dot = _fold(m, total, dot, u, k, COMPUTE)
    return merge_lanes(m, total, dot)


@triton.jit
def row_results(shift, total, dot, target_u, k):
    """(logp, entropy, log2 sum) from merged statistics and the target's capped logit, NaN where that is unknown."""
    # Nothing but -inf in the row: no distribution.
    total = tl.where(total == 0.0, float("nan"), total)
    log_sum = tl.log2(total)
    # The shift is rounded, so the largest exponent may pass 0.
    logp = tl.minimum((tl.fma(target_u, k, -shift) - log_sum) * LN2, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return logp, clamp_min((log_sum - dot / total) * LN2, 0.0), log_sum


@triton.jit
def load_target(base, local, n_columns, column_stride, scale, cap, HAS_SOFTCAP: tl.constexpr, COMPUTE: tl.constexpr):
    """The capped logit of a row's target, NaN where it is not among these columns."""
    known = (local >= 0) & (local < n_columns)
    z = tl.load(base + local * column_stride, mask=known, other=float("nan")).to(COMPUTE)
    if HAS_SOFTCAP:
        z = softcapped(z * scale, cap, COMPUTE)
    return z


@triton.jit
def _finish(
    base, target, state_ptr, shift, total, dot, logp_ptr, entropy_ptr, shift_ptr, log_sum_ptr, row, n_columns,
    column_stride, k, scale, cap, first_column, state_stride,
    HAS_SOFTCAP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Joins a row's statistics with those of the columns before, and stores the results or the state."""
    target_u = load_target(base, target - first_column, n_columns, column_stride, scale, cap, HAS_SOFTCAP, COMPUTE)
    if not (FIRST and LAST):
        state = state_ptr + row
    if not FIRST:
        shift, total, dot = merge_statistics(
            tl.load(state), tl.load(state + state_stride), tl.load(state + 2 * state_stride), shift, total, dot
        )
        before = tl.load(state + 3 * state_stride)
        target_u = tl.where(before == before, before, target_u)
    if LAST:
        logp, entropy, log_sum = row_results(shift, total, dot, target_u, k)
        tl.store(logp_ptr + row, logp)
        tl.store(entropy_ptr + row, entropy)
        tl.store(shift_ptr + row, shift)
        tl.store(log_sum_ptr + row, log_sum)
    else:
        tl.store(state, shift)
        tl.store(state + state_stride, total)
        tl.store(state + 2 * state_stride, dot)
        tl.store(state + 3 * state_stride, target_u)


@triton.jit
def store_zeros(a_ptr, b_ptr, c_ptr, d_ptr, row):
    tl.store(a_ptr + row, 0.0)
    tl.store(b_ptr + row, 0.0)
    tl.store(c_ptr + row, 0.0)
    tl.store(d_ptr + row, 0.0)


@triton.jit(do_not_specialize=RUN_TIME)
def row_statistics_kernel(
    logits_ptr, targets_ptr, temperature_ptr, state_ptr, logp_ptr, entropy_ptr, shift_ptr, log_sum_ptr,
    n_columns, rows_per_batch: tl.int32, batch_stride: tl.int64, row_stride: tl.int64, column_stride,
    temperature_stride: tl.int64, ignore_index: tl.int64, exponent_scale: tl.float64, logit_scale: tl.float64,
    softcap: tl.float64, first_column: tl.int64, state_stride: tl.int64,
    HAS_SOFTCAP: tl.constexpr, LOADS: tl.constexpr, EVEN: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Statistics of a row. Grid (rows,). The logits are the columns from first_column on of a wider vocabulary.

    What was found before them is read from the state [4, rows] (shift, sum, dot, target's capped logit) unless FIRST;
    LAST writes the results, else the state.
    """
    row32 = tl.program_id(0)
    row = row32.to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    if target == ignore_index:
        if LAST:
            store_zeros(logp_ptr, entropy_ptr, shift_ptr, log_sum_ptr, row)
        return
    k = exponent_scale_of(exponent_scale, temperature_ptr, temperature_stride, row, COMPUTE)
    scale = tl.full((), logit_scale, COMPUTE)
    cap = tl.full((), softcap, COMPUTE)
    base = row_pointer(logits_ptr, row32, rows_per_batch, batch_stride, row_stride)
    shift, total, dot = row_statistics(
        base, n_columns, column_stride, k, scale, cap, LOADS, EVEN, HAS_SOFTCAP, LANES, UNROLL, COMPUTE, ""
    )
    _finish(
        base, target, state_ptr, shift, total, dot, logp_ptr, entropy_ptr, shift_ptr, log_sum_ptr, row, n_columns,
        column_stride, k, scale, cap, first_column, state_stride, HAS_SOFTCAP, FIRST, LAST, COMPUTE,
    )  # fmt: skip


def empty_shift(dtype: torch.dtype) -> float:
    """Where a row's largest exponent starts."""
    return LOWEST.value


def fold_statistics(
    logits: Tensor, targets: Tensor, transform: Transform, results: tuple[Tensor, ...], *, first_column: int = 0,
    vocabulary: int | None = None, first: bool = True, last: bool = True, state: Tensor | None = None,
) -> None:  # fmt: skip
    """Folds logits [batch, rows, columns] into the rows' statistics; see ops.token_logprobs."""
    # Of the whole vocabulary, not of the tile: how that is cut depends on the number of rows.
    lanes = lanes_of(vocabulary or logits.shape[-1], logits.element_size())
    loads = loads_of(logits)
    most = registers_of(lanes, logits.element_size(), bool(transform.softcap), loads)
    with device_guard(logits):
        row_statistics_kernel[(targets.numel(),)](
            logits, targets, transform.temperature, state, *results, logits.shape[-1],
            *row_arguments(logits, transform), first_column, 0 if state is None else state.stride(0),
            HAS_SOFTCAP=bool(transform.softcap), LOADS=loads, EVEN=is_even(logits), LANES=lanes,
            UNROLL=_UNROLL[lanes], FIRST=first, LAST=last, COMPUTE=triton_dtype(logits.dtype),
            num_warps=warps_of(lanes), **VOCABULARY_OPTIONS, **registers(most),
        )  # fmt: skip


@triton.jit
def block_of_rows(targets_ptr, n_rows, ignore_index, BLOCK: tl.constexpr):
    """(numbers of this program's rows, whether they are there, whether they are computed)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = row < n_rows
    target = tl.load(targets_ptr + row, mask=here, other=ignore_index).to(tl.int64)
    return row, here, here & (target != ignore_index)


@triton.jit(do_not_specialize=RUN_TIME)
def merge_parts_kernel(
    states_ptr, targets_ptr, temperature_ptr, logp_ptr, entropy_ptr, shift_ptr, log_sum_ptr, n_rows, n_parts,
    temperature_stride: tl.int64, ignore_index: tl.int64, exponent_scale: tl.float64,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Merges the states [parts, 4, rows] of a vocabulary's parts, in their order. Grid (blocks of rows,)."""
    row, here, active = block_of_rows(targets_ptr, n_rows, ignore_index, BLOCK)
    k = tl.full((BLOCK,), exponent_scale, COMPUTE)
    if temperature_ptr is not None:
        k = k / tl.load(temperature_ptr + row * temperature_stride, mask=active, other=1.0).to(COMPUTE)
    stride = n_rows.to(tl.int64)
    shift = tl.full((BLOCK,), LOWEST, COMPUTE)
    total = tl.zeros((BLOCK,), COMPUTE)
    dot = tl.zeros((BLOCK,), COMPUTE)
    target_u = tl.full((BLOCK,), float("nan"), COMPUTE)
    for part in range(n_parts):
        state = states_ptr + part * 4 * stride + row
        shift, total, dot = merge_statistics(
            shift, total, dot, tl.load(state, mask=active, other=LOWEST),
            tl.load(state + stride, mask=active, other=0.0), tl.load(state + 2 * stride, mask=active, other=0.0),
        )  # fmt: skip
        found = tl.load(state + 3 * stride, mask=active, other=float("nan"))
        target_u = tl.where(target_u == target_u, target_u, found)
    logp, entropy, log_sum = row_results(shift, total, dot, target_u, k)
    tl.store(logp_ptr + row, tl.where(active, logp, 0.0), mask=here)
    tl.store(entropy_ptr + row, tl.where(active, entropy, 0.0), mask=here)
    tl.store(shift_ptr + row, tl.where(active, shift, 0.0), mask=here)
    tl.store(log_sum_ptr + row, tl.where(active, log_sum, 0.0), mask=here)


def finish_statistics(states: Tensor, targets: Tensor, transform: Transform, results: tuple[Tensor, ...]) -> None:
    """Merges the states [parts, 4, N] of the parts of a vocabulary, in their order, and writes the rows' results."""
    with device_guard(targets):
        merge_parts_kernel[(triton.cdiv(targets.numel(), MERGED_ROWS),)](
            states, targets, transform.temperature, *results, targets.numel(), states.shape[0],
            transform.temperature_stride, transform.ignore_index, transform.exponent_scale,
            BLOCK=MERGED_ROWS, COMPUTE=triton_dtype(states.dtype), num_warps=4, **VOCABULARY_OPTIONS,
        )  # fmt: skip


def registers_of(lanes: int, itemsize: int, capped: bool, loads: str) -> int:
    """Arithmetic or addresses that need more registers are not worth a spill."""
    if itemsize == 8 or loads == "strided":
        return 128
    return 64 if capped or loads == "shifted" else _REGISTERS[lanes]


def warps_of(lanes: int) -> int:
    return lanes // (32 * _LANES_PER_THREAD)
