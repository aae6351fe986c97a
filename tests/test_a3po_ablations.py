"""A3PO's ablations as parameters of the preset, against the same rules written out for the reference."""

from __future__ import annotations

import pytest
import torch
from batches import INTERPRETED, largest_error, random_batch, run

import a3po_kernels as ak
import reference

DECAY = (2.0, 0.005)


def rule(module, sign, metric, side, source="old", ratio=0.2):
    return module.TokenRule(
        polarity=sign, metric=metric, source=source, side=side, ratio=ratio, selected_scale=module.LinearDecay(*DECAY)
    )


def composed(module, *shaping):
    return module.Objective(shaping=shaping, surrogate=module.Clip(0.2, 0.28))


# Keywords of the preset, and the shaping that they are.
ABLATIONS = {
    "positive alone": ({"polarity": "positive"}, lambda m: [rule(m, 1, "probability", "low")]),
    "negative alone": ({"polarity": "negative"}, lambda m: [rule(m, -1, "probability", "high")]),
    "entropy in positive": (
        {"positive_metric": "entropy"},
        lambda m: [rule(m, 1, "entropy", "high"), rule(m, -1, "probability", "high")],
    ),
    "entropy in negative": (
        {"negative_metric": "entropy", "source": "current"},
        lambda m: [rule(m, 1, "probability", "low", "current"), rule(m, -1, "entropy", "low", "current")],
    ),
    "half of the tokens": (
        {"ratio": 0.5},
        lambda m: [rule(m, 1, "probability", "low", ratio=0.5), rule(m, -1, "probability", "high", ratio=0.5)],
    ),
    "polarity weights": (
        {"positive_weight": 0.5, "negative_weight": 1.5},
        lambda m: [
            m.PolarityWeights(0.5, 1.5), rule(m, 1, "probability", "low"), rule(m, -1, "probability", "high")
        ],
    ),
    "a schedule of positive rollouts": (
        {"positive_weight": ak.LinearDecay(2.0, 0.1, 0.5)},
        lambda m: [
            m.PolarityWeights(m.LinearDecay(2.0, 0.1, 0.5), 1.0), rule(m, 1, "probability", "low"),
            rule(m, -1, "probability", "high"),
        ],
    ),
    "none of the negative": (
        {"negative_weight": 0.0, "polarity": "positive"},
        lambda m: [m.PolarityWeights(1.0, 0.0), rule(m, 1, "probability", "low")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations(name, backend, device):
    if INTERPRETED and name not in ("entropy in positive", "a schedule of positive rollouts"):
        pytest.skip("the interpreter is slow: what differs is which rules there are")
    keywords, shaping = ABLATIONS[name]
    batch = random_batch(21, rollouts=6, dtype=torch.float64, device=device)
    options = {"min_p_logprobs": None, "step": 7}
    found, gradient = run(ak, batch, ak.a3po(**keywords), backend=backend, **options)
    expected, truth = run(reference, batch, composed(reference, *shaping(reference)), double=True, **options)
    assert largest_error(found.loss, expected.loss) < 1e-12 and largest_error(gradient, truth) < 1e-12
    assert largest_error(found.weights, expected.weights) < 1e-12
    assert largest_error(found.metrics["active_fraction"], expected.metrics["active_fraction"]) < 1e-12


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_a_scheduled_polarity_weight(kind, backend, device):
    """By numbers and by a step on the device, after a rule and before one, dropping what it weighs by 0."""
    batch = random_batch(22, rollouts=6, dtype=torch.float64, device=device)
    weights = ak.PolarityWeights(ak.LinearDecay(1.0, 0.1, 0.0), 1.0)
    first = ak.TokenRule(1, selected_scale=3.0)
    for step in (3, 10):
        at = kind(step) if kind is int else torch.tensor(step, device=device)
        out, gradient = run(
            ak, batch, ak.Objective(shaping=(first, weights)), backend=backend, min_p_logprobs=None, step=at
        )
        number = max(1.0 - 0.1 * step, 0.0)
        fixed = ak.Objective(shaping=(first, ak.PolarityWeights(number, 1.0)))
        expected, truth = run(ak, batch, fixed, backend=backend, min_p_logprobs=None)
        assert largest_error(out.weights, expected.weights) < 1e-15 and largest_error(gradient, truth) < 1e-14


def test_words_are_checked():
    with pytest.raises(ValueError, match="polarity must be one of both, positive, negative; got 'all'"):
        ak.a3po(polarity="all")
    with pytest.raises(ValueError, match="metric must be one of"):
        ak.a3po(negative_metric="margin")
