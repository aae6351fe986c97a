"""The gradient of the logits from the statistics and the two coefficients of a row: one read and one write."""

import triton
import triton.language as tl
from torch import Tensor

from ...core.transform import Transform
from .launch import device_guard, is_aligned, triton_dtype, vector_width
from .math import LN2, clamp_min, exponent_floor, load_capped, softcap_slope
from .rows import RUN_TIME, exponent_scale_of, row_offset

# Bytes of a row that one program writes.
_GRADIENT_BYTES = 16384
_GRADIENT_WARPS = 8


@triton.jit
def _load_coefficient(pointer, stride, row, COMPUTE: tl.constexpr):
    if pointer is None:
        return tl.full((), 0.0, COMPUTE)
    else:
        return tl.load(pointer + row * stride).to(COMPUTE)


@triton.jit(do_not_specialize=RUN_TIME)
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
    out = grad_ptr + row_offset(row32, rows_per_batch, grad_batch_stride, grad_row_stride, ALIGNED, VEC)
    out += start * grad_column_stride + offsets * grad_column_stride

    target = tl.load(targets_ptr + row).to(tl.int64)
    grad_logp = _load_coefficient(grad_logp_ptr, grad_logp_stride, row, COMPUTE)
    grad_entropy = _load_coefficient(grad_entropy_ptr, grad_entropy_stride, row, COMPUTE)
    if (target == ignore_index) | ((grad_logp == 0.0) & (grad_entropy == 0.0)):
        tl.store(out, tl.zeros((BLOCK,), COMPUTE).to(grad_ptr.dtype.element_ty), mask=mask)
    else:
        k = exponent_scale_of(exponent_scale, temperature_ptr, temperature_stride, row, COMPUTE)
        cap = tl.full((), softcap, COMPUTE)
        base = logits_ptr + row_offset(row32, rows_per_batch, batch_stride, row_stride, ALIGNED, VEC)
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


def write_gradient(
    out: Tensor, logits: Tensor, targets: Tensor, shift: Tensor, log_sum: Tensor, entropy: Tensor,
    grad_logp: Tensor | None, grad_entropy: Tensor | None, transform: Transform, first_column: int = 0,
) -> None:  # fmt: skip
    """Writes dL/dz of logits [batch, rows, columns] into `out`, possibly the logits themselves.

    grad_logp, grad_entropy: the incoming gradients [N]; either may be absent. A row where both are 0 becomes 0.
    """
    rows, columns = targets.numel(), logits.shape[-1]
    if rows == 0:
        return
    block = _GRADIENT_BYTES // logits.element_size()
    with device_guard(logits):
        logits_gradient_kernel[(rows, triton.cdiv(columns, block))](
            logits, targets, transform.temperature, shift, log_sum, entropy, grad_logp, grad_entropy, out,
            columns, logits.shape[1], logits.stride(0), logits.stride(1), logits.stride(2),
            out.stride(0), out.stride(1), out.stride(2), transform.temperature_stride,
            0 if grad_logp is None else grad_logp.stride(0), 0 if grad_entropy is None else grad_entropy.stride(0),
            transform.ignore_index, transform.exponent_scale, transform.logit_scale, transform.softcap or 1.0,
            first_column,
            HAS_SOFTCAP=bool(transform.softcap), ALIGNED=is_aligned(logits, out), VEC=vector_width(logits),
            BLOCK=block, COMPUTE=triton_dtype(logits.dtype), num_warps=_GRADIENT_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
