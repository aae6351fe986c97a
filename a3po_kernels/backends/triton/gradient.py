"""The gradient of the logits from the statistics and the two coefficients of a row: one read and one write.

It is elementwise, so that a row off the 16-byte grid may be walked in blocks that lie on it: only the first and the
last block of a row are masked, and the blocks between have wide loads and stores.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...core.transform import Transform
from .launch import VOCABULARY_OPTIONS, device_guard, is_aligned, processors, registers, row_arguments, triton_dtype
from .math import LN2, clamp_min, exponent_floor, softcap_slope, softcapped
from .statistics import RUN_TIME
from .tiles import exponent_scale_of, misalignment, row_pointer

# Bytes of a row that are in flight at a time, and the warps that hold them: measured on an H200.
_BLOCK_BYTES = 4096
_WARPS = 4
_REGISTERS = 64
# Below this many rows a processor a program writes one block.
_FEW_ROWS = 8


@triton.jit
def window(pointer, LOADS: tl.constexpr):
    """(the last 16-byte boundary before a row, elements between): where its blocks begin."""
    if LOADS == "shifted":
        skip = misalignment(pointer).to(tl.int32)
        return pointer - skip, skip
    else:
        return pointer, 0


@triton.jit
def column_of(target, n_columns):
    """A target as a 32-bit column, -1 where it is none."""
    return tl.where((target >= 0) & (target < n_columns), target, -1).to(tl.int32)


@triton.jit
def _at(start, first, stride, LOADS: tl.constexpr, BLOCK: tl.constexpr):
    if LOADS == "strided":
        return start + (first + tl.arange(0, BLOCK)).to(tl.int64) * stride
    else:
        return tl.multiple_of(start + first, 16) + tl.arange(0, BLOCK)


@triton.jit
def _store(
    out, first, skip, n_columns, stride, values, MASKED: tl.constexpr, LOADS: tl.constexpr, BLOCK: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    values = values.to(out.dtype.element_ty)
    if MASKED:
        columns = first + tl.arange(0, BLOCK) - skip
        inside = (columns >= 0) & (columns < n_columns)
        tl.store(_at(out, first, stride, LOADS, BLOCK), values, mask=inside, eviction_policy=KEEP)
    else:
        tl.store(_at(out, first, stride, LOADS, BLOCK), values, eviction_policy=KEEP)


@triton.jit
def _gradient(
    u, k, shift, constant, factor, cap, HAS_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """dL/dz where the target is not: 2^t (constant + factor t), with t = k u - shift, through the softcap."""
    zero = tl.zeros_like(u)
    t = tl.fma(u, zero + k, zero - shift)
    if HAS_ENTROPY:
        t = clamp_min(t, exponent_floor(COMPUTE))
        grad = tl.exp2(t) * tl.fma(t, zero + factor, zero + constant)
    else:
        grad = tl.exp2(t) * constant
    if HAS_SOFTCAP:
        grad = grad * softcap_slope(u, cap)
    return grad


@triton.jit
def _write_block(
    logits, out, first, skip, n_columns, column_stride, out_column_stride, k, shift, constant, factor, scale, cap,
    MASKED: tl.constexpr, LOADS: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    pointers = _at(logits, first, column_stride, LOADS, BLOCK)
    if MASKED:
        columns = first + tl.arange(0, BLOCK) - skip
        inside = (columns >= 0) & (columns < n_columns)
        u = tl.load(pointers, mask=inside, other=0.0, eviction_policy=KEEP).to(COMPUTE)
    else:
        u = tl.load(pointers, eviction_policy=KEEP).to(COMPUTE)
    if HAS_SOFTCAP:
        u = softcapped(u * scale, cap, COMPUTE)
    grad = _gradient(u, k, shift, constant, factor, cap, HAS_ENTROPY, HAS_SOFTCAP, COMPUTE)
    _store(out, first, skip, n_columns, out_column_stride, grad, MASKED, LOADS, BLOCK, KEEP)


@triton.jit
def write_row(
    logits, out, skip, begin, end, n_columns, column_stride, out_column_stride, target, k, shift, log_sum, entropy,
    d_logp, d_entropy, scale, cap, LOADS: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Writes the blocks [begin, end) of a row's gradient; zeros, with nothing read, where both coefficients are 0.

    From the last to the first: what was read last may still be in the cache. logits, out: the row's window; skip: the
    row begins so many elements after it; target: int32, its column. d_logp, d_entropy: dL/dlogp and dL/dH.
    """
    complete = (n_columns + skip) // BLOCK  # the blocks before it end within the row
    inner = begin
    if LOADS == "shifted":
        inner = tl.maximum(begin, 1)  # the first block may begin before the row
    # The target's own column is written once more: comparing every column with it would cost a third of the time.
    place = target + skip
    mine = (target >= 0) & (place >= begin * BLOCK) & (place < end * BLOCK)
    at_target = tl.load(logits + place.to(tl.int64) * column_stride, mask=mine, other=0.0).to(COMPUTE)
    tl.debug_barrier()  # In place, all threads have read what they need before any of them writes there.
    idle = d_logp == 0.0
    if HAS_ENTROPY:
        idle = idle & (d_entropy == 0.0)
    if idle:
        zeros = tl.zeros((BLOCK,), COMPUTE)
        for block in range(begin, end):
            _store(out, block * BLOCK, skip, n_columns, out_column_stride, zeros, True, LOADS, BLOCK, KEEP)
    else:
        # d u / d z and d x / d u: k carries the temperature and, without a softcap, the logit scale too.
        slope = k * LN2
        if HAS_SOFTCAP:
            slope = slope * scale
        # Per row rather than per element: p = 2^t / sum, and log p + H = ln2 * (t - log2 sum) + H.
        weight = -slope * tl.exp2(-log_sum)
        constant = weight * d_logp
        factor = weight * 0.0
        if HAS_ENTROPY:
            constant = weight * tl.fma(d_entropy, tl.fma(log_sum * 0.0 - LN2, log_sum, entropy), d_logp)
            factor = weight * d_entropy * LN2
        if HAS_SOFTCAP:
            at_target = softcapped(at_target * scale, cap, COMPUTE)
        if (complete >= begin) & (complete < end):
            _write_block(
                logits, out, complete * BLOCK, skip, n_columns, column_stride, out_column_stride, k, shift, constant,
                factor, scale, cap, True, LOADS, HAS_ENTROPY, HAS_SOFTCAP, BLOCK, COMPUTE, KEEP,
            )  # fmt: skip
        stop = tl.minimum(end, complete)
        for i in range(inner, stop):
            _write_block(
                logits, out, (inner + stop - 1 - i) * BLOCK, skip, n_columns, column_stride, out_column_stride, k,
                shift, constant, factor, scale, cap, False, LOADS, HAS_ENTROPY, HAS_SOFTCAP, BLOCK, COMPUTE, KEEP,
            )  # fmt: skip
        for first in range(begin, tl.minimum(inner, complete)):
            _write_block(
                logits, out, first * BLOCK, skip, n_columns, column_stride, out_column_stride, k, shift, constant,
                factor, scale, cap, True, LOADS, HAS_ENTROPY, HAS_SOFTCAP, BLOCK, COMPUTE, KEEP,
            )  # fmt: skip
        tl.debug_barrier()  # The block that holds the target is written.
        one_hot = d_logp * slope
        if HAS_SOFTCAP:
            one_hot = one_hot * softcap_slope(at_target, cap)
        value = _gradient(at_target, k, shift, constant, factor, cap, HAS_ENTROPY, HAS_SOFTCAP, COMPUTE) + one_hot
        tl.store(out + place.to(tl.int64) * out_column_stride, value.to(out.dtype.element_ty), mask=mine)


