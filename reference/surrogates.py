"""Shaping weights, ratios, surrogates and regularisers, token by token (SPEC section 3)."""

from fractions import Fraction

import torch
from torch import Tensor

from .batch import Batch
from .objectives import Cispo, Clip, MinPRegularizer, Objective, PolarityWeights, Sapo, TokenRule
from .selection import pick, quota, scopes_of

# --- shaping ---


def shaping_weights(
    objective: Objective, batch: Batch, logprobs: Tensor, entropy: Tensor, step
) -> tuple[dict[int, float], set[int]]:
    """The product of the shaping factors of every token, in the order listed, and the tokens that a rule selected.

    A token whose product is exactly 0 is dropped: it has no surrogate, KL or entropy term and later rules pass it over.
    """
    weights = {row: 1.0 for row in batch.rows}
    selected: set[int] = set()
    for part in objective.shaping:
        if isinstance(part, PolarityWeights):  # PSR, NSR, W-REINFORCE, arXiv 2506.01347
            factor = {1: part.positive, -1: part.negative, 0: part.zero}
            for row in weights:
                weights[row] *= factor[batch.polarity[row]]
            continue
        eligible = [
            [row for row in rows if part.polarity in (None, batch.polarity[row]) and weights[row] != 0]
            for rows in batch.tokens
        ]
        values = rule_metric(part, batch, logprobs, entropy).tolist()
        for rows in scopes_of(eligible, part.scope):
            chosen = set(pick(values, rows, quota(len(rows), part.ratio, part.rounding), part.side))
            for row in rows:
                weights[row] *= scale_at(part.selected_scale if row in chosen else part.rest_scale, step)
            selected |= chosen
    return weights, selected


