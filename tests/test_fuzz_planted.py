"""The fuzz finds an error in every stage: one is planted at a time, and the cases that fail must come soon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import INTERPRETED

import a3po_kernels
from a3po_kernels.backends import torch as backend
from a3po_kernels.backends.torch import policy_terms, selection, statistics, token_loss
from a3po_kernels.losses import linear, one_pass, ratio_weights, rows, shaping, stages
from a3po_kernels.named_objectives import chosen
from a3po_kernels.objectives import TokenRule, Topr
from a3po_kernels.ops import linear_token_logprobs
from tests.fuzz.judge import run_case

# Where nothing is planted, test_fuzz finds nothing in these.
SEED, MOST = 10, 350


def fold_statistics(right, *arguments, **keywords):
    """The entropy off by 1e-6 of itself."""
    right(*arguments, **keywords)
    arguments[3][1].mul_(1 + 1e-6)


def merge_statistics(right, a, b, k):
    """What moves with the shift is left out of the sum of t 2^t."""
    merged = right(a, b, k)
    shift = torch.maximum(a[0], b[0])
    merged[2] = sum(torch.exp2(((x[0] - shift) * k).clamp_min(-200.0)) * x[2] for x in (a, b))
    return merged


def select(right, metric, eligible, offsets, fraction, high, ceil, at_least, required):
    """No token of a rollout too short for one."""
    return right(metric, eligible, offsets, fraction, high, ceil, 0, required)


def apply_rules(right, weights, polarity, offsets, rules, name):
    """The last rule first."""
    return right(weights, polarity, offsets, rules[::-1], name)


def leading_weights(right, objective):
    """The polarity's weights taken, and then once more."""
    return max(right(objective) - 1, 0)


def surrogate(right, form, *values):
    """The bound of the dual clip keeps its gradient."""
    loss, _, *rest = right(form, *values)
    _, d_ratio, *_ = right(form._replace(dual_clip=float("inf")), *values)
    return (loss, d_ratio, *rest)


def kl(right, form, logp, reference, ratio, slope):
    """k3-ratio's gradient without that of the ratio."""
    value, gradient, beyond = right(form, logp, reference, ratio, slope)
    if form.kl_estimator == "k3-ratio":
        gradient = ratio * right(form._replace(kl_estimator="k3"), logp, reference, ratio, slope)[1]
    return value, gradient, beyond


def write_gradient(right, *arguments):
    """The column of a target counted from the tile and not from the vocabulary."""
    right(*arguments[:9])


def write_gradient_without_entropy(right, *arguments):
    """The entropy's part dropped where the log-prob's is 0."""
    grad_logp, grad_entropy = arguments[6:8]
    if grad_logp is not None and grad_entropy is not None:
        grad_entropy = torch.where(grad_logp == 0, 0.0, grad_entropy)
    right(*arguments[:6], grad_logp, grad_entropy, *arguments[8:])


def scale(right, gradient, factor, out):
    """By the factor's size, without its sign."""
    right(gradient, factor.abs(), out)


def normalizer(right, counts, *rest):
    """An empty rollout is a rollout."""
    return right(counts.clamp(min=1.0), *rest)


def may_move(right, objective, tokens, advantages, polarity):
    """Tokens without an advantage left out, although the KL or entropy term moves them."""
    return right(objective, tokens, advantages, polarity) & (advantages != 0)


def whole_rollouts(right, boundaries, tiles):
    """Rollouts cut anywhere."""
    return tiles


def spread(right, flags, tokens, offsets, unit):
    """Only the tokens that move themselves, and not their rollout's."""
    return flags


def dependence(right, objective, current):
    """A rule over the batch, or a divisor of selected tokens, waits for the batch only where both are there."""
    if objective.low_probability is None and current and objective.normalize_over == "all":
        return "rollout"
    return right(objective, current)


def scatter_rows(right, values, index, count):
    """The first rows instead of those that the values are of."""
    return right(values, None if index is None else torch.arange(index.numel()), count)


def trust_region(right, form, *values):
    """Each bound of DPPO where the other belongs."""
    return right(form._replace(low=form.high, high=form.low), *values)


def trust_region_one_way(right, form, advantage, logp, old):
    """A divergence too large also where the update would make it smaller."""
    if form.kind == "dppo-tv":
        return right(form, advantage, logp, old)
    towards = torch.where(advantage > 0, logp <= old, logp >= old)
    return right(form, advantage, logp, old) & ~towards


