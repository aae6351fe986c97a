"""Device functions that find a row of logits and its transform."""

import triton
import triton.language as tl

# Run-time values of a step: none of them may make a new kernel. Alignment is the flag ALIGNED instead.
RUN_TIME = [
    "n_rows", "rows_per_batch", "batch_stride", "row_stride", "grad_batch_stride", "grad_row_stride",
    "temperature_stride", "grad_logp_stride", "grad_entropy_stride", "ignore_index", "first_column", "state_stride",
]  # fmt: skip


@triton.jit
def row_offset(row, rows_per_batch, batch_stride, row_stride, ALIGNED: tl.constexpr, VEC: tl.constexpr):
    """Offset of a row of logits [batch, rows_per_batch, columns], in 64 bits; the division needs only 32."""
    batch = row // rows_per_batch
    offset = batch.to(tl.int64) * batch_stride + (row - batch * rows_per_batch).to(tl.int64) * row_stride
    if ALIGNED:
        offset = tl.multiple_of(offset, VEC)
    return offset


@triton.jit
def exponent_scale_of(exponent_scale, temperature_ptr, temperature_stride, row, COMPUTE: tl.constexpr):
    """k with y = k * u; a temperature tensor divides what the host knows of it."""
    k = tl.full((), exponent_scale, COMPUTE)
    if temperature_ptr is not None:
        k = k / tl.load(temperature_ptr + row.to(tl.int64) * temperature_stride).to(COMPUTE)
    return k
