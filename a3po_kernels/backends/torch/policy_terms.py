"""The policy loss of N tokens and its coefficients in plain PyTorch; see ops.surrogate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.forms import PolicyInputs, SurrogateForm
from ...core.segments import segment_sum
from .rows import uniformly


def _exp(x: Tensor) -> Tensor:
    return uniformly(torch.exp, x)


def _surrogate(form, ratio, slope, logp, advantage):
    """(loss, dloss/dlog ratio, dloss/dlogp past the ratio, clipped low, clipped high, dual-clipped) of each token."""
    never = torch.zeros_like(ratio, dtype=torch.bool)
    zero = torch.zeros_like(ratio)
    positive, negative = advantage > 0, advantage < 0
    if form.kind == "clip":
        free = -advantage * ratio.clamp(max=form.delta)
        bound = -advantage * ratio.clamp(form.low, form.high)
        loss = torch.maximum(free, bound)
        free_slope = torch.where(ratio > form.delta, 0.0, slope)
        bound_slope = torch.where((ratio < form.low) | (ratio > form.high), 0.0, slope)
        d_ratio = -advantage * torch.where(free >= bound, free_slope, bound_slope)
        cap = -advantage * form.dual_clip
        dual = negative & (loss > cap)
        loss, d_ratio = torch.where(dual, cap, loss), torch.where(dual, 0.0, d_ratio)
        return loss, d_ratio, zero, negative & (ratio < form.low), positive & (ratio > form.high), dual
    if form.kind == "cispo":
        weight = -advantage * ratio.clamp(form.low, form.high)
        return weight * logp, zero, weight, negative & (ratio < form.low), positive & (ratio > form.high), never
    if form.kind == "sapo":
        tau = torch.full_like(ratio, form.tau_negative).masked_fill(positive, form.tau_positive)
        gate = uniformly(torch.sigmoid, tau * (ratio - 1.0))
        d_ratio = -advantage * 4.0 * gate * (1.0 - gate) * slope
        return -advantage * 4.0 / tau * gate, d_ratio, zero, never, never, never
    if form.kind == "none":
        return zero, zero, zero, never, never, never
    return -advantage * logp, zero, -advantage, never, never, never


def _kl(
    form: SurrogateForm, logp: Tensor, reference: Tensor, ratio: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(estimate, d estimate / d logp, clamped) of KL(policy, reference); slope is d ratio / d logp."""
    whole = reference - logp
    beyond = whole.abs() > form.kl_clamp
    gap = whole.clamp(-form.kl_clamp, form.kl_clamp)
    if form.kl_estimator == "k1":
        return -gap, torch.where(beyond, 0.0, torch.ones_like(gap)), beyond
    if form.kl_estimator == "k2":
        return 0.5 * gap.square(), torch.where(beyond, 0.0, -gap), beyond
    e = _exp(gap)
    k3, d_k3 = e - gap - 1.0, torch.where(beyond, 0.0, 1.0 - e)
    if form.kl_estimator == "k3-ratio":
        return ratio * k3, slope * k3 + ratio * d_k3, beyond
    return k3, d_k3, beyond


class LossTerms(NamedTuple):
    """Of each token, before scale and entropy bonus: the loss, dloss/dlog ratio, dloss/dlogp past it, and metrics."""

    loss: Tensor
    d_ratio: Tensor
    d_logp: Tensor
    kl: Tensor
    ratio: Tensor
    clip_low: Tensor
    clip_high: Tensor
    dual: Tensor
    kl_clamped: Tensor


