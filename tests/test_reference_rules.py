"""The reference's token rules beyond a quota of a probability, and Clip-Cov and KL-Cov, worked out by hand."""

import math

import pytest
import torch
from reference_examples import F64, NAN, close, rollout_loss

import reference as ref

LOG2, LOG_HALF, LOG_FIFTH = math.log(2), math.log(0.5), math.log(0.2)


def test_replacements_by_hand():
    # Rule 1 takes the two least likely tokens, rule 2 the most likely and, of what it takes, replaces nothing; rule 3
    # replaces the least likely once more. A = 1, r = 1.5: clip 1.2, REINFORCE -l, Ratio 1.5.
    rules = (
        ref.TokenRule(side="low", ratio=0.5, source="current", replacement=ref.Reinforce()),
        ref.TokenRule(side="low", ratio=0.5, source="current", selected_scale=2.0),
        ref.TokenRule(side="low", ratio=0.25, source="current", replacement=ref.Ratio()),
    )
    out, grad = rollout_loss(ref.Objective(shaping=rules), [[0.1, 0.2, 0.5, 0.6]], [1.0], [[1.5] * 4])
    close(out.loss, (-3 - 2 * LOG_FIFTH - 1.2 - 1.2) / 4)
    close(grad, [[-3 / 4, -2 / 4, 0, 0]])
    # The clip fractions are of each token's own surrogate.
    assert out.metrics["clip_fraction_high"] == 0.5 and out.metrics["selected_fraction_positive"] == 0.5


def test_thresholds_by_hand():
    def weights(p=((0.1, 0.4, 0.6, 0.9),), scores=None, **rule):
        rule = {"ratio": 1.0, "selected_scale": 2.0, "scope": "batch", **rule}
        objective = ref.Objective(shaping=[ref.TokenRule(**rule)])
        return rollout_loss(objective, p, [1.0], scores=scores)[0].weights.tolist()

    assert weights(threshold=0.5) == [[2, 2, 1, 1]]  # of the probability, not its logarithm
    assert weights(threshold=0.5, side="high") == [[1, 1, 2, 2]]
    assert weights(threshold=0.5, ratio=0.25) == [[2, 1, 1, 1]]  # of the one that ratio takes
    assert weights(threshold=0.05) == [[1, 1, 1, 1]]
    # Strictly: a score of exactly .5 is neither above nor below it. NaN is not either.
    given = {"mine": torch.tensor([[0.5, 0.4, 0.6, NAN]])}
    assert weights(threshold=0.5, metric="mine", scores=given) == [[1, 2, 1, 1]]
    assert weights(threshold=0.5, metric="mine", scores=given, side="high") == [[1, 1, 2, 1]]
    with pytest.raises(ValueError, match="'other'"):
        weights(metric="other", scores=given)
    with pytest.raises(ValueError, match="mine"):
        weights(metric="mine", scores={"mine": torch.ones(3)})


def test_quantiles_by_hand():
    # torch.quantile interpolates: of 1, 2, 3, 4, 5 the quantile .5 is 3, .6 is 3.4; ties all count.
    def selected(scores, q, side):
        rule = ref.TokenRule(metric="mine", side=side, quantile=q, selected_scale=2.0, scope="batch")
        p, given = [[0.5] * 3, [0.5] * 3], {"mine": torch.tensor(scores, dtype=F64)}
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        out, _ = rollout_loss(ref.Objective(shaping=[rule]), p, [1.0, 1.0], scores=given, mask=mask)
        return out.weights.tolist()

    values = [[1.0, 5.0, 3.0], [4.0, 2.0, NAN]]
    assert selected(values, 0.5, "high") == [[1, 2, 2], [2, 1, 0]]
    assert selected(values, 0.6, "high") == [[1, 2, 1], [2, 1, 0]]
    assert selected(values, 0.6, "low") == [[2, 1, 2], [1, 2, 0]]
    assert selected(values, 1.0, "high") == [[1, 2, 1], [1, 1, 0]]
    assert selected(values, 0.0, "high") == [[2, 2, 2], [2, 2, 0]]
    assert selected([[1.0, 7.0, 7.0], [7.0, 0.0, NAN]], 0.9, "high") == [[1, 2, 2], [2, 1, 0]]