def cap(right, form, *values):
    """DPPO's cap on the ratio forgotten."""
    return right(form._replace(dual_clip=float("inf")) if form.kind.startswith("dppo") else form, *values)


def one_sided(right, form, advantage, own):
    """GMPO's bounds on both sides."""
    clipped, _ = right(form, advantage, own)
    bounded = clipped.clamp(-form.low, form.high)
    return bounded, bounded == own


def one_sided_gradient(right, form, advantage, own):
    """GMPO's gradient reaches what was clipped."""
    clipped, inside = right(form, advantage, own)
    return clipped, torch.ones_like(inside)


def penalty(right, form, *values):
    """The penalty of the log ratio without its gradient."""
    loss, d_ratio, d_logp, *rest = right(form, *values)
    return (loss, d_ratio, d_logp if form.kind != "ratio" else torch.zeros_like(d_logp), *rest)


def own_gradient(right, logp, entropy, inputs, form, *rest):
    """GSPO-token's derivative that of GSPO."""
    return right(logp, entropy, inputs, form._replace(own_gradient=False), *rest)


def log_ratio_square(right, form, *values):
    """(logp - old)^2 with half its gradient."""
    half = right(form._replace(log_ratio_coef=0.5 * form.log_ratio_coef), *values)
    return right(form, *values)._replace(d_logp=half.d_logp)


def kl_clamp(right, form, *values):
    """The KL term keeps its gradient beyond the clamp."""
    value, gradient, beyond = right(form, *values)
    free = right(form._replace(kl_clamp=float("inf")), *values)[1]
    return value, torch.where(beyond, free, gradient), beyond


def off_policy_mask(right, objective, batch, logprobs):
    """The off-policy mask by the other sign of the log ratio."""
    old = None if batch.old is None else 2 * logprobs.detach() - batch.old
    masks = [weight for weight in objective.ratio_weights if isinstance(weight, a3po_kernels.OffPolicyMask)]
    return right(objective, replace(batch, old=old) if masks else batch, logprobs)


def vespo_weights(right, objective, batch, logprobs):
    """A rollout's importance weight counted for each of its tokens."""
    return right(objective, replace(batch, importance_each=True), logprobs)


def vespo_signs(right, weight, batch, *rest):
    """VESPO's constants of the other sign."""
    return right(weight, replace(batch, advantages=-batch.advantages), *rest)


def topr_level(right, objective, batch, logprobs):
    """TOPR's geometric mean for its product."""
    weights = tuple(
        replace(weight, level="geometric") if isinstance(weight, Topr) and weight.level == "sequence" else weight
        for weight in objective.ratio_weights
    )
    return right(replace(objective, ratio_weights=weights), batch, logprobs)


def quantile(right, values, eligible, share):
    """The quantile of all tokens, eligible or not."""
    return right(values, torch.ones_like(eligible), share)


def quantile_below(right, values, eligible, share):
    """The value below the quantile."""
    bound = right(values, eligible, share)
    below = torch.where(eligible & (values <= bound), values, -torch.inf)
    return below.amax() if below.numel() else bound


def threshold(right, rule, *rest):
    """A threshold of a probability compared with its logarithm."""
    return right(replace(rule, metric="entropy"), *rest)


def threshold_for_the_rest(right, rule, form, weights, batch, name):
    """What the threshold leaves out is not weighed as the rest."""
    if rule.threshold is None:
        return right(rule, form, weights, batch, name)
    chosen = right(replace(rule, threshold=None), form, weights, batch, name)[1]
    found, kept = right(rule, form, weights, batch, name)
    return torch.where(chosen & ~kept, weights, found), kept


def earlier_replacement(right, weights, selected, beta, replaced=()):
    """An earlier rule's surrogate before a later one's."""
    return right(weights, selected, beta, replaced[::-1])


def no_replacement(right, weights, selected, beta, replaced=()):
    """The objective's surrogate at all tokens."""
    return right(weights, selected, beta)


def custom_terms(right, surrogate, batch, stats, weights, *rest):
    """A function's gradient kept from the dropped tokens of a rollout."""
    terms = right(surrogate, batch, stats, weights, *rest)
    return terms._replace(d_logp=torch.where(weights != 0, terms.d_logp, 0.0))


def reads_rollout(right, objective):
    """A rollout's ratio taken from what a chunk holds of it."""
    return False


def moves_without_advantage(right, objective):
    """No gradient without an advantage but that of the KL and entropy terms."""
    return bool(objective.kl_coef or objective.entropy_coef)