@triton.jit
def _load_coefficient(pointer, stride, row, COMPUTE: tl.constexpr):
    if pointer is None:
        return tl.full((), 0.0, COMPUTE)
    else:
        return tl.load(pointer + row * stride).to(COMPUTE)


@triton.jit(do_not_specialize=[*RUN_TIME, "blocks", "blocks_per_program"])
def logits_gradient_kernel(
    logits_ptr, targets_ptr, temperature_ptr, shift_ptr, log_sum_ptr, entropy_ptr, grad_logp_ptr, grad_entropy_ptr,
    grad_ptr, n_columns, rows_per_batch: tl.int32, batch_stride: tl.int64, row_stride: tl.int64, column_stride,
    temperature_stride: tl.int64, ignore_index: tl.int64, exponent_scale: tl.float64, logit_scale: tl.float64,
    softcap: tl.float64, out_batch_stride: tl.int64, out_row_stride: tl.int64, out_column_stride,
    grad_logp_stride: tl.int64, grad_entropy_stride: tl.int64, first_column: tl.int64, blocks: tl.int32,
    blocks_per_program: tl.int32,
    HAS_SOFTCAP: tl.constexpr, LOADS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a row, or of some blocks of it. Grid (rows, ceil(blocks / blocks_per_program)).

    The logits are the columns from first_column on of a wider vocabulary.
    """
    row32 = tl.program_id(0)
    row = row32.to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    d_logp = _load_coefficient(grad_logp_ptr, grad_logp_stride, row, COMPUTE)
    d_entropy = _load_coefficient(grad_entropy_ptr, grad_entropy_stride, row, COMPUTE)
    k = exponent_scale_of(exponent_scale, temperature_ptr, temperature_stride, row, COMPUTE)
    shift = tl.load(shift_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    entropy = tl.load(entropy_ptr + row)
    ignored = target == ignore_index
    d_logp = tl.where(ignored, 0.0, d_logp)
    d_entropy = tl.where(ignored, 0.0, d_entropy)
    logits, skip = window(row_pointer(logits_ptr, row32, rows_per_batch, batch_stride, row_stride), LOADS)
    out, _out_skip = window(row_pointer(grad_ptr, row32, rows_per_batch, out_batch_stride, out_row_stride), LOADS)
    begin = tl.program_id(1) * blocks_per_program
    write_row(
        logits, out, skip, begin, tl.minimum(begin + blocks_per_program, blocks), n_columns, column_stride,
        out_column_stride, column_of(target - first_column, n_columns), k, shift, log_sum, entropy, d_logp, d_entropy,
        tl.full((), logit_scale, COMPUTE), tl.full((), softcap, COMPUTE), LOADS, grad_entropy_ptr is not None,
        HAS_SOFTCAP, BLOCK, COMPUTE, "",
    )  # fmt: skip


def gradient_loads(logits: Tensor, out: Tensor) -> str:
    """How the rows of logits and gradient [batch, rows, V] may be walked together: see tiles.load_tile."""
    if any(x.stride(2) != 1 and x.shape[2] > 1 for x in (logits, out)):
        return "strided"
    if is_aligned(logits, out):
        return "aligned"
    size = logits.element_size()
    apart = [logits.data_ptr() - out.data_ptr()]
    apart += [(logits.stride(dim) - out.stride(dim)) * size for dim in (0, 1) if logits.shape[dim] > 1]
    together = out.element_size() == size and all(step % 16 == 0 for step in apart)
    return "shifted" if together else "strided"


def blocks_of(columns: int, block: int, loads: str, itemsize: int) -> int:
    """Blocks of a row, whose window may begin before it."""
    return triton.cdiv(columns + (16 // itemsize - 1 if loads == "shifted" else 0), block)


def write_gradient(
    out: Tensor, logits: Tensor, targets: Tensor, shift: Tensor, log_sum: Tensor, entropy: Tensor,
    grad_logp: Tensor | None, grad_entropy: Tensor | None, transform: Transform, first_column: int = 0,
) -> None:  # fmt: skip
    """Writes dL/dz of logits [batch, rows, columns] into `out`, possibly the logits themselves."""
    rows, columns, size = targets.numel(), logits.shape[-1], logits.element_size()
    loads, block = gradient_loads(logits, out), _BLOCK_BYTES // size
    blocks = blocks_of(columns, block, loads, size)
    each = 1 if rows <= _FEW_ROWS * processors(logits.device) else blocks
    with device_guard(logits):
        logits_gradient_kernel[(rows, triton.cdiv(blocks, each))](
            logits, targets, transform.temperature, shift, log_sum, entropy, grad_logp, grad_entropy, out,
            columns, *row_arguments(logits, transform), out.stride(0), out.stride(1), out.stride(2),
            0 if grad_logp is None else grad_logp.stride(0), 0 if grad_entropy is None else grad_entropy.stride(0),
            first_column, blocks, each,
            HAS_SOFTCAP=bool(transform.softcap), LOADS=loads, BLOCK=block, COMPUTE=triton_dtype(logits.dtype),
            num_warps=_WARPS, **VOCABULARY_OPTIONS, **registers(_REGISTERS),
        )  # fmt: skip
