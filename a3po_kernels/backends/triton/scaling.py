"""Multiplies a gradient that was formed in forward by the incoming one, which is read on the device."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard, processors, triton_dtype

_BLOCK = 4096
_WARPS = 8
_PROGRAMS_PER_PROCESSOR = 4


@triton.jit
def _scale_block(
    gradient_ptr, out_ptr, first, end, factor, columns, rows, batch_stride, row_stride, column_stride,
    MASKED: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    at = tl.multiple_of(first, BLOCK) + tl.arange(0, BLOCK)
    inside = at < end
    if not DENSE:
        row = at // columns
        batch = row // rows
        at = batch * batch_stride + (row - batch * rows) * row_stride + (at - row * columns) * column_stride
    if MASKED:
        value = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(COMPUTE) * factor
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        value = tl.load(gradient_ptr + at).to(COMPUTE) * factor
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=[
    "n_elements", "blocks_per_program", "columns", "rows", "batch_stride", "row_stride", "column_stride",
])  # fmt: skip
def scale_kernel(
    gradient_ptr, factor_ptr, out_ptr, n_elements: tl.int64, blocks_per_program: tl.int64, columns: tl.int64,
    rows: tl.int64, batch_stride: tl.int64, row_stride: tl.int64, column_stride: tl.int64,
    SAME: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """out = factor * gradient in out's dtype, rounded once. SAME: in place, where a factor of 1 leaves at once."""
    factor = tl.load(factor_ptr).to(COMPUTE)
    if SAME and factor == 1.0:
        return
    begin = tl.program_id(0).to(tl.int64) * blocks_per_program * BLOCK
    end = tl.minimum(begin + blocks_per_program * BLOCK, n_elements)
    whole = begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK
    for first in range(begin, whole, BLOCK):
        _scale_block(
            gradient_ptr, out_ptr, first, end, factor, columns, rows, batch_stride, row_stride, column_stride, False,
            DENSE, BLOCK, COMPUTE,
        )  # fmt: skip
    for first in range(whole, end, BLOCK):
        _scale_block(
            gradient_ptr, out_ptr, first, end, factor, columns, rows, batch_stride, row_stride, column_stride, True,
            DENSE, BLOCK, COMPUTE,
        )  # fmt: skip


def _dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without a gap, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def scale(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = factor * gradient, factor 0-d; `out` may be the gradient itself, which a factor of 1 leaves untouched.

    Both have the same strides, or are at most three-dimensional and the same tensor.
    """
    count = gradient.numel()
    if count == 0:
        return
    same = out.data_ptr() == gradient.data_ptr() and out.dtype == gradient.dtype
    dense = _dense(gradient)
    assert gradient.stride() == out.stride() and (dense or gradient.ndim <= 3)
    shape, stride = gradient.shape, gradient.stride()
    rows = (shape[-1], shape[-2], stride[0], stride[-2], stride[-1]) if gradient.ndim > 1 else (count, 1, 0, 0, 1)
    blocks = triton.cdiv(count, _BLOCK)
    # Few programs: where there is nothing to scale they cost no more than an empty launch.
    each = triton.cdiv(blocks, min(blocks, _PROGRAMS_PER_PROCESSOR * processors(gradient.device)))
    with device_guard(gradient):
        scale_kernel[(triton.cdiv(blocks, each),)](
            gradient, factor, out, count, each, *rows, SAME=same, DENSE=dense, BLOCK=_BLOCK,
            COMPUTE=triton_dtype(gradient.dtype), num_warps=_WARPS,
        )  # fmt: skip