def rule_metric(rule: TokenRule, batch: Batch, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """What a rule sorts tokens by; a log-probability sorts as its probability does. On-policy, current is old."""
    on_policy = batch.old_logprobs is None
    if rule.metric == "probability":
        return logprobs.detach() if rule.source == "current" or on_policy else batch.old_logprobs
    if rule.source == "current":
        return entropy.detach()
    if batch.old_entropy is not None:
        return batch.old_entropy
    if on_policy:
        return entropy.detach()
    raise ValueError("a rule on the old policy's entropy needs old_entropy when old_logprobs is given")


def scale_at(scale, step) -> float:
    return float(scale(step) if callable(scale) else scale)


# --- ratios ---


class MinusItself(torch.autograd.Function):
    """l - stop_gradient(l): the value 0 and the derivative 1, also at l = -inf, where subtracting would give NaN.

    A NaN stays one.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.where(x.isnan(), x, torch.zeros_like(x))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def log_ratios(batch: Batch, logprobs: Tensor) -> Tensor:
    """l - l_old, as [N]. old_logprobs=None means on-policy: l_old = stop_gradient(l), so that r is exactly 1."""
    return MinusItself.apply(logprobs) if batch.old_logprobs is None else logprobs - batch.old_logprobs


def ratios(objective: Objective, batch: Batch, logprobs: Tensor) -> Tensor:
    """r = exp(clamp(l - l_old, +-20)) of every token, as [N]; rows that are not tokens hold 1.

    ratio_level="sequence" is GSPO (arXiv 2507.18071): the mean of l - l_old over all tokens of the rollout, dropped
    ones too, then the clamp; the gradient reaches them all.
    """
    result = torch.ones_like(logprobs)
    for rows in batch.tokens:
        if rows:
            difference = log_ratios(batch, logprobs)[rows]
            if objective.ratio_level == "sequence":
                difference = difference.mean().expand(len(rows))
            result = result.index_put((torch.tensor(rows),), difference.clamp(-20.0, 20.0).exp())
    return result


# --- surrogates: elementwise over tokens, with A the shaped advantage ---


def surrogate_loss(surrogate, advantage: Tensor, logprobs: Tensor, ratio: Tensor) -> Tensor:
    if isinstance(surrogate, Clip):
        loss = before_dual_clip(surrogate, advantage, ratio)
        if surrogate.dual_clip is not None:
            loss = torch.where(dual_clipped(surrogate, advantage, ratio), -advantage * surrogate.dual_clip, loss)
        return loss
    if isinstance(surrogate, Cispo):
        # arXiv 2506.13585: -sg(min(r, eps_high)) A l; epsilon_low adds the lower bound 1 - eps_low (verl).
        coefficient = ratio.clamp(max=surrogate.epsilon_high)
        if surrogate.epsilon_low is not None:
            coefficient = coefficient.clamp(min=1 - surrogate.epsilon_low)
        return -coefficient.detach() * advantage * logprobs
    if isinstance(surrogate, Sapo):
        # arXiv 2511.20347: -A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A.
        tau = torch.full_like(advantage, surrogate.tau_negative)
        tau[advantage > 0] = surrogate.tau_positive
        return -advantage * (4 / tau) * torch.sigmoid(tau * (ratio - 1))
    return -advantage * logprobs  # Reinforce


def before_dual_clip(clip: Clip, advantage: Tensor, ratio: Tensor) -> Tensor:
    """max(-A r, -A clamp(r, 1 - eps_low, 1 + eps_high)) (arXiv 2503.14476).

    delta (two-sided clip, TRL): the unclipped branch uses min(r, delta).
    """
    unclipped_ratio = ratio if clip.delta is None else ratio.clamp(max=clip.delta)
    unclipped = -advantage * unclipped_ratio
    clipped = -advantage * ratio.clamp(1 - clip.epsilon_low, 1 + clip.epsilon_high)
    return torch.maximum(unclipped, clipped)


def dual_clipped(surrogate, advantage: Tensor, ratio: Tensor) -> Tensor:
    """Where the dual clip's bound -A c is the smaller: if A < 0, the loss is min(loss, -A c) (arXiv 1912.09729)."""
    if not isinstance(surrogate, Clip) or surrogate.dual_clip is None:
        return torch.zeros_like(advantage, dtype=torch.bool)
    return (advantage < 0) & (-advantage * surrogate.dual_clip < before_dual_clip(surrogate, advantage, ratio))


def clipped_low_high(surrogate, advantage: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Where the surrogate's lower and upper bound cut the gradient off. SAPO and REINFORCE have no bounds."""
    nowhere = torch.zeros_like(advantage, dtype=torch.bool)
    if isinstance(surrogate, Clip):
        low = (ratio < 1 - surrogate.epsilon_low) & (advantage < 0)
        return low, (ratio > 1 + surrogate.epsilon_high) & (advantage > 0)
    if isinstance(surrogate, Cispo):
        low = nowhere
        if surrogate.epsilon_low is not None:
            low = (ratio < 1 - surrogate.epsilon_low) & (advantage < 0)
        return low, (ratio > surrogate.epsilon_high) & (advantage > 0)
    return nowhere, nowhere


# --- regularisers ---


def kl_estimate(objective: Objective, logprobs: Tensor, ref_logprobs: Tensor, ratio: Tensor) -> Tensor:
    """k1 = l - l_ref, k2 = (l - l_ref)^2 / 2, k3 = exp(l_ref - l) - (l_ref - l) - 1, k3-ratio = r k3.

    l - l_ref is held within +-kl_clamp, if that is given (as verl holds it within +-20).
    """
    estimator = objective.kl_estimator
    difference = logprobs - ref_logprobs
    if objective.kl_clamp is not None:
        difference = difference.clamp(-objective.kl_clamp, objective.kl_clamp)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    k3 = (-difference).exp() + difference - 1
    return ratio * k3 if estimator == "k3-ratio" else k3


def low_probability_rows(
    regularizer: MinPRegularizer, batch: Batch, kept: list[int], logprobs: Tensor, min_p_logprobs: Tensor
) -> list[int]:
    """The tokens whose loss Lp-Reg replaces (arXiv 2510.03222, released code).

    Of the n kept tokens with (raw) A < 0, the k = floor(n q) with the lowest current l are candidates, if k > 1; those
    with l < t are regularised. A target that min-p filtered has t = -inf and never is.
    """
    negative = [row for row in kept if batch.advantages[row] < 0]
    k = len(negative) * Fraction(str(regularizer.quantile)) // 1
    if k <= 1:
        return []
    current = logprobs.tolist()
    return [row for row in pick(current, negative, k, "low") if current[row] < min_p_logprobs[row].item()]


def low_probability_loss(
    regularizer: MinPRegularizer, advantage: Tensor, logprobs: Tensor, ratio: Tensor, min_p_logprobs: Tensor
) -> Tensor:
    """-A r + beta clamp(exp(t - l) - (t - l) - 1, +-10) (arXiv 2510.03222).

    Above t - l = 2.7 the outer clamp holds the penalty at 10 with gradient 0, so the inner bound of 20 changes
    nothing; it keeps exp() from overflowing, which would make that zero gradient a NaN.
    """
    gap = (min_p_logprobs - logprobs).clamp(max=20.0)
    return -advantage * ratio + regularizer.beta * (gap.exp() - gap - 1).clamp(-10.0, 10.0)
