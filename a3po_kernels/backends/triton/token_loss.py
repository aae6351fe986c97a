"""The loss of a token and its derivatives: the formula that every kernel of the policy loss calls."""

import triton
import triton.language as tl

from .math import LN2, LOG2E


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _keeps(advantage, logp, old, low, high, KIND: tl.constexpr):
    """DPPO's trust region: where the policy has not moved too far in the direction that the advantage asks for.

    NaN is inside: it stays what it is.
    """
    p = _exp(logp)
    old_p = _exp(old)
    unknown = (p != p) | (old_p != old_p)
    if KIND == "dppo-tv":
        return unknown | tl.where(advantage > 0, p - old_p <= high, p - old_p >= -low)
    else:
        others = tl.log2((1.0 - old_p + 1e-8) / (1.0 - p + 1e-8)) * LN2
        divergence = old_p * (old - logp) + (1.0 - old_p) * others
        up = (divergence <= high) | (p <= old_p)
        return unknown | tl.where(advantage > 0, up, (divergence <= low) | (p >= old_p))


@triton.jit
def within(advantage, own, low, high):
    """GMPO's log ratio of each token, clipped on the side that its advantage asks for, and where it was not."""
    up = advantage >= 0
    zero = tl.zeros_like(own)
    clipped = tl.where(up, minimum(own, zero + high), maximum(own, zero - low))
    return clipped, tl.where(up, (own > high) == 0, (own < -low) == 0)


@triton.jit
def _surrogate(
    ratio, slope, logp, old, own, advantage, low, high, dual_clip, delta, tau_positive, tau_negative, penalty,
    KIND: tl.constexpr,
):  # fmt: skip
    """(loss, dloss/dlog ratio, dloss/dlogp past the ratio, clipped low, clipped high, dual-clipped) of each token.

    slope is d ratio / d log ratio: the ratio, or 0 where the log ratio was clamped. own: each token's log ratio.
    """
    zero = tl.zeros_like(ratio)
    never = zero > 0
    if KIND == "clip":
        free = -advantage * minimum(ratio, zero + delta)
        bound = -advantage * minimum(maximum(ratio, zero + low), zero + high)
        loss = maximum(free, bound)
        free_slope = tl.where(ratio > delta, 0.0, slope)
        bound_slope = tl.where((ratio < low) | (ratio > high), 0.0, slope)
        d_ratio = -advantage * tl.where(free >= bound, free_slope, bound_slope)
        cap = -advantage * dual_clip
        dual = (advantage < 0) & (loss > cap)
        return (
            tl.where(dual, cap, loss), tl.where(dual, 0.0, d_ratio), zero,
            (advantage < 0) & (ratio < low), (advantage > 0) & (ratio > high), dual,
        )  # fmt: skip
    elif KIND == "cispo":
        weight = -advantage * minimum(maximum(ratio, zero + low), zero + high)
        return weight * logp, zero, weight, (advantage < 0) & (ratio < low), (advantage > 0) & (ratio > high), never
    elif KIND == "dppo-tv" or KIND == "dppo-kl":
        keeps = _keeps(advantage, logp, old, low, high, KIND)
        weight = tl.where(keeps, -advantage * minimum(ratio, zero + dual_clip), 0.0)
        return (
            tl.where(keeps, weight * logp, 0.0), zero, weight, (advantage < 0) & (keeps == 0),
            (advantage > 0) & (keeps == 0), keeps & (ratio > dual_clip),
        )  # fmt: skip
    elif KIND == "gmpo":
        _clipped, inside = within(advantage, own, low, high)
        return (
            -advantage * ratio, -advantage * slope, zero, (advantage < 0) & (inside == 0),
            (advantage > 0) & (inside == 0), never,
        )  # fmt: skip
    elif KIND == "ratio":
        sign = tl.where(own > 0, 1.0, tl.where(own < 0, -1.0, own))
        return -advantage * ratio + penalty * tl.abs(own), -advantage * slope, penalty * sign, never, never, never
    elif KIND == "sapo":
        tau = tl.where(advantage > 0, zero + tau_positive, zero + tau_negative)
        gate = 1.0 / (1.0 + tl.exp2(-tau * (ratio - 1.0) * LOG2E))
        return -advantage * 4.0 / tau * gate, -advantage * 4.0 * gate * (1.0 - gate) * slope, zero, never, never, never
    elif KIND == "none":
        return zero, zero, zero, never, never, never
    else:
        return -advantage * logp, zero, -advantage, never, never, never


