"""The policy loss of N tokens and the two coefficients of each: every sum in a fixed order.

loss_terms is the formula; the kernel here and the one that joins both stages of a row (one_launch.py) call it.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...core.forms import METRICS, SUMS, PolicyInputs, SurrogateForm
from .launch import VOCABULARY_OPTIONS, device_guard, registers, triton_dtype
from .math import LOG2E

_BLOCK = 1024
REGISTERS = 255


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
        weight = -advantage * _minimum(_maximum(ratio, zero + low), zero + high)
        return weight * logp, zero, weight, (advantage < 0) & (ratio < low), (advantage > 0) & (ratio > high), never
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
    penalty = beta * _minimum(_maximum(k3, tl.zeros_like(k3) - 10.0), tl.zeros_like(k3) + 10.0)
    loss = tl.where(replaced, -advantage * ratio + penalty, loss)
    d_ratio = tl.where(replaced, -advantage * slope, d_ratio)
    d_logp = tl.where(replaced, tl.where(tl.abs(k3) > 10.0, 0.0, beta * (1.0 - _exp(gap))), d_logp)
    return loss, d_ratio, d_logp


@triton.jit
def _kl(logp, reference, ratio, slope, kl_clamp, ESTIMATOR: tl.constexpr):
    """(estimate, d estimate / d logp, clamped) of KL(policy, reference); slope is d ratio / d logp."""
    whole = reference - logp
    beyond = tl.abs(whole) > kl_clamp
    gap = _minimum(_maximum(whole, tl.zeros_like(whole) - kl_clamp), tl.zeros_like(whole) + kl_clamp)
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
    kept, logp, advantage, log_ratio, importance, reference, replaced, proxy, low, high, dual_clip, delta, tau_positive,
    tau_negative, kl_coef, beta, kl_clamp, KIND: tl.constexpr, ESTIMATOR: tl.constexpr, HAS_IMPORTANCE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr, HAS_REPLACED: tl.constexpr,
):  # fmt: skip
    """Before scale and entropy: (loss, dloss/dlog ratio, dloss/dlogp past it, kl, ratio, low, high, dual, kl's)."""
    ratio = _exp(_minimum(_maximum(log_ratio, -20.0), 20.0))
    # Each comparison so that NaN keeps its NaN: a gradient of 0 beside a loss of NaN would pass for sound.
    slope = tl.where(tl.abs(log_ratio) > 20.0, 0.0, ratio)
    loss, d_ratio, d_logp, clip_low, clip_high, dual = _surrogate(
        ratio, slope, logp, advantage, low, high, dual_clip, delta, tau_positive, tau_negative, KIND
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
    d_ratio = tl.where(kept, d_ratio, 0.0)
    d_logp = tl.where(kept, d_logp, 0.0)
    return loss, d_ratio, d_logp, kl, ratio, kept & clip_low, kept & clip_high, kept & dual, beyond


@triton.jit
def _log_ratio(logp, old_ptr, at, token):
    """log r of each token; 0 without a behaviour policy, which is then the current one."""
    if old_ptr is None:
        return tl.zeros_like(logp)
    else:
        return logp - _load(old_ptr, at, token).to(logp.dtype)


@triton.jit(do_not_specialize=["n_rows"])
def policy_terms_kernel(
    logp_ptr, entropy_ptr, tokens_ptr, rollout_ptr, weights_ptr, advantages_ptr, polarity_ptr, old_ptr, reference_ptr,
    importance_ptr, proxy_ptr, replaced_ptr, selected_ptr, offsets_ptr, counts_ptr, scale_ptr, d_logp_ptr,
    d_entropy_ptr, sums_ptr, n_rows: tl.int64,
    low: tl.float64, high: tl.float64, dual_clip: tl.float64, delta: tl.float64, tau_positive: tl.float64,
    tau_negative: tl.float64, kl_coef: tl.float64, entropy_coef: tl.float64, beta: tl.float64,
    kl_clamp: tl.float64,
    KIND: tl.constexpr, SEQUENCE: tl.constexpr, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Loss terms, coefficients and sums of BLOCK tokens, or with a rollout-wide ratio (SEQUENCE) of one rollout.

    Grid (programs,); sums [programs, 16]. A rollout-wide ratio takes three passes: the mean log ratio, the ratio's
    derivative summed over the tokens, and what is dealt out to each.
    """
    program = tl.program_id(0).to(tl.int64)
    if SEQUENCE:
        start = tl.load(offsets_ptr + program)
        stop = tl.load(offsets_ptr + program + 1)
        length = tl.maximum(tl.load(counts_ptr + program), 1.0)
    else:
        start = program * BLOCK
        stop = tl.minimum(start + BLOCK, n_rows)
    low_ = tl.full((), low, COMPUTE)
    high_ = tl.full((), high, COMPUTE)
    dual_ = tl.full((), dual_clip, COMPUTE)
    delta_ = tl.full((), delta, COMPUTE)
    tau_positive_ = tl.full((), tau_positive, COMPUTE)
    tau_negative_ = tl.full((), tau_negative, COMPUTE)
    beta_ = tl.full((), beta, COMPUTE)
    kl_coef_ = tl.full((), kl_coef, COMPUTE)
    entropy_coef_ = tl.full((), entropy_coef, COMPUTE)
    kl_clamp_ = tl.full((), kl_clamp, COMPUTE)

    mean_log_ratio = tl.full((), 0.0, COMPUTE)
    if SEQUENCE:
        total = tl.zeros((BLOCK,), COMPUTE)
        for first in range(start, stop, BLOCK):
            at = first + tl.arange(0, BLOCK)
            token = (tl.load(tokens_ptr + at, mask=at < stop, other=0) != 0) & (at < stop)
            total += _log_ratio(_load(logp_ptr, at, token).to(COMPUTE), old_ptr, at, token)
        mean_log_ratio = tl.sum(total, axis=0) / length
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
            own_log_ratio = _log_ratio(logp, old_ptr, at, token)
            log_ratio = own_log_ratio
            if SEQUENCE:
                log_ratio = tl.zeros((BLOCK,), COMPUTE) + mean_log_ratio
            importance = _load(importance_ptr, at, kept).to(COMPUTE)
            reference = _load(reference_ptr, at, token).to(COMPUTE)
            replaced = _load_flag(replaced_ptr, at, inside) & kept
            proxy = _load(proxy_ptr, at, replaced).to(COMPUTE)
            loss, d_ratio, d_logp, kl, ratio, clip_low, clip_high, dual, beyond = loss_terms(
                kept, logp, advantage, log_ratio, importance, reference, replaced, proxy, low_, high_, dual_, delta_,
                tau_positive_, tau_negative_, kl_coef_, beta_, kl_clamp_, KIND, ESTIMATOR,
                importance_ptr is not None, reference_ptr is not None, replaced_ptr is not None,
            )  # fmt: skip
            if SEQUENCE and pass_ == 0:
                shared += tl.sum(d_ratio, axis=0)
            else:
                scale = tl.load(scale_ptr + tl.load(rollout_ptr + at, mask=token, other=0), mask=token, other=0.0)
                if SEQUENCE:
                    d_logp = tl.where(token, d_logp + shared / length, 0.0)
                else:
                    d_logp += d_ratio
                d_logp *= scale
                tl.store(d_logp_ptr + at, d_logp, mask=inside)
                active = d_logp != 0
                entropy = _load(entropy_ptr, at, token)
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
                sums += tl.where(lanes == 3, tl.sum(tl.where(token, -own_log_ratio, 0.0), axis=0), 0.0)
                sums += tl.where(lanes == 4, tl.sum(tl.where(token, ratio, 0.0), axis=0), 0.0)
                sums += _count(clip_low, lanes == 5)
                sums += _count(clip_high, lanes == 6)
                sums += _count(dual, lanes == 7)
                sums += _count(selected & positive, lanes == 8)
                sums += _count(selected & negative, lanes == 9)
                sums += _count(positive, lanes == 10)
                sums += _count(negative, lanes == 11)
                sums += _count(active, lanes == 12)
                sums += _count(token, lanes == 13)
                sums += _count(token & beyond, lanes == 14)
                largest = _maximum(largest, tl.max(tl.where(token, ratio, 0.0), axis=0))
    sums = tl.where(lanes == 15, largest, sums)
    tl.store(sums_ptr + program * 16 + lanes, sums)


@triton.jit
def _pick(sums, lanes, at: tl.constexpr):
    return tl.sum(tl.where(lanes == at, sums, 0.0), axis=0)


@triton.jit(do_not_specialize=["n_parts", "n_rollouts"])
def policy_metrics_kernel(
    sums_ptr, counts_ptr, weight_ptr, loss_ptr, out_ptr, n_parts: tl.int32, n_rollouts: tl.int32, weight: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the parts [n_parts, 16] in fp64 to the loss [] and METRICS. Grid (1,)."""
    lanes = tl.arange(0, 16)
    parts = tl.arange(0, BLOCK)
    total = tl.zeros((16,), tl.float64)
    largest = tl.zeros((16,), tl.float64)
    for first in range(0, n_parts, BLOCK):
        inside = (first + parts < n_parts)[:, None]
        part = tl.load(sums_ptr + (first + parts)[:, None] * 16 + lanes[None, :], mask=inside, other=0.0)
        total += tl.sum(part.to(tl.float64), axis=0)
        largest = _maximum(largest, tl.reduce(part.to(tl.float64), 0, _maximum))
    every = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, n_rollouts, BLOCK):
        every += tl.load(counts_ptr + first + parts, mask=first + parts < n_rollouts, other=0.0).to(tl.float64)
    tokens = tl.sum(every, axis=0)
    per_token = tl.maximum(_pick(total, lanes, 13), 1.0)
    tl.store(loss_ptr, _pick(total, lanes, 0))
    tl.store(out_ptr, _pick(total, lanes, 1) / per_token)
    tl.store(out_ptr + 1, _pick(total, lanes, 2) / per_token)
    tl.store(out_ptr + 2, _pick(total, lanes, 3) / per_token)
    tl.store(out_ptr + 3, _pick(total, lanes, 4) / per_token)
    tl.store(out_ptr + 4, _pick(largest, lanes, 15))
    tl.store(out_ptr + 5, _pick(total, lanes, 5) / per_token)
    tl.store(out_ptr + 6, _pick(total, lanes, 6) / per_token)
    tl.store(out_ptr + 7, _pick(total, lanes, 7) / per_token)
    tl.store(out_ptr + 8, _pick(total, lanes, 8) / tl.maximum(_pick(total, lanes, 10), 1.0))
    tl.store(out_ptr + 9, _pick(total, lanes, 9) / tl.maximum(_pick(total, lanes, 11), 1.0))
    tl.store(out_ptr + 10, _pick(total, lanes, 12) / tl.maximum(tokens, 1.0))
    tl.store(out_ptr + 11, tokens)
    beta = tl.full((), weight, tl.float64)
    if weight_ptr is not None:
        beta = tl.load(weight_ptr).to(tl.float64)
    tl.store(out_ptr + 12, beta)
    tl.store(out_ptr + 13, _pick(total, lanes, 14) / per_token)


def loss_and_coefficients(
    logp: Tensor, entropy: Tensor, inputs: PolicyInputs, form: SurrogateForm, weight: float | Tensor, d_logp: Tensor,
    d_entropy: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes dL/dlogp [N] and, with an entropy bonus, dL/dH [N]; gives the loss [] and METRICS."""
    rows, rollouts = logp.numel(), inputs.offsets.numel() - 1
    loss, out = logp.new_empty(()), logp.new_empty(len(METRICS))
    programs = rollouts if form.sequence else triton.cdiv(rows, _BLOCK)
    if form.sequence:
        d_logp.zero_()  # a row that no rollout holds has no gradient
        if form.entropy_coef:
            d_entropy.zero_()
    sums = logp.new_empty((programs, len(SUMS)))
    device_weight = weight if isinstance(weight, Tensor) else None
    with device_guard(logp):
        if programs:
            policy_terms_kernel[(programs,)](
                logp, entropy, *inputs, d_logp, d_entropy if form.entropy_coef else None, sums, rows, *form.numbers,
                KIND=form.kind, SEQUENCE=form.sequence, ESTIMATOR=form.kl_estimator, BLOCK=_BLOCK,
                COMPUTE=triton_dtype(logp.dtype), **VOCABULARY_OPTIONS, **registers(REGISTERS),
            )  # fmt: skip
        policy_metrics_kernel[(1,)](
            sums, inputs.counts, device_weight, loss, out, programs, rollouts,
            1.0 if device_weight is not None else weight, BLOCK=64,
        )  # fmt: skip
    return loss, out
