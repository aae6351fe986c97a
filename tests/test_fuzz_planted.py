"""The fuzz finds an error in every stage: one is planted at a time, and the cases that fail must come soon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import INTERPRETED

from a3po_kernels.backends import torch as backend
from a3po_kernels.backends.torch import selection, statistics, token_loss
from a3po_kernels.losses import linear, one_pass, rows, shaping, stages
from a3po_kernels.ops import linear_token_logprobs
from tests.fuzz.judge import run_case

# Where nothing is planted, test_fuzz finds nothing in these.
SEED, MOST = 2, 250


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
