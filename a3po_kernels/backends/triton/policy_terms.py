"""The policy loss of N tokens and the two coefficients of each: every sum in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

from ...core.forms import METRICS, SUMS, PolicyInputs, SurrogateForm
from .launch import VOCABULARY_OPTIONS, device_guard, registers, triton_dtype
from .token_loss import loss_terms, maximum, within

_BLOCK = 1024
REGISTERS = 255


def warps_of(kind: str) -> int:
    """GMPO's advantages in its first pass are too much for 4: on sm_100 they would spill in a loop."""
    return 8 if kind == "gmpo" else 4


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
def _old(logp, old_ptr, at, token):
    """(behaviour log-prob, log r) of each token; on-policy the current one, and 0 or NaN."""
    if old_ptr is None:
        return logp, tl.where(logp != logp, logp, 0.0)
    else:
        old = _load(old_ptr, at, token).to(logp.dtype)
        return old, logp - old


@triton.jit(do_not_specialize=["n_rows"])
def policy_terms_kernel(
    logp_ptr, entropy_ptr, tokens_ptr, rollout_ptr, weights_ptr, advantages_ptr, polarity_ptr, old_ptr, reference_ptr,
    importance_ptr, proxy_ptr, replaced_ptr, selected_ptr, offsets_ptr, counts_ptr, scale_ptr, d_logp_ptr,
    d_entropy_ptr, sums_ptr, n_rows: tl.int64,
    low: tl.float64, high: tl.float64, dual_clip: tl.float64, delta: tl.float64, tau_positive: tl.float64,
    tau_negative: tl.float64, kl_coef: tl.float64, entropy_coef: tl.float64, beta: tl.float64,
    kl_clamp: tl.float64, log_ratio_coef: tl.float64, penalty: tl.float64,
    KIND: tl.constexpr, SEQUENCE: tl.constexpr, OWN: tl.constexpr, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Loss terms, coefficients and sums of BLOCK tokens, or with a rollout-wide ratio (SEQUENCE) of one rollout.

    Grid (programs,); sums [programs, 16]. A rollout-wide ratio takes three passes: the mean log ratio, the ratio's
    derivative summed over the tokens, and what is dealt out to each; with OWN gradients the second is left out.
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
    log_ratio_coef_ = tl.full((), log_ratio_coef, COMPUTE)
    penalty_ = tl.full((), penalty, COMPUTE)

    mean_log_ratio = tl.full((), 0.0, COMPUTE)
    if SEQUENCE:
        total = tl.zeros((BLOCK,), COMPUTE)
        for first in range(start, stop, BLOCK):
            at = first + tl.arange(0, BLOCK)
            token = (tl.load(tokens_ptr + at, mask=at < stop, other=0) != 0) & (at < stop)
            _old_logp, own = _old(_load(logp_ptr, at, token).to(COMPUTE), old_ptr, at, token)
            if KIND == "gmpo":
                weight = _load(weights_ptr, at, token).to(COMPUTE)
                advantage = _load(advantages_ptr, at, token & (weight != 0)).to(COMPUTE) * weight
                own = tl.where(token, within(advantage, own, low_, high_)[0], 0.0)
            total += own
        mean_log_ratio = tl.sum(total, axis=0) / length
    shared = tl.full((), 0.0, COMPUTE)  # dL / d(rollout log ratio), dealt out per token in the last pass
    lanes = tl.arange(0, 16)
    sums = tl.zeros((16,), COMPUTE)
    largest = tl.full((), 0.0, COMPUTE)
    for pass_ in tl.static_range(1 - (SEQUENCE and not OWN), 2):
        for first in range(start, stop, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < stop
            token = (tl.load(tokens_ptr + at, mask=inside, other=0) != 0) & inside
            weight = _load(weights_ptr, at, token).to(COMPUTE)
            kept = token & (weight != 0)
            logp = _load(logp_ptr, at, token).to(COMPUTE)
            advantage = _load(advantages_ptr, at, kept).to(COMPUTE) * weight
            old, own_log_ratio = _old(logp, old_ptr, at, token)
            log_ratio = own_log_ratio
            if SEQUENCE:
                log_ratio = tl.zeros((BLOCK,), COMPUTE) + mean_log_ratio
            importance = _load(importance_ptr, at, kept).to(COMPUTE)
            reference = _load(reference_ptr, at, token).to(COMPUTE)
            replaced = _load_flag(replaced_ptr, at, inside) & kept
            proxy = _load(proxy_ptr, at, replaced).to(COMPUTE)
            loss, d_ratio, d_logp, kl, ratio, clip_low, clip_high, dual, beyond = loss_terms(
                kept, logp, advantage, old, own_log_ratio, log_ratio, importance, reference, replaced, proxy, low_,
                high_, dual_, delta_, tau_positive_, tau_negative_, kl_coef_, beta_, kl_clamp_, log_ratio_coef_,
                penalty_, KIND, ESTIMATOR, importance_ptr is not None, reference_ptr is not None,
                replaced_ptr is not None,
            )  # fmt: skip
            if SEQUENCE and not OWN and pass_ == 0:
                shared += tl.sum(d_ratio, axis=0)
            else:
                scale = tl.load(scale_ptr + tl.load(rollout_ptr + at, mask=token, other=0), mask=token, other=0.0)
                if SEQUENCE and not OWN:
                    dealt = tl.zeros((BLOCK,), COMPUTE) + shared / length
                    if KIND == "gmpo":
                        dealt = tl.where(within(advantage, own_log_ratio, low_, high_)[1], dealt, 0.0)
                    d_logp = tl.where(token, d_logp + dealt, 0.0)
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
                largest = maximum(largest, tl.reduce(tl.where(token, ratio, 0.0), 0, maximum))
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
        largest = maximum(largest, tl.reduce(part.to(tl.float64), 0, maximum))
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
                KIND=form.kind, SEQUENCE=form.sequence, OWN=form.own_gradient, ESTIMATOR=form.kl_estimator,
                BLOCK=_BLOCK, COMPUTE=triton_dtype(logp.dtype), num_warps=warps_of(form.kind), **VOCABULARY_OPTIONS,
                **registers(REGISTERS),
            )  # fmt: skip
        policy_metrics_kernel[(1,)](
            sums, inputs.counts, device_weight, loss, out, programs, rollouts,
            1.0 if device_weight is not None else weight, BLOCK=64,
        )  # fmt: skip
    return loss, out
