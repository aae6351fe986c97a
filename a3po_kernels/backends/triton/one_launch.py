"""Both stages of a row in one launch: statistics, its own coefficient, and the gradient while the row is in the cache.

Where a token's coefficient needs that token alone, a program reads its row, forms the coefficient by the formula of
policy_terms.loss_terms, and reads the row again from its end, which the L2 cache still holds: two passes over memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.forms import PolicyInputs, SurrogateForm
from ...core.transform import Transform
from .gradient import blocks_of, column_of, gradient_loads, window, write_row
from .launch import (
    VOCABULARY_OPTIONS,
    device_guard,
    is_even,
    loads_of,
    processors,
    registers,
    row_arguments,
    triton_dtype,
)
from .statistics import RUN_TIME, lanes_of, load_target, row_results, row_statistics, store_zeros
from .tiles import exponent_scale_of, row_pointer
from .token_loss import loss_terms

# Bytes of the gradient in flight for each lane, on the 16-byte grid and off it; measured on an H200.
_BLOCK_BYTES_PER_LANE = {"aligned": 32, "shifted": 16, "strided": 16}
_UNROLL = 2
# Of a thread: with 32 registers 2048 threads are on a processor, and one row's reads hide another's arithmetic. What
# needs more would spill in its loops.
_REGISTERS, _MORE_REGISTERS = 32, 64
_THREADS_OF_A_WARP = 32 if torch.version.hip is None else 64


@triton.jit
def _value(pointer, row, COMPUTE: tl.constexpr):
    if pointer is None:
        return tl.full((), 0.0, COMPUTE)
    else:
        return tl.load(pointer + row).to(COMPUTE)


@triton.jit
def _write_statistics(
    base, target, row, n_columns, column_stride, k, scale, cap, logp_ptr, entropy_ptr, shift_ptr, log_sum_ptr,
    HAS_SOFTCAP: tl.constexpr, LOADS: tl.constexpr, EVEN: tl.constexpr, LANES: tl.constexpr,
    UNROLL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(logp, entropy, shift, log2 sum) of a row, stored too."""
    shift, total, dot = row_statistics(
        base, n_columns, column_stride, k, scale, cap, LOADS, EVEN, HAS_SOFTCAP, LANES, UNROLL, COMPUTE,
        "evict_last",
    )  # fmt: skip
    target_u = load_target(base, target, n_columns, column_stride, scale, cap, HAS_SOFTCAP, COMPUTE)
    logp, entropy, log_sum = row_results(shift, total, dot, target_u, k)
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(shift_ptr + row, shift)
    tl.store(log_sum_ptr + row, log_sum)
    return logp, entropy, shift, log_sum