def a3po_metric(right, **keywords):
    """The sides of A3PO's rules by the common metric and not by each polarity's own."""
    made = right(**keywords)
    common = keywords.get("metric", "probability")
    rules = [rule for rule in made.shaping if isinstance(rule, TokenRule)]
    sides = [("low" if (rule.polarity > 0) == (common == "probability") else "high") for rule in rules]
    wrong = iter(replace(rule, side=side) for rule, side in zip(rules, sides, strict=True))
    return replace(made, shaping=tuple(next(wrong) if rule in rules else rule for rule in made.shaping))


def covariance(right, t):
    """The covariance without the mean of the log-probs."""
    return (t.advantages - t.batch_mean(t.advantages)) * t.logprobs


PLANTED: dict[str, list[tuple[Any, str, Callable]]] = {
    "statistics": [(backend, "fold_statistics", fold_statistics)],
    "merge of tiles": [(statistics, "merge_statistics", merge_statistics)],
    "selection": [(selection, "select", select), (backend, "select", select)],
    "order of the rules": [(shaping, "apply_rules", apply_rules)],
    "polarity weights": [(shaping, "leading_weights", leading_weights)],
    "coefficients": [(token_loss, "_surrogate", surrogate)],
    "coefficients of the KL term": [(token_loss, "_kl", kl)],
    "gradient of a column tile": [(backend, "write_gradient", write_gradient)],
    "gradient of the entropy": [(backend, "write_gradient", write_gradient_without_entropy)],
    "scaling by the incoming gradient": [(backend, "scale", scale)],
    "divisor": [(stages, "normalizer", normalizer)],
    "rows that may have a gradient": [(rows, "may_move", may_move), (linear, "may_move", may_move)],
    "chunks of whole rollouts": [(one_pass, "whole_rollouts", whole_rollouts)],
    "rows of a unit": [(linear, "spread", spread)],
    "what a token depends on": [(linear, "dependence", dependence)],
    "rows put back": [(one_pass, "scatter_rows", scatter_rows), (linear_token_logprobs, "scatter_rows", scatter_rows)],
    "bounds of DPPO": [(token_loss, "_keeps", trust_region)],
    "direction of DPPO": [(token_loss, "_keeps", trust_region_one_way)],
    "cap of DPPO": [(token_loss, "_surrogate", cap)],
    "sides of GMPO": [(policy_terms, "within", one_sided), (token_loss, "within", one_sided)],
    "gradient of GMPO": [(policy_terms, "within", one_sided_gradient)],
    "penalty of the log ratio": [(token_loss, "_surrogate", penalty)],
    "derivative of each token": [(backend, "loss_and_coefficients", own_gradient)],
    "square of the log ratio": [(policy_terms, "loss_terms", log_ratio_square)],
    "clamp of the KL term": [(token_loss, "_kl", kl_clamp)],
    "off-policy mask": [(stages, "importance_of", off_policy_mask)],
    "importance weights in VESPO": [(stages, "importance_of", vespo_weights)],
    "signs of VESPO": [(ratio_weights, "_vespo", vespo_signs)],
    "level of TOPR": [(stages, "importance_of", topr_level)],
    "eligible tokens of a quantile": [(shaping, "_quantile", quantile)],
    "interpolation of a quantile": [(shaping, "_quantile", quantile_below)],
    "threshold of a probability": [(shaping, "_apply_widely", threshold)],
    "rest of a threshold": [(shaping, "_apply_widely", threshold_for_the_rest)],
    "order of replacements": [(shaping, "ShapedTokens", earlier_replacement)],
    "replacements": [(shaping, "ShapedTokens", no_replacement)],
    "dropped tokens of a function": [(stages, "custom_terms", custom_terms)],
    "chunks of a rollout's ratio": [(rows, "reads_rollout", reads_rollout)],
    "rows that move without an advantage": [(rows, "_moves_without_advantage", moves_without_advantage)],
    "metrics of A3PO's polarities": [(a3po_kernels, "a3po", a3po_metric)],
    "metric that is a function": [(chosen, "covariance", covariance)],
}


def first_failure(most: int) -> int | None:
    """The number of the first case that is wrong."""
    return next((index for index in range(most) if run_case(SEED, index, "torch").fault), None)


@pytest.mark.skipif(INTERPRETED, reason="the same fuzz, and the torch backend's stages")
@pytest.mark.parametrize("stage", PLANTED)
def test_a_planted_error_is_found(stage, monkeypatch):
    for module, name, wrong in PLANTED[stage]:
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, wrong=wrong, right=right, **k: wrong(right, *a, **k))
    assert first_failure(MOST) is not None