@triton.jit
def _replacement(loss, d_ratio, d_logp, replaced, ratio, slope, logp, advantage, proxy, beta):
    """Puts -A r + beta * clamp(k3(logp, proxy), -10, 10) where `replaced`."""
    gap = proxy - logp
    k3 = _exp(gap) - gap - 1.0
    penalty = beta * minimum(maximum(k3, tl.zeros_like(k3) - 10.0), tl.zeros_like(k3) + 10.0)
    loss = tl.where(replaced, -advantage * ratio + penalty, loss)
    d_ratio = tl.where(replaced, -advantage * slope, d_ratio)
    d_logp = tl.where(replaced, tl.where(tl.abs(k3) > 10.0, 0.0, beta * (1.0 - _exp(gap))), d_logp)
    return loss, d_ratio, d_logp


@triton.jit
def _kl(logp, reference, ratio, slope, kl_clamp, ESTIMATOR: tl.constexpr):
    """(estimate, d estimate / d logp, clamped) of KL(policy, reference); slope is d ratio / d logp."""
    whole = reference - logp
    beyond = tl.abs(whole) > kl_clamp
    gap = minimum(maximum(whole, tl.zeros_like(whole) - kl_clamp), tl.zeros_like(whole) + kl_clamp)
    if ESTIMATOR == "k1":
        return -gap, tl.where(beyond, 0.0, tl.zeros_like(gap) + 1.0), beyond
    elif ESTIMATOR == "k2":
        return 0.5 * gap * gap, tl.where(beyond, 0.0, -gap), beyond
    else:
        e = _exp(gap)
        k3 = e - gap - 1.0
        d_k3 = tl.where(beyond, 0.0, 1.0 - e)
        if ESTIMATOR == "k3-ratio":
            return ratio * k3, slope * k3 + ratio * d_k3, beyond
        else:
            return k3, d_k3, beyond


@triton.jit
def loss_terms(
    kept, logp, advantage, old, own, log_ratio, importance, reference, replaced, proxy, low, high, dual_clip, delta,
    tau_positive, tau_negative, kl_coef, beta, kl_clamp, log_ratio_coef, penalty, KIND: tl.constexpr,
    ESTIMATOR: tl.constexpr, HAS_IMPORTANCE: tl.constexpr, HAS_REFERENCE: tl.constexpr, HAS_REPLACED: tl.constexpr,
):  # fmt: skip
    """Before scale and entropy: (loss, dloss/dlog ratio, dloss/dlogp past it, kl, ratio, low, high, dual, kl's)."""
    ratio = _exp(minimum(maximum(log_ratio, -20.0), 20.0))
    # Each comparison so that NaN keeps its NaN: a gradient of 0 beside a loss of NaN would pass for sound.
    slope = tl.where(tl.abs(log_ratio) > 20.0, 0.0, ratio)
    loss, d_ratio, d_logp, clip_low, clip_high, dual = _surrogate(
        ratio, slope, logp, old, own, advantage, low, high, dual_clip, delta, tau_positive, tau_negative, penalty, KIND
    )
    if HAS_REPLACED:
        loss, d_ratio, d_logp = _replacement(
            loss, d_ratio, d_logp, replaced & kept, ratio, slope, logp, advantage, proxy, beta
        )
        clip_low = clip_low & ~replaced
        clip_high = clip_high & ~replaced
        dual = dual & ~replaced
    if HAS_IMPORTANCE:
        loss *= importance
        d_ratio *= importance
        d_logp *= importance
    kl = tl.zeros_like(logp)
    beyond = kept & ~kept
    if HAS_REFERENCE:
        kl, d_kl, beyond = _kl(logp, reference, ratio, slope, kl_clamp, ESTIMATOR)
        # Not 0 * inf: without a coefficient the estimate is a metric only.
        loss += tl.where(kl_coef != 0, kl_coef * kl, 0.0)
        d_logp += tl.where(kl_coef != 0, kl_coef * d_kl, 0.0)
    loss += tl.where(log_ratio_coef != 0, log_ratio_coef * own * own, 0.0)
    d_logp += tl.where(log_ratio_coef != 0, 2.0 * log_ratio_coef * own, 0.0)
    d_ratio = tl.where(kept, d_ratio, 0.0)
    d_logp = tl.where(kept, d_logp, 0.0)
    return loss, d_ratio, d_logp, kl, ratio, kept & clip_low, kept & clip_high, kept & dual, beyond
