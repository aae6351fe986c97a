"""Ratios, surrogates and regularisers, token by token (SPEC section 3)."""

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .objectives import Cispo, Clip, Dppo, Gmpo, MinPRegularizer, Nothing, Objective, Ratio, Sapo
from .selection import pick

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


def ratios(objective: Objective, batch: Batch, logprobs: Tensor, advantages: Tensor) -> Tensor:
    """r = exp(clamp(l - l_old, +-20)) of every token, as [N]; rows that are not tokens hold 1.

    ratio_level="sequence" is GSPO (arXiv 2507.18071): the mean of l - l_old over all tokens of the rollout, dropped
    ones too, then the clamp; the gradient reaches them all. "sequence-token" is its GSPO-token: that value, but each
    token's own derivative. Of Gmpo it is the geometric mean of the clipped ratios. advantages [N] are the shaped ones.
    """
    result = torch.ones_like(logprobs)
    for rows in batch.tokens:
        if rows:
            difference = log_ratios(batch, logprobs)[rows]
            if isinstance(objective.surrogate, Gmpo):
                difference = one_sided(objective.surrogate, advantages[rows], difference).mean().expand(len(rows))
            elif objective.ratio_level == "sequence":
                difference = difference.mean().expand(len(rows))
            elif objective.ratio_level == "sequence-token":
                difference = difference.mean().detach() + MinusItself.apply(logprobs[rows])
            result = result.index_put((torch.tensor(rows),), difference.clamp(-20.0, 20.0).exp())
    return result


def one_sided(gmpo: Gmpo, advantages: Tensor, log_ratio: Tensor) -> Tensor:
    """GMPO (arXiv 2507.20673): min(d, eps_high) where A >= 0, max(d, -eps_low) where A < 0: in log space."""
    return torch.where(advantages >= 0, log_ratio.clamp(max=gmpo.epsilon_high), log_ratio.clamp(min=-gmpo.epsilon_low))


# --- surrogates: elementwise over tokens, with A the shaped advantage ---


class Tokens(NamedTuple):
    """What a surrogate is a function of, per token."""

    advantage: Tensor
    logprobs: Tensor
    old_logprobs: Tensor
    log_ratio: Tensor  # of the token itself, unclamped
    ratio: Tensor  # of the objective's ratio_level

    def at(self, rows) -> "Tokens":
        return Tokens(*(values[rows] for values in self))


def token_inputs(objective: Objective, batch: Batch, logprobs: Tensor, weights: Tensor) -> Tokens:
    """All rows, [N], as the surrogate reads them; weights [N] are those of shaping."""
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    advantages = batch.advantages * weights
    r = ratios(objective, batch, logprobs, advantages)
    return Tokens(advantages, logprobs, old, log_ratios(batch, logprobs), r)


def each_with_its_own(objective: Objective, replacements: dict, rows: list[int], x: Tokens, function: Callable):
    """function(surrogate, tokens) of the objective's surrogate, and of its own at the rows whose rule replaced it."""
    result = function(objective.surrogate, x)
    for surrogate in dict.fromkeys(replacements.values()):
        at = torch.tensor([i for i, row in enumerate(rows) if replacements.get(row) == surrogate], dtype=torch.long)
        result = result.index_put((at,), function(surrogate, x.at(at)))
    return result


def surrogate_loss(surrogate, x: Tokens) -> Tensor:
    advantage, ratio = x.advantage, x.ratio
    if isinstance(surrogate, Clip):
        loss = before_dual_clip(surrogate, advantage, ratio)
        if surrogate.dual_clip is not None:
            loss = torch.where(dual_clipped(surrogate, x), -advantage * surrogate.dual_clip, loss)
        return loss
    if isinstance(surrogate, Cispo):
        # arXiv 2506.13585: -sg(min(r, eps_high)) A l; epsilon_low adds the lower bound 1 - eps_low (verl).
        coefficient = ratio.clamp(max=surrogate.epsilon_high)
        if surrogate.epsilon_low is not None:
            coefficient = coefficient.clamp(min=1 - surrogate.epsilon_low)
        return -coefficient.detach() * advantage * x.logprobs
    if isinstance(surrogate, Sapo):
        # arXiv 2511.20347: -A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A.
        tau = torch.full_like(advantage, surrogate.tau_negative)
        tau[advantage > 0] = surrogate.tau_positive
        return -advantage * (4 / tau) * torch.sigmoid(tau * (ratio - 1))
    if isinstance(surrogate, Dppo):
        # arXiv 2602.04879, released code and verl: -sg(min(r, cap)) A l, 0 where the divergence is too large.
        capped = ratio if surrogate.ratio_cap is None else ratio.clamp(max=surrogate.ratio_cap)
        return -capped.detach() * advantage * x.logprobs * dppo_kept(surrogate, x).to(ratio.dtype)
    if isinstance(surrogate, Gmpo):
        return -advantage * ratio
    if isinstance(surrogate, Ratio):
        # arXiv 2505.22617, released code and verl: the penalty has slope sign(d), 0 at d = 0.
        return -advantage * ratio + surrogate.penalty * x.log_ratio.abs()
    if isinstance(surrogate, Nothing):
        return torch.zeros_like(advantage)
    return -advantage * x.logprobs  # Reinforce


