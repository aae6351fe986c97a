"""The policy loss of N tokens and its coefficients in plain PyTorch; see ops.surrogate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.forms import PolicyInputs, SurrogateForm
from ...core.segments import segment_sum
from .token_loss import behaviour, loss_terms, within


def loss_and_coefficients(
    logp: Tensor, entropy: Tensor, inputs: PolicyInputs, form: SurrogateForm, weight: float | Tensor, d_logp: Tensor,
    d_entropy: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes dL/dlogp [N] and, with an entropy bonus, dL/dH [N]; gives the loss [] and METRICS."""
    return joined_loss_and_coefficients(
        logp, entropy, inputs, form, weight, d_logp, d_entropy, inputs.counts, lambda sums: sums
    )


def joined_loss_and_coefficients(
    logp: Tensor, entropy: Tensor, inputs: PolicyInputs, form: SurrogateForm, weight: float | Tensor, d_logp: Tensor,
    d_entropy: Tensor, lengths: Tensor, join: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same where a rollout has tokens elsewhere: lengths [S] of them all; join: a rollout's sums [S] with theirs.

    Loss and metrics are those of the tokens here.
    """
    dtype, tokens, offsets = logp.dtype, inputs.tokens, inputs.offsets
    rollout = inputs.rollout.long()

    def at(values: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, values, 0.0)

    kept = tokens & (inputs.weights != 0)
    logp, entropy = at(logp, tokens), at(entropy, tokens)
    advantage = at(inputs.advantages, kept) * inputs.weights
    scale = at(inputs.scale[rollout], tokens)
    length = lengths.clamp(min=1.0)
    old, gap = behaviour(logp, None if inputs.old is None else at(inputs.old, tokens))
    inside = None
    log_ratio = gap
    if form.sequence:
        clipped = gap
        if form.kind == "gmpo":
            clipped, inside = within(form, advantage, gap)
        log_ratio = (join(segment_sum(at(clipped, tokens), offsets)) / length)[rollout]
    replaced = None if inputs.replaced is None else inputs.replaced & kept
    importance = None if inputs.importance is None else at(inputs.importance, kept)
    terms = loss_terms(
        form, kept, logp, advantage, old, gap, log_ratio, importance,
        None if inputs.reference is None else at(inputs.reference, tokens), replaced, inputs.proxy,
    )  # fmt: skip
    if form.sequence and not form.own_gradient:
        shared = (join(segment_sum(terms.d_ratio, offsets)) / length)[rollout]
        shared = shared if inside is None else torch.where(inside, shared, 0.0)
        d_logp.copy_(at(terms.d_logp + shared, tokens) * scale)
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
