"""Multiplies a gradient that was formed in forward by the incoming one, which is read on the device."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard, processors

_BLOCK = 4096
_WARPS = 8
_PROGRAMS_PER_PROCESSOR = 4


@triton.jit(do_not_specialize=["n_elements", "blocks_per_program", "row_length", "row_stride"])
def scale_kernel(
    gradient_ptr, factor_ptr, out_ptr, n_elements: tl.int64, blocks_per_program: tl.int64, row_length: tl.int64,
    row_stride: tl.int64, SAME: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """out = factor * gradient in out's dtype, rounded once. SAME: in place, where a factor of 1 leaves at once."""
    factor = tl.load(factor_ptr).to(COMPUTE)
    if SAME and factor == 1.0:
        return
    begin = tl.program_id(0).to(tl.int64) * blocks_per_program * BLOCK
    for first in range(begin, begin + blocks_per_program * BLOCK, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < n_elements
        if not DENSE:
            at = at // row_length * row_stride + at % row_length
        value = tl.load(gradient_ptr + at, mask=inside).to(COMPUTE) * factor
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


def _dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without a gap, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def scale(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = factor * gradient, factor 0-d; `out` may be the gradient itself, which a factor of 1 leaves untouched."""
    if gradient.numel() == 0:
        return
    same = out.data_ptr() == gradient.data_ptr() and out.dtype == gradient.dtype
    if not (_dense(gradient) and _dense(out) and out.stride() == gradient.stride()):
        # Of other layouts only the logits' own in-place gradient comes here: rows of some batch, some distance apart.
        _scale_rows(gradient, factor, out, same)
        return
    _launch(gradient, factor, out, gradient.numel(), 1, 1, same, True)


def _scale_rows(gradient: Tensor, factor: Tensor, out: Tensor, same: bool) -> None:
    if gradient.ndim > 2:
        for part, part_out in zip(gradient, out, strict=True):
            scale(part, factor, part_out)
        return
    if gradient.ndim == 2 and gradient.stride(1) == 1 and gradient.stride() == out.stride():
        _launch(gradient, factor, out, gradient.numel(), gradient.shape[1], gradient.stride(0), same, False)
        return
    out.copy_(gradient * factor)


def _launch(
    gradient: Tensor, factor: Tensor, out: Tensor, count: int, length: int, stride: int, same: bool, dense: bool
) -> None:
    blocks = triton.cdiv(count, _BLOCK)
    # Few programs: where there is nothing to scale they cost no more than an empty launch.
    programs = min(blocks, _PROGRAMS_PER_PROCESSOR * processors(gradient.device))
    each = triton.cdiv(blocks, programs)
    compute = tl.float64 if gradient.element_size() == 8 else tl.float32
    with device_guard(gradient):
        scale_kernel[(triton.cdiv(blocks, each),)](
            gradient, factor, out, count, each, length, stride, SAME=same, DENSE=dense, BLOCK=_BLOCK, COMPUTE=compute,
            num_warps=_WARPS,
        )  # fmt: skip
