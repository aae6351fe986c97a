"""Triton kernels of the policy loss of N tokens: one program a rollout, every sum in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

from ...core.surrogate_form import SUMS, SurrogateForm
from .launch import device_guard, triton_dtype
from .math import LOG2E

_BLOCK = 1024


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _load(pointer, at, mask):
    """A per-token value; 0 where the row is no token, whatever it holds there."""
    if pointer is None:
        return tl.zeros(at.shape, tl.float32)
    else:
        return tl.load(pointer + at, mask=mask, other=0.0)


@triton.jit
def _load_flag(pointer, at, inside):
    """A flag per token; false everywhere without a pointer."""
    if pointer is None:
        return inside & ~inside
    else:
        return tl.load(pointer + at, mask=inside, other=0) != 0


@triton.jit
def _count(flags, lane):
    return tl.where(lane, tl.sum(flags.to(tl.int32), axis=0).to(tl.float32), 0.0)


@triton.jit
def _minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _surrogate(
    ratio, slope, logp, advantage, low, high, dual_clip, delta, tau_positive, tau_negative, KIND: tl.constexpr
):
    """(loss, dloss/dlog ratio, dloss/dlogp past the ratio, clipped low, clipped high, dual-clipped) of each token.

    slope is d ratio / d log ratio: the ratio, or 0 where the log ratio was clamped.
    """
    zero = tl.zeros_like(ratio)
    never = zero > 0
    if KIND == "clip":
        free = -advantage * _minimum(ratio, zero + delta)
        bound = -advantage * _minimum(_maximum(ratio, zero + low), zero + high)
        loss = _maximum(free, bound)
        free_slope = tl.where(ratio <= delta, slope, 0.0)
        bound_slope = tl.where((ratio >= low) & (ratio <= high), slope, 0.0)
        d_ratio = -advantage * tl.where(free >= bound, free_slope, bound_slope)
        cap = -advantage * dual_clip
        dual = (advantage < 0) & (loss > cap)
        return (
            tl.where(dual, cap, loss), tl.where(dual, 0.0, d_ratio), zero,
            (advantage < 0) & (ratio < low), (advantage > 0) & (ratio > high), dual,
        )  # fmt: skip
    elif KIND == "cispo":
        weight = -advantage * _minimum(_maximum(ratio, zero + low), zero + high)
        return weight * logp, zero, weight, (advantage < 0) & (ratio < low), (advantage > 0) & (ratio > high), never
    elif KIND == "sapo":
        tau = tl.where(advantage > 0, zero + tau_positive, zero + tau_negative)
        gate = 1.0 / (1.0 + tl.exp2(-tau * (ratio - 1.0) * LOG2E))
        return -advantage * 4.0 / tau * gate, -advantage * 4.0 * gate * (1.0 - gate) * slope, zero, never, never, never
    else:
        return -advantage * logp, zero, -advantage, never, never, never


@triton.jit
def _replacement(loss, d_ratio, d_logp, replaced, ratio, slope, logp, advantage, proxy, beta):
    """Puts -A r + beta * clamp(k3(logp, proxy), -10, 10) where `replaced`."""
    gap = proxy - logp
    k3 = _exp(gap) - gap - 1.0
    penalty = beta * _minimum(_maximum(k3, tl.zeros_like(k3) - 10.0), tl.zeros_like(k3) + 10.0)
    inside = (k3 >= -10.0) & (k3 <= 10.0)
    loss = tl.where(replaced, -advantage * ratio + penalty, loss)
    d_ratio = tl.where(replaced, -advantage * slope, d_ratio)
    d_logp = tl.where(replaced, tl.where(inside, beta * (1.0 - _exp(gap)), 0.0), d_logp)
    return loss, d_ratio, d_logp


@triton.jit
def _kl(logp, reference, ratio, slope, ESTIMATOR: tl.constexpr):
    """(estimate, d estimate / d logp) of KL(policy, reference); slope is d ratio / d logp."""
    gap = reference - logp
    if ESTIMATOR == "k1":
        return -gap, tl.zeros_like(gap) + 1.0
    elif ESTIMATOR == "k2":
        return 0.5 * gap * gap, -gap
    else:
        e = _exp(gap)
        k3 = e - gap - 1.0
        if ESTIMATOR == "k3-ratio":
            return ratio * k3, slope * k3 + ratio * (1.0 - e)
        else:
            return k3, 1.0 - e


@triton.jit(do_not_specialize=["n_rollouts"])
def rollout_sums_kernel(
    tokens_ptr, weights_ptr, logp_ptr, old_ptr, offsets_ptr, counts_ptr, log_ratio_ptr, n_rollouts,
    SEQUENCE: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Of each rollout: its tokens, its kept tokens, and the mean of logp - old over its tokens."""
    rollout = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + rollout)
    stop = tl.load(offsets_ptr + rollout + 1)
    tokens = tl.full((), 0, tl.int32)
    kept = tl.full((), 0, tl.int32)
    total = tl.zeros((BLOCK,), COMPUTE)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        token = tl.load(tokens_ptr + at, mask=at < stop, other=0) != 0
        tokens += tl.sum(token.to(tl.int32), axis=0)
        kept += tl.sum((_load(weights_ptr, at, token) != 0).to(tl.int32), axis=0)
        if SEQUENCE:
            total += _load(logp_ptr, at, token) - _load(old_ptr, at, token)
    tl.store(counts_ptr + rollout, tokens.to(COMPUTE))
    tl.store(counts_ptr + n_rollouts.to(tl.int64) + rollout, kept.to(COMPUTE))
    if SEQUENCE:
        mean = tl.sum(total, axis=0) / tl.maximum(tokens, 1).to(COMPUTE)
        tl.store(log_ratio_ptr + rollout, mean)


