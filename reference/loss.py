"""policy_loss: shaping, surrogate, regularisers, aggregation and metrics put together (SPEC sections 3 to 5)."""

from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch, read_batch
from .objectives import Objective, TokenRule
from .ratio_weights import ratio_factors, reads_importance_weights
from .shaping import Shaping, scale_at, shape_tokens
from .statistics import differentiable_zero, min_p_token_logprobs, token_logprobs
from .surrogates import (
    clipped,
    dual_clipped,
    each_with_its_own,
    kl_estimate,
    low_probability_loss,
    low_probability_rows,
    surrogate_loss,
    token_inputs,
)


class PolicyLossOutput(NamedTuple):
    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    weights: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    objective: Objective,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    polarity: Tensor | None = None,
    old_entropy: Tensor | None = None,
    min_p_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    scores: dict[str, Tensor] | None = None,
    step=0,
    denominator: float | Tensor | None = None,
    max_length: int | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> PolicyLossOutput:
    """The loss of one micro-batch; differentiable with respect to the logits, in float64 for float64 logits.

    logits are [B, T, V] (a rollout per row) or [N, V] with cu_seqlens; targets are already shifted. advantages,
    polarity and importance_weights are per rollout or per token, the other inputs per token; scores holds the metrics
    that token rules name.
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective, got {objective!r}")
    transform = {"softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index, "mask": mask}
    stats = token_logprobs(logits, targets, temperature=temperature, **transform)
    logprobs, entropy = stats.logprobs.reshape(-1), stats.entropy.reshape(-1)

    regularizer = objective.low_probability
    if regularizer is not None and min_p_logprobs is None:
        if old_logprobs is not None:
            raise ValueError("low_probability needs min_p_logprobs, under the old policy, when old_logprobs is given")
        min_p_logprobs = min_p_token_logprobs(logits, targets, regularizer.min_p, **transform)
    if objective.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"kl_coef {objective.kl_coef} needs ref_logprobs")

    batch = read_batch(
        targets,
        mask,
        cu_seqlens,
        ignore_index,
        logprobs.dtype,
        advantages=advantages,
        polarity=polarity,
        importance_weights=importance_weights,
        scores=scores,
        old_logprobs=old_logprobs,
        old_entropy=old_entropy,
        ref_logprobs=ref_logprobs,
        min_p_logprobs=min_p_logprobs,
    )
    scale = loss_denominator_arguments(objective, targets, denominator, max_length)
    shaping = shape_tokens(objective, batch, logprobs, entropy, step)

    loss = objective_value(objective, batch, shaping, logprobs, entropy, *scale)

    # The same function once more on leaves, to see which tokens have a gradient at all.
    leaves = [x.detach().clone().requires_grad_() for x in (logprobs, entropy)]
    with torch.enable_grad():
        gradients = torch.autograd.grad(objective_value(objective, batch, shaping, *leaves, *scale), leaves)
    active = (gradients[0] != 0) | (gradients[1] != 0)

    return PolicyLossOutput(
        loss=loss,
        logprobs=stats.logprobs.detach(),
        entropy=stats.entropy.detach(),
        weights=weights_of(shaping, logprobs).reshape(targets.shape),
        metrics=metrics_of(objective, batch, shaping, logprobs.detach(), entropy.detach(), active, step),
    )


def weights_of(shaping: Shaping, logprobs: Tensor) -> Tensor:
    """The shaping weights as [N]; 0 at rows that are not tokens."""
    weights = torch.zeros_like(logprobs, requires_grad=False)
    for row, weight in shaping.weights.items():
        weights[row] = weight
    return weights


def objective_value(
    objective: Objective,
    batch: Batch,
    shaping: Shaping,
    logprobs: Tensor,
    entropy: Tensor,
    denominator: float | None,
    max_length: int,
) -> Tensor:
    """The loss as a function of the log-probabilities and entropies [N]."""
    # A token is dropped iff the product of its shaping factors is exactly 0.
    kept = [row for row in batch.rows if shaping.weights[row] != 0]
    everywhere = token_inputs(objective, batch, logprobs, weights_of(shaping, logprobs))
    x, h = everywhere.at(kept), entropy[kept]

    loss = each_with_its_own(objective, shaping.replacements, kept, x, surrogate_loss)
    regularizer = objective.low_probability
    if regularizer is not None:
        t = batch.min_p_logprobs
        chosen = low_probability_rows(regularizer, batch, kept, logprobs.detach(), t)
        at = torch.tensor([i for i, row in enumerate(kept) if row in chosen], dtype=torch.long)
        loss = loss.index_put((at,), low_probability_loss(regularizer, x.at(at), t[kept][at]))
    if batch.importance_weights is not None and not reads_importance_weights(objective):
        loss = loss * batch.importance_weights[kept]
    loss = loss * ratio_factors(objective, batch, everywhere.log_ratio)[kept]
    if objective.kl_coef != 0:
        loss = loss + objective.kl_coef * kl_estimate(objective, x.logprobs, batch.ref_logprobs[kept], x.ratio)
    if objective.log_ratio_coef != 0:
        # Kimi-K2.5 (arXiv 2602.02276), prime-rl's kl_tau: the token's own log ratio, unclamped.
        loss = loss + objective.log_ratio_coef * x.log_ratio**2
    if objective.entropy_coef != 0:
        loss = loss - objective.entropy_coef * h

    zero = differentiable_zero(logprobs) + differentiable_zero(entropy)
    return aggregate(objective, batch, dict(zip(kept, loss, strict=True)), zero, denominator, max_length)


def aggregate(
    objective: Objective,
    batch: Batch,
    loss_of: dict[int, Tensor],
    zero: Tensor,
    denominator: float | None,
    max_length: int,
) -> Tensor:
    """SPEC section 4. `loss_of` holds the kept tokens; a dropped token adds nothing to any sum.

    A dropped token still has its place in the denominators (n_s, sum M, number of rollouts with a token) unless
    normalize_over is "selected". `denominator` replaces the outer divisor only: the 1/n_s of seq-mean-token-mean stays.
    """
    sums, counts = [], []
    for rows in batch.tokens:
        sums.append(sum((loss_of[row] for row in rows if row in loss_of), zero))
        counts.append(len([row for row in rows if objective.normalize_over == "all" or row in loss_of]))

    if objective.aggregation == "token-mean":
        total, default = sum(sums, zero), sum(counts)
    elif objective.aggregation == "seq-mean-token-sum":
        total, default = sum(sums, zero), len([n for n in counts if n > 0])
    elif objective.aggregation == "seq-mean-token-mean":
        total = sum((s / n for s, n in zip(sums, counts, strict=True) if n > 0), zero)
        default = len([n for n in counts if n > 0])
    else:  # seq-mean-token-sum-norm (Dr.GRPO, arXiv 2503.20783): all rollouts count, empty ones too
        total, default = sum(sums, zero), len(batch.tokens) * max_length

    divisor = default if denominator is None else denominator
    return zero if divisor == 0 else total / divisor


def loss_denominator_arguments(objective, targets, denominator, max_length) -> tuple[float | None, int]:
    """`denominator` as a float or None, and the horizon of seq-mean-token-sum-norm (padded: T unless given)."""
    if denominator is not None:
        denominator = float(denominator)
        if not denominator >= 0:
            raise ValueError(f"denominator must not be negative, got {denominator}")
    if max_length is not None and max_length < 0:
        raise ValueError(f"max_length must not be negative, got {max_length}")
    if max_length is None and targets.dim() == 2:
        max_length = targets.shape[1]
    if max_length is None and denominator is None and objective.aggregation == "seq-mean-token-sum-norm":
        raise ValueError("seq-mean-token-sum-norm of packed data needs max_length or denominator")
    return denominator, max_length or 0


def metrics_of(
    objective: Objective,
    batch: Batch,
    shaping: Shaping,
    logprobs: Tensor,
    entropy: Tensor,
    active: Tensor,
    step,
) -> dict[str, Tensor]:
    """SPEC section 5, as 0-d tensors. Every mean is over all tokens, dropped ones too; 0 where there is none."""
    rows = batch.rows
    zero = logprobs.new_zeros(())

    def mean(values: Tensor) -> Tensor:
        return values.to(zero.dtype).sum() / len(rows) if rows else zero

    x = token_inputs(objective, batch, logprobs, weights_of(shaping, logprobs)).at(rows)
    # The clip fractions count the kept tokens whose loss is a surrogate's: where Lp-Reg replaced it, nothing clips.
    kept = [row for row in rows if shaping.weights[row] != 0]
    regularized: list[int] = []
    if objective.low_probability is not None:
        regularized = low_probability_rows(objective.low_probability, batch, kept, logprobs, batch.min_p_logprobs)
    clippable = torch.tensor([row in kept and row not in regularized for row in rows], dtype=torch.bool)
    clips = clippable & each_with_its_own(objective, shaping.replacements, rows, x, clipped)
    dual = clippable & each_with_its_own(objective, shaping.replacements, rows, x, dual_clipped)

    def selected_fraction(sign: int) -> Tensor:
        of_sign = [row for row in rows if batch.polarity[row] == sign]
        share = len([row for row in of_sign if row in shaping.selected]) / len(of_sign) if of_sign else 0.0
        return zero + share

    rules = [part for part in objective.shaping if isinstance(part, TokenRule)]
    kl = clamped = zero
    if batch.ref_logprobs is not None:
        kl = mean(kl_estimate(objective, x.logprobs, batch.ref_logprobs[rows], x.ratio))
        if objective.kl_clamp is not None:
            clamped = mean((x.logprobs - batch.ref_logprobs[rows]).abs() > objective.kl_clamp)
    return {
        "entropy": mean(entropy[rows]),
        "kl": kl,
        "approx_kl": mean(-x.log_ratio),
        "ratio_mean": mean(x.ratio),
        "ratio_max": x.ratio.max() if rows else zero,
        "clip_fraction_low": mean(clips & (x.advantage < 0)),
        "clip_fraction_high": mean(clips & (x.advantage > 0)),
        "dual_clip_fraction": mean(dual),
        "selected_fraction_positive": selected_fraction(1),
        "selected_fraction_negative": selected_fraction(-1),
        "active_fraction": mean(active[rows]),
        "weight": zero + (scale_at(rules[0].selected_scale, step) if rules else 1.0),
        "token_count": zero + len(rows),
        "kl_clamped_fraction": clamped,
    }
