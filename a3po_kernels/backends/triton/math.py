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
    zero = tl.zeros_like(y)
    e = tl.exp2(tl.abs(y) * (-2.0 * LOG2E * inverse))
    u = tl.fma(zero - 2.0 * softcap * e, _reciprocal(e + 1.0, COMPUTE), zero + softcap)
    u = tl.where(y < 0, -u, u)
    if COMPUTE == tl.float32:
        square = y * y
        r = inverse * inverse
        # y - y^3 r / 3 + 2 y^5 r^2 / 15 - 17 y^7 r^3 / 315 + 62 y^9 r^4 / 2835
        series = tl.fma(square, zero + 0.02186948854 * r * r * r * r, zero - 0.05396825397 * r * r * r)
        series = tl.fma(square, series, zero + 0.13333333333 * r * r)
        series = tl.fma(square, series, zero - 0.33333333333 * r)
        u = tl.where(square * r < 0.09, tl.fma(y * square, series, y), u)
    return tl.where(tl.abs(y) < float("inf"), u, y)


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
    a = u / softcap
    return tl.where(tl.abs(u) < float("inf"), tl.fma(-a, a, tl.zeros_like(a) + 1.0), 1.0)


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
    total = tl.fma(scale_a, sum_a, scale_b * sum_b)
    dot = tl.fma(scale_a, tl.fma(move_a, sum_a, dot_a), scale_b * tl.fma(move_b, sum_b, dot_b))
    return shift, total, dot
