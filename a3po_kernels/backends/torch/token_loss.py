"""The loss of a token and its derivatives in plain PyTorch: the formula that every caller of the policy loss shares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.forms import SurrogateForm
from .rows import uniformly


def _exp(x: Tensor) -> Tensor:
    return uniformly(torch.exp, x)


def _keeps(form: SurrogateForm, advantage: Tensor, logp: Tensor, old: Tensor) -> Tensor:
    """DPPO's trust region: where the policy has not moved too far in the direction that the advantage asks for.

    NaN is inside: it stays what it is.
    """
    p, old_p = _exp(logp), _exp(old)
    unknown = p.isnan() | old_p.isnan()
    if form.kind == "dppo-tv":
        return unknown | torch.where(advantage > 0, p - old_p <= form.high, p - old_p >= -form.low)
    others = uniformly(torch.log, (1.0 - old_p + 1e-8) / (1.0 - p + 1e-8))
    divergence = old_p * (old - logp) + (1.0 - old_p) * others
    up, down = (divergence <= form.high) | (p <= old_p), (divergence <= form.low) | (p >= old_p)
    return unknown | torch.where(advantage > 0, up, down)


def within(form: SurrogateForm, advantage: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """GMPO's log ratio of each token, clipped on the side that its advantage asks for, and where it was not."""
    up = advantage >= 0
    inside = torch.where(up, ~(own > form.high), ~(own < -form.low))
    return torch.where(up, own.clamp(max=form.high), own.clamp(min=-form.low)), inside


def _surrogate(form, ratio, slope, logp, old, own, advantage):
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
    if form.kind in ("dppo-tv", "dppo-kl"):
        keeps = _keeps(form, advantage, logp, old)
        weight = torch.where(keeps, -advantage * ratio.clamp(max=form.dual_clip), 0.0)
        loss = torch.where(keeps, weight * logp, 0.0)
        return loss, zero, weight, negative & ~keeps, positive & ~keeps, keeps & (ratio > form.dual_clip)
    if form.kind == "gmpo":
        inside = within(form, advantage, own)[1]
        return -advantage * ratio, -advantage * slope, zero, negative & ~inside, positive & ~inside, never
    if form.kind == "ratio":
        loss = -advantage * ratio + form.penalty * own.abs()
        return loss, -advantage * slope, form.penalty * own.sign(), never, never, never
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


def behaviour(logp: Tensor, old: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the behaviour policy's log-prob, the log ratio) of each token; on-policy the current one, and 0 or NaN."""
    if old is not None:
        return old, logp - old
    return logp, torch.where(logp.isnan(), logp, 0.0)  # not logp - logp, which is NaN at -inf


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
    form: SurrogateForm, kept: Tensor, logp: Tensor, advantage: Tensor, old: Tensor, own: Tensor, log_ratio: Tensor,
    importance: Tensor | None, reference: Tensor | None, replaced: Tensor | None = None, proxy: Tensor | None = None,
) -> LossTerms:  # fmt: skip
    """The terms of each token; own: its log ratio; log_ratio: that, or its rollout's."""
    ratio = _exp(log_ratio.clamp(-20.0, 20.0))
    # Each comparison so that NaN keeps its NaN: a gradient of 0 beside a loss of NaN would pass for sound.
    slope = torch.where(log_ratio.abs() > 20.0, 0.0, ratio)
    loss, d_ratio, d_logp, clip_low, clip_high, dual = _surrogate(
        form, ratio, slope, logp, old, own, advantage
    )
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
    if form.log_ratio_coef:
        loss, d_logp = loss + form.log_ratio_coef * own.square(), d_logp + 2.0 * form.log_ratio_coef * own
    d_ratio, d_logp = torch.where(kept, d_ratio, 0.0), torch.where(kept, d_logp, 0.0)
    return LossTerms(loss, d_ratio, d_logp, kl, ratio, kept & clip_low, kept & clip_high, kept & dual, beyond)