def test_a_function_metric_reads_what_the_batch_has():
    seen = {}

    def metric(t):
        for name in ("mask", "rollout", "position", "logprobs", "old_logprobs", "advantages", "weights", "polarity",
                     "ratio", "entropy", "selected"):  # fmt: skip
            seen[name] = getattr(t, name)
        seen.update(step=t.step, mine=t.scores["mine"], rollout_sum=t.rollout_sum(t.advantages))
        seen.update(rollout_mean=t.rollout_mean(t.advantages), batch_sum=t.batch_sum(t.advantages))
        seen.update(batch_mean=t.batch_mean(t.advantages))
        return t.scores["mine"]

    rule = ref.TokenRule(metric=metric, source="current", ratio=0.5, selected_scale=2.0)
    objective = ref.Objective(shaping=(ref.PolarityWeights(3.0, 1.0), rule))
    p, mask = [[0.5, 0.25, 0.9], [0.5, 0.9, 0.9]], torch.tensor([[1, 1, 0], [1, 0, 0]])
    scores = {"mine": torch.tensor([[2.0, 1.0, NAN], [5.0, NAN, NAN]])}
    ratio = [[1, 2, NAN], [1, NAN, NAN]]
    rollout_loss(objective, p, [1.0, -2.0], ratio, mask=mask, scores=scores, step=7)
    expected = {
        "mask": [1, 1, 0, 1, 0, 0], "rollout": [0, 0, 0, 1, 1, 1], "position": [0, 1, 2, 0, 1, 2],
        "advantages": [3, 3, 0, -2, 0, 0], "weights": [3, 3, 0, 1, 0, 0], "polarity": [1, 1, 0, -1, 0, 0],
        "logprobs": [LOG_HALF, math.log(0.25), 0, LOG_HALF, 0, 0], "selected": [0] * 6,
        "old_logprobs": [LOG_HALF, math.log(0.125), 0, LOG_HALF, 0, 0], "mine": [2, 1, 0, 5, 0, 0],
        "entropy": [LOG2, -0.25 * math.log(0.25) - 0.75 * math.log(0.75), 0, LOG2, 0, 0],
        "rollout_sum": [6, 6, 6, -2, -2, -2], "rollout_mean": [3, 3, 3, -2, -2, -2], "batch_sum": [4] * 6,
        "batch_mean": [4 / 3] * 6,
    }  # fmt: skip
    for name, values in expected.items():
        close(seen[name].double(), values)
    assert seen["step"] == 7 and seen["rollout"].dtype == seen["position"].dtype == torch.int64
    for name in ("logprobs", "entropy", "ratio"):
        rule = ref.TokenRule(metric=lambda t, name=name: getattr(t, name), source="old")
        with pytest.raises(ValueError, match="source 'current'"):
            rollout_loss(ref.Objective(shaping=[rule]), p, [1.0, 1.0])


# --- the covariance presets (2505.22617, verl's clip_cov and kl_cov) ---

# Advantages 3, 1, -1, -3 (mean 0); l - mean l = 1.0397, .3466, -.3466, -1.0397: covariances 3.119, .347, .347, 3.119.
P, A = [[0.8, 0.4, 0.2, 0.1]], [[3.0, 1.0, -1.0, -3.0]]


def test_kl_cov_by_hand():
    # max(1, floor(4 * .0002)) = 1 token: of the two equal ones the earlier. r = 1.5: all -A r, no clip; + .1 log 1.5.
    out, grad = rollout_loss(ref.kl_cov(), P, A, [[1.5] * 4])
    close(out.loss, 0.1 * math.log(1.5) / 4)
    close(grad, [[(-4.5 + 0.1) / 4, -1.5 / 4, 1.5 / 4, 4.5 / 4]])
    out, grad = rollout_loss(ref.kl_cov(ratio=0.5, penalty=2.0), P, A, [[1.5] * 4])
    close(grad, [[(-4.5 + 2) / 4, -1.5 / 4, 1.5 / 4, (4.5 + 2) / 4]])
    assert out.metrics["selected_fraction_positive"] == 0.5 and out.metrics["clip_fraction_high"] == 0


def test_clip_cov_by_hand():
    # cov = 3.119, .347, .347, 3.119: between 1 and 5 lie the first and the last. With r = 1 the clip cuts neither.
    one = [[1.0] * 4]
    out, grad = rollout_loss(ref.clip_cov(), P, A, one)
    close(out.loss, -(0 + 1 - 1 - 3) / 4)
    close(grad, [[0, -0.25, 0.25, 0.75]])
    close(rollout_loss(ref.clip_cov(ratio=0.5), P, A, one)[1], [[0, -0.25, 0.25, 0]])
    close(rollout_loss(ref.clip_cov(ratio=1.0), P, A, one)[1], [[0, -0.25, 0.25, 0]])  # there are no more
    close(rollout_loss(ref.clip_cov(ratio=0.5, high=3.0), P, A, one)[1], [[-0.75, -0.25, 0.25, 0.75]])
    # r = 1.5 of the first: the clip cuts it (A > 0), which leaves the last as the only candidate.
    out, grad = rollout_loss(ref.clip_cov(), P, A, [[1.5, 1, 1, 1]])
    close(grad, [[0, -0.25, 0.25, 0]])
    close(out.loss, (-3 * 1.2 - 1 + 1 + 0) / 4)
    assert out.metrics["clip_fraction_high"] == 0.25
    # A score decides between more candidates than are taken.
    scores = {"mine": torch.tensor([[0.0, 9.0, 9.0, 1.0]])}
    close(rollout_loss(ref.clip_cov(score="mine"), P, A, one, scores=scores)[1], [[-0.75, -0.25, 0.25, 0]])
