"""Device functions shared by the kernels: the logit transform and the rule that merges softmax statistics."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where a running maximum starts: finite, since (-inf) - (-inf) and (-inf) * 0 are NaN.
LOWEST = tl.constexpr(-1.0e38)


@triton.jit
def _reciprocal(x, COMPUTE: tl.constexpr):
    """1 / x for x >= 1: a correct division in fp32 costs more than the rest of tanh."""
    if COMPUTE == tl.float64:
        return 1.0 / x
    else:
        root = tl.rsqrt(x)
        return root * root


@triton.jit
def softcapped(y, softcap, COMPUTE: tl.constexpr):
    """softcap * tanh(y / softcap) by one exponential; what is not finite passes unchanged.

    tanh |a| = 1 - 2 e / (1 + e) with e = e^-2|a| <= 1; it cancels near 0, where fp32 takes the Taylor series instead.
    """
    inverse = 1.0 / softcap
    e = tl.exp2(tl.abs(y) * (-2.0 * LOG2E * inverse))
    u = softcap - (2.0 * softcap * e) * _reciprocal(e + 1.0, COMPUTE)
    u = tl.where(y < 0, -u, u)
    if COMPUTE == tl.float32:
        square = y * y
        r = inverse * inverse
        series = 0.05396825397 * r * r * r
        series = 0.13333333333 * r * r - square * (series - square * (0.02186948854 * r * r * r * r))
        u = tl.where(square * r < 0.09, y + y * square * (square * series - 0.33333333333 * r), u)
    return tl.where(tl.abs(y) < float("inf"), u, y)


@triton.jit
def load_capped(
    pointers, mask, logit_scale, softcap, MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, COMPUTE: tl.constexpr
):
    """Capped logits u in the compute dtype; a column outside the row reads as -inf, so that it weighs nothing.

    u = softcap * tanh(logit_scale * z / softcap), or z itself without a softcap (the scale is then in k).
    """
    if MASKED:
        z = tl.load(pointers, mask=mask, other=float("-inf")).to(COMPUTE)
    else:
        z = tl.load(pointers).to(COMPUTE)
    if HAS_SOFTCAP:
        return softcapped(z * logit_scale, softcap, COMPUTE)
    else:
        return z


@triton.jit
def clamp_min(x, low):
    """max(x, low) that keeps NaN: tl.maximum drops it by default, and a NaN row would then look healthy."""
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exponent_floor(COMPUTE: tl.constexpr):
    """The exponent under which 2^t is zero: -inf clamped to it keeps 2^t * t = 0 instead of NaN."""
    if COMPUTE == tl.float64:
        return -1100.0
    else:
        return -200.0


@triton.jit
def softcap_slope(u, softcap):
    """d softcapped / d y, written in the capped value u."""
    return tl.where(tl.abs(u) < float("inf"), 1.0 - (u / softcap) * (u / softcap), 1.0)


@triton.jit
def merge_statistics(shift_a, sum_a, dot_a, shift_b, sum_b, dot_b):
    """Merges the softmax statistics of two disjoint parts of a row; associative up to rounding.

    A part is (shift m, sum of 2^(y - m), sum of 2^(y - m) * (y - m)) over its base-2 exponents y.
    """
    shift = tl.maximum(shift_a, shift_b)
    move_a = shift_a - shift
    move_b = shift_b - shift
    scale_a = tl.exp2(move_a)
    scale_b = tl.exp2(move_b)
    total = scale_a * sum_a + scale_b * sum_b
    dot = scale_a * (dot_a + move_a * sum_a) + scale_b * (dot_b + move_b * sum_b)
    return shift, total, dot