def loss_terms(
    form: SurrogateForm, kept: Tensor, logp: Tensor, advantage: Tensor, log_ratio: Tensor, importance: Tensor | None,
    reference: Tensor | None, replaced: Tensor | None = None, proxy: Tensor | None = None,
) -> LossTerms:  # fmt: skip
    """The formula of the loss of each token; policy_terms and one_launch call it."""
    ratio = _exp(log_ratio.clamp(-20.0, 20.0))
    # Each comparison so that NaN keeps its NaN: a gradient of 0 beside a loss of NaN would pass for sound.
    slope = torch.where(log_ratio.abs() > 20.0, 0.0, ratio)
    loss, d_ratio, d_logp, clip_low, clip_high, dual = _surrogate(form, ratio, slope, logp, advantage)
    if replaced is not None and proxy is not None:
        gap = torch.where(replaced, proxy, 0.0) - logp
        e = _exp(gap)
        k3 = e - gap - 1.0
        d_k3 = torch.where(k3.abs() > 10.0, 0.0, form.beta * (1.0 - e))
        loss = torch.where(replaced, -advantage * ratio + form.beta * k3.clamp(-10.0, 10.0), loss)
        d_ratio = torch.where(replaced, -advantage * slope, d_ratio)
        d_logp = torch.where(replaced, d_k3, d_logp)
        clip_low, clip_high, dual = clip_low & ~replaced, clip_high & ~replaced, dual & ~replaced
    if importance is not None:
        loss, d_ratio, d_logp = loss * importance, d_ratio * importance, d_logp * importance
    kl, beyond = torch.zeros_like(logp), torch.zeros_like(kept)
    if reference is not None:
        kl, d_kl, beyond = _kl(form, logp, reference, ratio, slope)
        if form.kl_coef:
            loss, d_logp = loss + form.kl_coef * kl, d_logp + form.kl_coef * d_kl
    d_ratio, d_logp = torch.where(kept, d_ratio, 0.0), torch.where(kept, d_logp, 0.0)
    return LossTerms(loss, d_ratio, d_logp, kl, ratio, kept & clip_low, kept & clip_high, kept & dual, beyond)


def loss_and_coefficients(
    logp: Tensor, entropy: Tensor, inputs: PolicyInputs, form: SurrogateForm, weight: float | Tensor, d_logp: Tensor,
    d_entropy: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes dL/dlogp [N] and, with an entropy bonus, dL/dH [N]; gives the loss [] and METRICS."""
    dtype, tokens, offsets = logp.dtype, inputs.tokens, inputs.offsets
    rollout = inputs.rollout.long()

    def at(values: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, values, 0.0)

    kept = tokens & (inputs.weights != 0)
    logp, entropy = at(logp, tokens), at(entropy, tokens)
    advantage = at(inputs.advantages, kept) * inputs.weights
    scale = at(inputs.scale[rollout], tokens)
    length = inputs.counts.clamp(min=1.0)
    gap = torch.zeros_like(logp) if inputs.old is None else at(logp - inputs.old, tokens)
    log_ratio = (segment_sum(gap, offsets) / length)[rollout] if form.sequence else gap
    replaced = None if inputs.replaced is None else inputs.replaced & kept
    terms = loss_terms(
        form, kept, logp, advantage, log_ratio, None if inputs.importance is None else at(inputs.importance, kept),
        None if inputs.reference is None else at(inputs.reference, tokens), replaced, inputs.proxy,
    )  # fmt: skip
    if form.sequence:
        shared = segment_sum(terms.d_ratio, offsets) / length
        d_logp.copy_(at(terms.d_logp + shared[rollout], tokens) * scale)
    else:
        d_logp.copy_((terms.d_logp + terms.d_ratio) * scale)
    loss, active = terms.loss, d_logp != 0
    if form.entropy_coef:
        loss = loss - form.entropy_coef * entropy
        d_entropy.copy_(torch.where(kept, -form.entropy_coef * scale, 0.0))
        active = active | (d_entropy != 0)
    loss = at(loss * scale, kept).sum()

    positive, negative = tokens & (inputs.polarity > 0), tokens & (inputs.polarity < 0)
    picked = torch.zeros_like(tokens) if inputs.selected is None else inputs.selected & tokens
    ratio = at(terms.ratio, tokens)
    flags = (
        terms.clip_low, terms.clip_high, terms.dual, picked & positive, picked & negative, positive, negative, active,
        tokens, terms.kl_clamped & tokens,
    )  # fmt: skip
    counted = torch.stack(flags).sum(1).to(dtype)
    low, high, dual, chosen_up, chosen_down, up, down, moving, known, beyond = counted.unbind()
    every = inputs.counts.sum()
    per_token = known.clamp(min=1.0)
    means = torch.stack([entropy.sum(), at(terms.kl, tokens).sum(), -gap.sum(), ratio.sum()]) / per_token
    largest = ratio.amax() if ratio.numel() else ratio.new_zeros(())
    beta = weight.to(dtype) if isinstance(weight, Tensor) else torch.full_like(loss, weight)
    metrics = torch.stack([
        *means.unbind(), largest, low / per_token, high / per_token, dual / per_token,
        chosen_up / up.clamp(min=1.0), chosen_down / down.clamp(min=1.0), moving / every.clamp(min=1.0), every, beta,
        beyond / per_token,
    ])  # fmt: skip
    return loss, metrics
