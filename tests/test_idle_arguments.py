"""Nothing is accepted and ignored: an argument that another would leave without a use is refused, both by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

import a3po_kernels as ak


def fall(step):
    return 2.0 / (1 + step)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ak.a3po(rho=3.0, schedule=fall), "^rho must be left out where schedule is given, .*; got 3.0"),
        (lambda: ak.a3po(3.0, schedule=fall), "^rho must be left out where schedule is given"),
        (lambda: ak.a3po(alpha=0.1, schedule=fall), "^alpha must be left out where schedule is given, .*; got 0.1"),
        (lambda: ak.a3po(rho=0.5), r"^rho must be finite and lie in \[1.0, inf\]; got 0.5"),  # which max(1, .) hides
        (lambda: ak.a3po(polarity="positive", negative_metric="entropy"),
         "^negative_metric must be left out where polarity is 'positive', which has no negative rule; got 'entropy'"),
        (lambda: ak.a3po(polarity="negative", positive_metric="entropy"),
         "^positive_metric must be left out where polarity is 'negative', which has no positive rule; got 'entropy'"),
        (lambda: ak.a3po(metric="entropy", positive_metric="entropy", negative_metric="probability"),
         "^metric must be left out where every rule has its own, positive_metric and negative_metric; got 'entropy'"),
        (lambda: ak.a3po(metric="entropy", positive_metric="probability", polarity="positive"),
         "^metric must be left out where every rule has its own, positive_metric; got 'entropy'"),
        (lambda: ak.a3po(polarity="all", negative_metric="entropy"), "^polarity must be one of"),
        (lambda: ak.topr(ratio_level="sequence"), "^Reinforce reads no ratio: ratio_level must be 'token'; got 'seq"),
        (lambda: ak.vespo(ratio_level="sequence-token"), "^Reinforce reads no ratio: ratio_level must be 'token'"),
        (lambda: ak.Objective(surrogate=ak.Nothing(), ratio_level="sequence"), "^Nothing reads no ratio"),
        (lambda: ak.TokenRule(quantile=0.5, ratio=0.3, scope="batch"), "^ratio is of a share, and .*; got 0.3"),
        (lambda: ak.TokenRule(quantile=0.5, rounding="ceil", scope="batch"), "^rounding is of a share, .*; got 'ceil'"),
        (lambda: ak.TokenRule(metric="margin", source="current"),
         "^source is of a policy's metric, and 'margin' is a score; got 'current'"),
        (lambda: ak.clip_cov(low=5.0, high=1.0), "^low must be below high: no token lies between; got 5.0 and 1.0"),
        (lambda: ak.clip_cov(low=float("nan")), "^low must be below high: no token lies between; got nan and 5.0"),
        (lambda: ak.LinearDecay(0.5), "^start must be at least minimum = 1.0, where it stays; got 0.5"),
    ],
)  # fmt: skip
def test_what_would_be_ignored_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_has_a_use_is_taken():
    """Beside the refusals: None is not given, one metric of two leaves `metric` the other, and a ratio may be read."""
    assert ak.a3po(rho=3.0, schedule=None) == ak.a3po(rho=3.0)
    assert ak.a3po(schedule=fall).shaping[0].selected_scale is fall
    assert ak.a3po(2.0, 0.005, 0.2, fall) == ak.a3po(schedule=fall)  # by position, with the defaults before it
    assert ak.a3po(metric="entropy", positive_metric="probability").shaping[1].metric == "entropy"
    assert ak.a3po(polarity="positive", negative_weight=0.0) != ak.a3po(polarity="positive")
    rule = ak.TokenRule(replacement=ak.Clip())
    assert ak.Objective(shaping=(rule,), surrogate=ak.Reinforce(), ratio_level="sequence").ratio_level == "sequence"
    regularised = ak.Objective(surrogate=ak.Reinforce(), low_probability=ak.MinPRegularizer(), ratio_level="sequence")
    assert regularised.ratio_level == "sequence"
    by_quantile = ak.TokenRule(quantile=0.5, scope="batch")
    assert replace(by_quantile, polarity=1) == ak.TokenRule(1, quantile=0.5, scope="batch")
    assert ak.LinearDecay(1.0)(3) == 1.0