def dppo_kept(surrogate: Dppo, x: Tokens) -> Tensor:
    """DPPO's mask M (arXiv 2602.04879). A = 0 takes the negative branch; at the bound itself a token is kept.

    So is one of an unknown probability: nothing says that it moved too far, and its loss must be NaN.
    """
    p, old = x.logprobs.detach().exp(), x.old_logprobs.exp()
    if surrogate.divergence == "tv":
        positive, negative = p - old <= surrogate.delta_high, p - old >= -surrogate.delta_low
    else:
        binary = old * (x.old_logprobs - x.logprobs.detach()) + (1 - old) * ((1 - old + 1e-8) / (1 - p + 1e-8)).log()
        positive = (binary <= surrogate.delta_high) | (p <= old)
        negative = (binary <= surrogate.delta_low) | (p >= old)
    return torch.where(x.advantage > 0, positive, negative) | p.isnan() | old.isnan()


def before_dual_clip(clip: Clip, advantage: Tensor, ratio: Tensor) -> Tensor:
    """max(-A r, -A clamp(r, 1 - eps_low, 1 + eps_high)) (arXiv 2503.14476).

    delta (two-sided clip, TRL): the unclipped branch uses min(r, delta).
    """
    unclipped_ratio = ratio if clip.delta is None else ratio.clamp(max=clip.delta)
    unclipped = -advantage * unclipped_ratio
    clipped = -advantage * ratio.clamp(1 - clip.epsilon_low, 1 + clip.epsilon_high)
    return torch.maximum(unclipped, clipped)


def dual_clipped(surrogate, x: Tokens) -> Tensor:
    """Where the dual clip's bound -A c is the smaller: if A < 0, the loss is min(loss, -A c) (arXiv 1912.09729).

    Of DPPO: where its cap on the ratio is at work.
    """
    if isinstance(surrogate, Dppo) and surrogate.ratio_cap is not None:
        return dppo_kept(surrogate, x) & (x.ratio > surrogate.ratio_cap)
    if not isinstance(surrogate, Clip) or surrogate.dual_clip is None:
        return torch.zeros_like(x.advantage, dtype=torch.bool)
    before = before_dual_clip(surrogate, x.advantage, x.ratio)
    return (x.advantage < 0) & (-x.advantage * surrogate.dual_clip < before)


def clipped(surrogate, x: Tokens) -> Tensor:
    """Where the surrogate's lower or upper bound cuts the gradient off. SAPO and REINFORCE have no bounds."""
    advantage, ratio = x.advantage, x.ratio
    low = high = torch.zeros_like(advantage, dtype=torch.bool)
    if isinstance(surrogate, Clip):
        low, high = ratio < 1 - surrogate.epsilon_low, ratio > 1 + surrogate.epsilon_high
    elif isinstance(surrogate, Cispo):
        high = ratio > surrogate.epsilon_high
        if surrogate.epsilon_low is not None:
            low = ratio < 1 - surrogate.epsilon_low
    elif isinstance(surrogate, Gmpo):
        low, high = x.log_ratio < -surrogate.epsilon_low, x.log_ratio > surrogate.epsilon_high
    elif isinstance(surrogate, Dppo):
        low = high = ~dppo_kept(surrogate, x)
    return (low & (advantage < 0)) | (high & (advantage > 0))


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


def low_probability_loss(regularizer: MinPRegularizer, x: Tokens, min_p_logprobs: Tensor) -> Tensor:
    """-A r + beta clamp(exp(t - l) - (t - l) - 1, +-10) (arXiv 2510.03222).

    Above t - l = 2.7 the outer clamp holds the penalty at 10 with gradient 0, so the inner bound of 20 changes
    nothing; it keeps exp() from overflowing, which would make that zero gradient a NaN.
    """
    gap = (min_p_logprobs - x.logprobs).clamp(max=20.0)
    return -x.advantage * x.ratio + regularizer.beta * (gap.exp() - gap - 1).clamp(-10.0, 10.0)