@triton.jit(do_not_specialize=[*RUN_TIME, "blocks"])
def one_launch_kernel(
    logits_ptr, targets_ptr, temperature_ptr, grad_ptr, logp_ptr, entropy_ptr, shift_ptr, log_sum_ptr,
    rollout_ptr, weights_ptr, advantages_ptr, old_ptr, reference_ptr, importance_ptr, scale_ptr,
    n_columns, rows_per_batch: tl.int32, batch_stride: tl.int64, row_stride: tl.int64, column_stride,
    temperature_stride: tl.int64, ignore_index: tl.int64, exponent_scale: tl.float64, logit_scale: tl.float64,
    softcap: tl.float64, out_batch_stride: tl.int64, out_row_stride: tl.int64, out_column_stride, blocks: tl.int32,
    low: tl.float64, high: tl.float64, dual_clip: tl.float64, delta: tl.float64, tau_positive: tl.float64,
    tau_negative: tl.float64, kl_coef: tl.float64, entropy_coef: tl.float64, beta: tl.float64,
    kl_clamp: tl.float64, log_ratio_coef: tl.float64, penalty: tl.float64,
    KIND: tl.constexpr, ESTIMATOR: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    LOADS: tl.constexpr, STORES: tl.constexpr, EVEN: tl.constexpr, LANES: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A row's statistics and gradient. Grid (rows,)."""
    row32 = tl.program_id(0)
    row = row32.to(tl.int64)
    base = row_pointer(logits_ptr, row32, rows_per_batch, batch_stride, row_stride)
    target = tl.load(targets_ptr + row).to(tl.int64)
    k = exponent_scale_of(exponent_scale, temperature_ptr, temperature_stride, row, COMPUTE)
    scale = tl.full((), logit_scale, COMPUTE)
    cap = tl.full((), softcap, COMPUTE)
    d_logp = tl.full((), 0.0, COMPUTE)
    d_entropy = tl.full((), 0.0, COMPUTE)
    entropy = tl.full((), 0.0, COMPUTE)
    log_sum = tl.full((), 0.0, COMPUTE)
    shift = tl.full((), 0.0, COMPUTE)
    if target == ignore_index:
        store_zeros(logp_ptr, entropy_ptr, shift_ptr, log_sum_ptr, row)
    else:
        logp, entropy, shift, log_sum = _write_statistics(
            base, target, row, n_columns, column_stride, k, scale, cap, logp_ptr, entropy_ptr, shift_ptr, log_sum_ptr,
            HAS_SOFTCAP, LOADS, EVEN, LANES, UNROLL, COMPUTE,
        )  # fmt: skip
        weight = tl.load(weights_ptr + row).to(COMPUTE)
        kept = weight != 0
        advantage = tl.load(advantages_ptr + row).to(COMPUTE) * weight
        divisor = tl.load(scale_ptr + tl.load(rollout_ptr + row)).to(COMPUTE)
        old = logp
        log_ratio = tl.where(logp != logp, logp, 0.0)
        if old_ptr is not None:
            old = tl.load(old_ptr + row).to(COMPUTE)
            log_ratio = logp - old
        terms = loss_terms(
            kept, logp, advantage, old, log_ratio, log_ratio, _value(importance_ptr, row, COMPUTE),
            _value(reference_ptr, row, COMPUTE), False, 0.0, tl.full((), low, COMPUTE), tl.full((), high, COMPUTE),
            tl.full((), dual_clip, COMPUTE), tl.full((), delta, COMPUTE), tl.full((), tau_positive, COMPUTE),
            tl.full((), tau_negative, COMPUTE), tl.full((), kl_coef, COMPUTE), tl.full((), beta, COMPUTE),
            tl.full((), kl_clamp, COMPUTE), tl.full((), log_ratio_coef, COMPUTE), tl.full((), penalty, COMPUTE), KIND,
            ESTIMATOR, importance_ptr is not None, reference_ptr is not None, False,
        )  # fmt: skip
        d_logp = (terms[2] + terms[1]) * divisor
        if HAS_ENTROPY:
            d_entropy = tl.where(kept, -tl.full((), entropy_coef, COMPUTE) * divisor, 0.0)
    logits, skip = window(base, STORES)
    out, _out_skip = window(row_pointer(grad_ptr, row32, rows_per_batch, out_batch_stride, out_row_stride), STORES)
    write_row(
        logits, out, skip, 0, blocks, n_columns, column_stride, out_column_stride, column_of(target, n_columns), k,
        shift, log_sum, entropy, d_logp, d_entropy, scale, cap, STORES, HAS_ENTROPY, HAS_SOFTCAP, BLOCK, COMPUTE,
        "evict_first",
    )  # fmt: skip


def warps_of(lanes: int) -> int:
    return lanes // _THREADS_OF_A_WARP


def registers_of(double: bool, capped: bool, loads: str, stores: str) -> int:
    return _MORE_REGISTERS if double or capped or "strided" in (loads, stores) else _REGISTERS


def write_statistics_and_gradient(
    out: Tensor, logits: Tensor, targets: Tensor, transform: Transform, results: tuple[Tensor, ...],
    inputs: PolicyInputs, form: SurrogateForm,
) -> None:  # fmt: skip
    """Statistics of logits [batch, rows, V] into `results`, and the loss's gradient into `out`, perhaps the logits."""
    rows, columns, size = targets.numel(), logits.shape[-1], logits.element_size()
    lanes = lanes_of(columns, size)
    loads, stores = loads_of(logits), gradient_loads(logits, out)
    block = lanes * _BLOCK_BYTES_PER_LANE[stores] // size
    most = registers_of(logits.dtype == torch.float64, bool(transform.softcap), loads, stores)
    with device_guard(logits):
        one_launch_kernel[(rows,)](
            logits, targets, transform.temperature, out, *results, inputs.rollout, inputs.weights, inputs.advantages,
            inputs.old, inputs.reference, inputs.importance, inputs.scale,
            columns, *row_arguments(logits, transform), out.stride(0), out.stride(1), out.stride(2),
            blocks_of(columns, block, stores, size), *form.numbers,
            KIND=form.kind, ESTIMATOR=form.kl_estimator, HAS_ENTROPY=bool(form.entropy_coef),
            HAS_SOFTCAP=bool(transform.softcap), LOADS=loads, STORES=stores, EVEN=is_even(logits),
            LANES=lanes, UNROLL=_UNROLL, BLOCK=block, COMPUTE=triton_dtype(logits.dtype),
            num_warps=warps_of(lanes), **VOCABULARY_OPTIONS, **registers(most),
        )  # fmt: skip


def prefers_one_launch(logits: Tensor) -> bool:
    """Whether it beats two stages: with rows enough that a program a row fills the GPU, of neighbouring columns.

    Measured in bf16 on an H200 (bench/results/nvidia-h200/tuning.jsonl), ms of one launch and of the two kernels: 1.57,
    1.88 at 8320 x 151936; 1.12, 1.57 at 33280 x 32000; .97, 1.24 at 16640 x 50304; 1.30, 1.84 at 20800 x 50257 (rows
    off the 16-byte grid); 1.46, 1.63 at 4160 x 262144. Of 132 rows of 151936 it took .033, the two .047; of 8 rows
    .021 and .023, where a program a row leaves most of a GPU idle.
    """
    rows = logits.shape[0] * logits.shape[1]
    return rows >= processors(logits.device) and loads_of(logits) != "strided"
