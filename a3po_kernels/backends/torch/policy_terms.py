"""The policy loss of N tokens and its coefficients in plain PyTorch; see ops.surrogate."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.segments import segment_sum
from ...core.surrogate_form import SurrogateForm


def _surrogate(form, ratio, slope, logp, advantage):
    """(loss, dloss/dlog ratio, dloss/dlogp past the ratio, clipped low, clipped high, dual-clipped) of each token."""
    never = torch.zeros_like(ratio, dtype=torch.bool)
    zero = torch.zeros_like(ratio)
    positive, negative = advantage > 0, advantage < 0
    if form.kind == "clip":
        free = -advantage * ratio.clamp(max=form.delta)
        bound = -advantage * ratio.clamp(form.low, form.high)
        loss = torch.maximum(free, bound)
        free_slope = torch.where(ratio <= form.delta, slope, 0.0)
        bound_slope = torch.where((ratio >= form.low) & (ratio <= form.high), slope, 0.0)
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
        gate = torch.sigmoid(tau * (ratio - 1.0))
        d_ratio = -advantage * 4.0 * gate * (1.0 - gate) * slope
        return -advantage * 4.0 / tau * gate, d_ratio, zero, never, never, never
    return -advantage * logp, zero, -advantage, never, never, never


def _kl(estimator: str, logp: Tensor, reference: Tensor, ratio: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """(estimate, d estimate / d logp) of KL(policy, reference); slope is d ratio / d logp."""
    gap = reference - logp
    if estimator == "k1":
        return -gap, torch.ones_like(gap)
    if estimator == "k2":
        return 0.5 * gap.square(), -gap
    e = gap.exp()
    k3 = e - gap - 1.0
    if estimator == "k3-ratio":
        return ratio * k3, slope * k3 + ratio * (1.0 - e)
    return k3, 1.0 - e


def policy_terms(
    logp, entropy, tokens, weights, advantages, polarity, old, reference, importance, proxy, replaced, selected,
    offsets, scale, form: SurrogateForm, d_logp_out: Tensor, d_entropy_out: Tensor,
) -> Tensor:  # fmt: skip
    """Writes dL/dlogp [N] and, with an entropy bonus, dL/dH [N]; gives the sums named in SUMS as [1, 15]."""
    dtype = logp.dtype
    rollout = torch.searchsorted(offsets, torch.arange(logp.numel(), device=logp.device), right=True) - 1

    def at(values: Tensor | None, where: Tensor) -> Tensor:
        return torch.zeros_like(logp) if values is None else torch.where(where, values, 0.0)

    weights = at(weights, tokens)
    kept = tokens & (weights != 0)
    logp, entropy = at(logp, tokens), at(entropy, tokens)
    advantage = at(advantages, kept) * weights
    scale = scale[rollout]
    length = segment_sum(tokens.to(dtype), offsets).clamp(min=1.0)

    gap = torch.zeros_like(logp) if old is None else at(logp - old, tokens)
    log_ratio = (segment_sum(gap, offsets) / length)[rollout] if form.sequence else gap
    ratio = log_ratio.clamp(-20.0, 20.0).exp()
    slope = torch.where(log_ratio.abs() <= 20.0, ratio, 0.0)
    loss, d_ratio, d_logp, clip_low, clip_high, dual = _surrogate(form, ratio, slope, logp, advantage)
    if replaced is not None:
        replaced = replaced & kept
        proxy_gap = at(proxy, replaced) - logp
        k3 = proxy_gap.exp() - proxy_gap - 1.0
        d_k3 = torch.where((k3 >= -10.0) & (k3 <= 10.0), form.beta * (1.0 - proxy_gap.exp()), 0.0)
        loss = torch.where(replaced, -advantage * ratio + form.beta * k3.clamp(-10.0, 10.0), loss)
        d_ratio = torch.where(replaced, -advantage * slope, d_ratio)
        d_logp = torch.where(replaced, d_k3, d_logp)
        clip_low, clip_high, dual = clip_low & ~replaced, clip_high & ~replaced, dual & ~replaced
    if importance is not None:
        factor = at(importance, kept)
        loss, d_ratio, d_logp = loss * factor, d_ratio * factor, d_logp * factor
    kl = torch.zeros_like(logp)
    if reference is not None:
        kl, d_kl = _kl(form.kl_estimator, logp, at(reference, tokens), ratio, slope)
        if form.kl_coef:
            loss, d_logp = loss + form.kl_coef * kl, d_logp + form.kl_coef * d_kl

    d_logp, d_ratio = at(d_logp, kept), at(d_ratio, kept)
    if form.sequence:
        shared = segment_sum(d_ratio, offsets) / length
        d_logp = at(d_logp + shared[rollout], tokens) * scale
    else:
        d_logp = (d_logp + d_ratio) * scale
    d_logp_out.copy_(d_logp)
    active = d_logp != 0
    if form.entropy_coef:
        loss = loss - form.entropy_coef * entropy
        d_entropy = torch.where(kept, -form.entropy_coef * scale, 0.0)
        d_entropy_out.copy_(d_entropy)
        active = active | (d_entropy != 0)
    loss = at(loss * scale, kept).sum()

    positive, negative = tokens & (polarity > 0), tokens & (polarity < 0)
    picked = torch.zeros_like(tokens) if selected is None else selected & tokens
    ratio = at(ratio, tokens)
    flags = (
        kept & clip_low, kept & clip_high, kept & dual, picked & positive, picked & negative, positive, negative,
        active, tokens,
    )  # fmt: skip
    sums = [
        loss,
        entropy.sum(),
        at(kl, tokens).sum(),
        -gap.sum(),
        ratio.sum(),
        *(flag.sum() for flag in flags),
        ratio.amax(),
    ]
    return torch.stack([value.to(dtype) for value in sums]).unsqueeze(0)