@triton.jit
def policy_terms_kernel(
    logp_ptr, entropy_ptr, tokens_ptr, weights_ptr, advantages_ptr, polarity_ptr, old_ptr, reference_ptr,
    importance_ptr, proxy_ptr, replaced_ptr, selected_ptr, offsets_ptr, scale_ptr, counts_ptr, log_ratio_ptr,
    d_logp_ptr, d_entropy_ptr, sums_ptr,
    low: tl.float64, high: tl.float64, dual_clip: tl.float64, delta: tl.float64, tau_positive: tl.float64,
    tau_negative: tl.float64, kl_coef: tl.float64, entropy_coef: tl.float64, beta: tl.float64,
    KIND: tl.constexpr, SEQUENCE: tl.constexpr, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Loss terms, coefficients and sums of one rollout. Grid (rollouts,); scale [rollouts] is 1 / normaliser.

    With a rollout-wide ratio the first pass sums the ratio's derivative, which the second deals out over the tokens.
    """
    rollout = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + rollout)
    stop = tl.load(offsets_ptr + rollout + 1)
    scale = tl.load(scale_ptr + rollout)
    length = tl.maximum(tl.load(counts_ptr + rollout), 1.0)
    low_ = tl.full((), low, COMPUTE)
    high_ = tl.full((), high, COMPUTE)
    dual_ = tl.full((), dual_clip, COMPUTE)
    delta_ = tl.full((), delta, COMPUTE)
    tau_positive_ = tl.full((), tau_positive, COMPUTE)
    tau_negative_ = tl.full((), tau_negative, COMPUTE)
    beta_ = tl.full((), beta, COMPUTE)
    kl_coef_ = tl.full((), kl_coef, COMPUTE)
    entropy_coef_ = tl.full((), entropy_coef, COMPUTE)

    shared = tl.full((), 0.0, COMPUTE)  # dL / d(rollout log ratio), dealt out per token in the last pass
    lanes = tl.arange(0, 16)
    sums = tl.zeros((16,), COMPUTE)
    largest = tl.full((), 0.0, COMPUTE)
    for pass_ in tl.static_range(1 - SEQUENCE, 2):
        for first in range(start, stop, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < stop
            token = (tl.load(tokens_ptr + at, mask=inside, other=0) != 0) & inside
            weight = _load(weights_ptr, at, token).to(COMPUTE)
            kept = token & (weight != 0)
            logp = _load(logp_ptr, at, token).to(COMPUTE)
            advantage = _load(advantages_ptr, at, kept).to(COMPUTE) * weight
            old = logp if old_ptr is None else _load(old_ptr, at, token).to(COMPUTE)
            if SEQUENCE:
                log_ratio = tl.zeros((BLOCK,), COMPUTE) + tl.load(log_ratio_ptr + rollout)
            elif old_ptr is None:
                log_ratio = tl.zeros((BLOCK,), COMPUTE)
            else:
                log_ratio = logp - old
            ratio = _exp(_minimum(_maximum(log_ratio, -20.0), 20.0))
            slope = tl.where(tl.abs(log_ratio) <= 20.0, ratio, 0.0)
            loss, d_ratio, d_logp, clip_low, clip_high, dual = _surrogate(
                ratio, slope, logp, advantage, low_, high_, dual_, delta_, tau_positive_, tau_negative_, KIND
            )
            if replaced_ptr is not None:
                replaced = (tl.load(replaced_ptr + at, mask=inside, other=0) != 0) & kept
                proxy = _load(proxy_ptr, at, replaced).to(COMPUTE)
                loss, d_ratio, d_logp = _replacement(
                    loss, d_ratio, d_logp, replaced, ratio, slope, logp, advantage, proxy, beta_
                )
                clip_low = clip_low & ~replaced
                clip_high = clip_high & ~replaced
                dual = dual & ~replaced
            if importance_ptr is not None:
                importance = _load(importance_ptr, at, kept).to(COMPUTE)
                loss *= importance
                d_ratio *= importance
                d_logp *= importance
            if SEQUENCE and pass_ == 0:
                shared += tl.sum(tl.where(kept, d_ratio, 0.0), axis=0)
            else:
                kl = tl.zeros((BLOCK,), COMPUTE)
                if reference_ptr is not None:
                    reference = _load(reference_ptr, at, token).to(COMPUTE)
                    kl, d_kl = _kl(logp, reference, ratio, slope, ESTIMATOR)
                    # Not 0 * inf: without a coefficient the estimate is a metric only.
                    loss += tl.where(kl_coef_ != 0, kl_coef_ * kl, 0.0)
                    d_logp += tl.where(kl_coef_ != 0, kl_coef_ * d_kl, 0.0)
                entropy = _load(entropy_ptr, at, token)
                d_logp = tl.where(kept, d_logp, 0.0)
                if SEQUENCE:
                    d_logp = tl.where(token, d_logp + shared / length, 0.0)
                else:
                    d_logp += tl.where(kept, d_ratio, 0.0)
                d_logp *= scale
                tl.store(d_logp_ptr + at, d_logp, mask=inside)
                active = d_logp != 0
                if d_entropy_ptr is not None:
                    loss -= entropy_coef_ * entropy
                    d_entropy = tl.where(kept, -entropy_coef_ * scale, 0.0)
                    tl.store(d_entropy_ptr + at, d_entropy, mask=inside)
                    active = active | (d_entropy != 0)
                loss = tl.where(kept, loss * scale, 0.0)
                polarity = _load(polarity_ptr, at, token)
                positive = token & (polarity > 0)
                negative = token & (polarity < 0)
                selected = token & _load_flag(selected_ptr, at, inside)
                sums += tl.where(lanes == 0, tl.sum(loss, axis=0), 0.0)
                sums += tl.where(lanes == 1, tl.sum(entropy, axis=0), 0.0)
                sums += tl.where(lanes == 2, tl.sum(tl.where(token, kl, 0.0), axis=0), 0.0)
                sums += tl.where(lanes == 3, tl.sum(tl.where(token, old - logp, 0.0), axis=0), 0.0)
                sums += tl.where(lanes == 4, tl.sum(tl.where(token, ratio, 0.0), axis=0), 0.0)
                sums += _count(kept & clip_low, lanes == 5)
                sums += _count(kept & clip_high, lanes == 6)
                sums += _count(kept & dual, lanes == 7)
                sums += _count(selected & positive, lanes == 8)
                sums += _count(selected & negative, lanes == 9)
                sums += _count(positive, lanes == 10)
                sums += _count(negative, lanes == 11)
                sums += _count(active, lanes == 12)
                sums += _count(token, lanes == 13)
                largest = _maximum(largest, tl.max(tl.where(token, ratio, 0.0), axis=0))
    sums = tl.where(lanes == 14, largest, sums)
    tl.store(sums_ptr + rollout * 15 + lanes, sums, mask=lanes < 15)


def policy_terms(
    logp: Tensor, entropy: Tensor, tokens: Tensor, weights: Tensor, advantages: Tensor, polarity: Tensor,
    old: Tensor | None, reference: Tensor | None, importance: Tensor | None, proxy: Tensor | None,
    replaced: Tensor | None, selected: Tensor | None, offsets: Tensor, scale: Tensor, form: SurrogateForm,
    d_logp: Tensor, d_entropy: Tensor,
) -> Tensor:  # fmt: skip
    """Writes dL/dlogp [N] and, with an entropy bonus, dL/dH [N]; gives the sums named in SUMS by rollout [S, 15]."""
    rollouts = offsets.numel() - 1
    counts = logp.new_empty((2, rollouts))
    log_ratio = logp.new_empty(rollouts)
    sums = logp.new_empty((rollouts, len(SUMS)))
    compute = triton_dtype(logp.dtype)
    # On-policy the mean log ratio is 0 by definition: logp is its own old value.
    before = logp if old is None else old
    with device_guard(logp):
        rollout_sums_kernel[(rollouts,)](
            tokens, weights, logp, before, offsets, counts, log_ratio, rollouts,
            SEQUENCE=form.sequence, BLOCK=_BLOCK, COMPUTE=compute,
        )  # fmt: skip
        policy_terms_kernel[(rollouts,)](
            logp, entropy, tokens, weights, advantages, polarity, old, reference, importance, proxy, replaced,
            selected, offsets, scale, counts, log_ratio, d_logp, d_entropy if form.entropy_coef else None, sums,
            *form[3:],
            KIND=form.kind, SEQUENCE=form.sequence, ESTIMATOR=form.kl_estimator, BLOCK=_BLOCK, COMPUTE=compute,
        )  # fmt: skip
    return sums
