"""The reference's shaping, presets and checks against examples worked out by hand."""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from reference_examples import F64, INF, NAN, binary, close, random_logits, rollout_loss

import reference as ref

# --- shaping and presets ---


def test_polarity_presets_by_hand():
    # Advantages 2, -3, 0 of one token each, losses -2, 3, 0.
    p, a = [[0.5]] * 3, [2.0, -3.0, 0.0]
    out, grad = rollout_loss(ref.psr(), p, a)
    close(out.loss, -2.0)
    close(grad[:, 0], [-2.0, 0, 0])
    close(rollout_loss(ref.nsr(), p, a)[0].loss, 3.0)
    out, _ = rollout_loss(ref.w_reinforce(), p, a)
    close(out.loss, (-0.2 + 3) / 3)
    close(out.weights[:, 0], [0.1, 1, 1])
    # `polarity` overrides the sign of A: now the second rollout is the positive one.
    out, _ = rollout_loss(ref.psr(), p, a, polarity=torch.tensor([-1, 1, 0]))
    close(out.loss, 3.0)
    with pytest.raises(ValueError, match="polarity"):
        rollout_loss(ref.psr(), p, a, polarity=torch.tensor([2, 1, 0]))


def test_dropped_tokens_leave_altogether_and_zero_advantage_stays():
    # grpo-like with k1 against l_ref = log .25 and A = 0: only the KL term, log 2 each. Dropping -1 leaves one of two.
    reference = torch.full((2, 1), math.log(0.25), dtype=F64)
    reference[1] = NAN  # of the dropped token: must not matter
    objective = ref.psr(kl_coef=1.0, kl_estimator="k1", entropy_coef=1.0)
    out, grad = rollout_loss(objective, [[0.5]] * 2, [0.0, 0.0], ref_logprobs=reference, polarity=torch.tensor([1, -1]))
    close(out.loss, math.log(2) - math.log(2))  # KL log 2, entropy of a fair coin log 2
    assert grad[1] == 0 and out.weights.tolist() == [[1], [0]]
    # dropping is by weight, not by advantage: the zero-advantage rollout kept its terms above, and counts here
    close(rollout_loss(ref.dapo(), [[0.5]] * 2, [0.0, 2.0])[0].loss, -1.0)


def test_fork_tokens_by_hand():
    # Entropy of p is highest nearest .5. Six tokens in two rollouts, k = max(1, floor(6 * .4)) = 2: p = .5 and .6.
    p, a = [[0.9, 0.5, 0.95], [0.6, 0.99, 0.8]], [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    out, grad = rollout_loss(ref.fork_tokens(ratio=0.4), p, a)
    assert out.weights.tolist() == [[0, 1, 0], [1, 0, 0]]
    close(out.loss, -(2 + 4) / 2)
    close(grad, [[0, -1, 0], [-2, 0, 0]])
    close(rollout_loss(ref.fork_tokens(ratio=0.4, normalize_over="all"), p, a)[0].loss, -(2 + 4) / 6)
    out, _ = rollout_loss(ref.fork_tokens(ratio=0.4, rounding="ceil"), p, a)  # ceil(2.4) = 3: .8 too
    close(out.loss, -(2 + 4 + 6) / 3)
    assert out.metrics["selected_fraction_positive"] == 0.5 and out.metrics["active_fraction"] == 0.5


def test_a3po_by_hand():
    # Ten tokens a rollout, 20 % = 2. Positive: the two lowest old probabilities, .05 and .1; negative: the two highest,
    # .95 and .9. beta(100) = 2 - .005 * 100 = 1.5. With r = 1 for all tokens the loss is -(10 + 2/2) + 2 (10 + 2/2).
    old = [0.5, 0.1, 0.9, 0.3, 0.05, 0.6, 0.7, 0.95, 0.2, 0.4]
    p = [old, old]
    out, grad = rollout_loss(ref.a3po(), p, [1.0, -2.0], [[1.0] * 10] * 2, step=100)
    positive, negative = [1.0] * 10, [1.0] * 10
    positive[1] = positive[4] = negative[2] = negative[7] = 1.5
    assert out.weights.tolist() == [positive, negative]
    close(out.loss, (-11 + 22) / 20)
    close(grad, [[-w / 20 for w in positive], [2 * w / 20 for w in negative]])
    m = out.metrics
    assert m["weight"] == 1.5 and m["selected_fraction_positive"] == m["selected_fraction_negative"] == 0.2
    assert rollout_loss(ref.a3po(), p, [1.0, -2.0], step=torch.tensor(1000))[0].weights.eq(1).all()  # beta = 1


def test_a3po_is_the_threshold_rule_of_the_paper():
    """Weights from thresholds: w = beta where pi_old <= tau+ (A > 0) or pi_old >= tau- (A < 0), per rollout."""
    z, targets = random_logits(6, 25, 11)
    mask = torch.arange(25) < torch.tensor([25, 20, 9, 4, 1, 0])[:, None]
    advantages = torch.tensor([1.0, -1.0, -2.0, 3.0, 1.0, 1.0], dtype=F64)
    old = torch.log_softmax(random_logits(6, 25, 11, seed=5)[0], -1).gather(-1, targets[..., None])[..., 0]
    out = ref.policy_loss(z, targets, advantages, objective=ref.a3po(rho=3.0), old_logprobs=old, mask=mask)
    for b in range(5):
        probability = old[b][mask[b]].exp()
        k = max(1, len(probability) // 5)
        if advantages[b] > 0:
            boosted = probability <= probability.sort().values[k - 1]
        else:
            boosted = probability >= probability.sort(descending=True).values[k - 1]
        close(out.weights[b][mask[b]], torch.where(boosted, 3.0, 1.0))
    assert out.weights[~mask].eq(0).all()


def test_token_rules_compose():
    # Rule 1 drops the less probable half of all tokens; rule 2 doubles the best half of what is left (1 of 2), of
    # which only the positive are eligible: per-token advantages give each token its own sign.
    rules = (
        ref.TokenRule(side="high", ratio=0.5, rest_scale=0.0),
        ref.TokenRule(polarity=1, side="high", ratio=0.5, selected_scale=lambda step: 2.0 + step, rest_scale=0.5),
    )
    out, _ = rollout_loss(
        ref.Objective(shaping=rules), [[0.9, 0.8, 0.7, 0.1, 0.2, 0.3]], [[-1.0, 1, 1, 1, 1, 1]], step=1
    )
    assert out.weights.tolist() == [[1, 3, 0.5, 0, 0, 0]]
    assert out.metrics["weight"] == 1.0  # of the first rule
    assert out.metrics["selected_fraction_positive"] == 0.4 and out.metrics["selected_fraction_negative"] == 1.0


def test_sources_of_a_rule():
    def weights(metric, source, **kwargs):
        rule = ref.TokenRule(metric=metric, source=source, side="high", ratio=0.4, selected_scale=2.0)
        return rollout_loss(ref.Objective(shaping=(rule,)), [[0.5, 0.8, 0.6]], [1.0], **kwargs)[0].weights[0].tolist()

    ratio = {"r": [[0.5, 1.0, 0.6]]}  # old p = 1, .8, 1: the first; r is p over old p
    assert weights("probability", "current", **ratio) == [1, 2, 1]
    assert weights("probability", "old", **ratio) == [2, 1, 1]
    assert weights("probability", "old") == [1, 2, 1]
    assert weights("entropy", "old") == weights("entropy", "current", **ratio) == [2, 1, 1]
    assert weights("entropy", "old", old_entropy=torch.tensor([[0.1, 0.2, 0.3]]), **ratio) == [1, 1, 2]
    with pytest.raises(ValueError, match="old_entropy"):
        weights("entropy", "old", **ratio)


def test_lp_reg_by_hand():
    # Four tokens with A = -1, one with A = +1; q = .5: k = floor(4 * .5) = 2 candidates, p = .1 and .2. t = log .3 for
    # p = .1 (regularised: l < t), t = -inf for p = .2 (filtered: left alone). With r = 1, e^(t-l) = 3:
    # loss of the token = 1 + 2 (3 - log 3 - 1), dL/dl = 1 + 2 (-3 + 1) = -3. The others: -A = 1, 1, 1, -1.
    p, a = [[0.1, 0.2, 0.6, 0.7, 0.05]], [[-1.0, -1, -1, -1, 1]]
    t = torch.tensor([[0.3, 0.0, 0.9, 0.9, 0.9]], dtype=F64).log()
    one = [[1.0] * 5]
    out, grad = rollout_loss(ref.lp_reg(quantile=0.5, beta=2.0), p, a, one, min_p_logprobs=t)
    close(out.loss, (1 + 2 * (2 - math.log(3)) + 3 - 1) / 5)
    close(grad, [[-3 / 5, 1 / 5, 1 / 5, 1 / 5, -1 / 5]])
    # k = floor(4 * .3) = 1 is not above 1: nothing is regularised.
    close(rollout_loss(ref.lp_reg(quantile=0.3), p, a, one, min_p_logprobs=t)[0].loss, 3 / 5)
    # The penalty is clamped at 10: e^(t-l) = 1000, gradient 0; only -A r is left.
    far = torch.full((1, 5), math.log(0.9), dtype=F64)
    p = [[0.0009, 0.2, 0.6, 0.7, 0.05]]
    out, grad = rollout_loss(ref.lp_reg(quantile=0.5), p, a, one, min_p_logprobs=far)
    close(grad[0, 0], 1 / 5)
    # The other candidate, p = .2, has e^(t-l) = 4.5, which is below the clamp.
    close(out.loss, ((1 + 10) + (1 + 4.5 - math.log(4.5) - 1) + 1 + 1 - 1) / 5)
    # On-policy t comes from the current logits; off-policy it has to be given.
    logits, targets, _ = binary(p)
    given_t = ref.min_p_token_logprobs(logits, targets, 0.02)
    implied = rollout_loss(ref.lp_reg(quantile=0.5), p, a)[0].loss
    close(implied, rollout_loss(ref.lp_reg(quantile=0.5), p, a, one, min_p_logprobs=given_t)[0].loss)
    with pytest.raises(ValueError, match="min_p_logprobs"):
        rollout_loss(ref.lp_reg(), p, a, one)


@pytest.mark.parametrize(
    ("ratio", "override", "metric"),
    [(0.5, {"epsilon_low": 0.2}, "clip_fraction_low"), (6.0, {"dual_clip": 3.0}, "dual_clip_fraction")],
)
def test_lp_reg_replaced_tokens_are_not_clipped(ratio, override, metric):
    # All four ratios are past the bound; the two candidates (k = floor(4 * .5)) have l < t and leave the surrogate.
    # p r^-1 is not a probability at r = .5, but only l - l_old is ever used.
    t = torch.tensor([[0.3, 0.3, 0.9, 0.9]], dtype=F64).log()
    p, objective = [[0.1, 0.2, 0.6, 0.7]], ref.lp_reg(quantile=0.5, **override)
    out, _ = rollout_loss(objective, p, [-1.0], [[ratio] * 4], min_p_logprobs=t)
    assert out.metrics[metric] == 0.5
    # t = -inf filters every candidate: all four tokens keep the surrogate, and all are clipped.
    out, _ = rollout_loss(objective, p, [-1.0], [[ratio] * 4], min_p_logprobs=torch.full_like(t, -INF))
    assert out.metrics[metric] == 1.0


def test_schedules():
    assert [ref.LinearDecay()(s) for s in (0, 100, 500)] == [2.0, 1.5, 1.0]
    assert ref.Constant(3)(7) == 3.0
    close(ref.ExponentialDecay(2.0, 0.1)(10), 1 + math.exp(-1))
    close([ref.CosineDecay(3.0, 10)(s) for s in (0, 5, 10, 99)], [3.0, 2.0, 1.0, 1.0])


def test_presets_are_the_table():
    table = {
        "grpo": (ref.Clip(0.2, 0.2), "seq-mean-token-mean", "all"),
        "dr_grpo": (ref.Clip(0.2, 0.2), "seq-mean-token-sum-norm", "all"),
        "dapo": (ref.Clip(0.2, 0.28), "token-mean", "all"),
        "psr": (ref.Clip(0.2, 0.2), "token-mean", "selected"),
        "nsr": (ref.Clip(0.2, 0.2), "token-mean", "selected"),
        "w_reinforce": (ref.Clip(0.2, 0.2), "token-mean", "all"),
        "fork_tokens": (ref.Clip(0.2, 0.28), "token-mean", "selected"),
        "lp_reg": (ref.Clip(1.0, 9.0), "token-mean", "all"),
        "a3po": (ref.Clip(0.2, 0.28), "token-mean", "all"),
        "gspo": (ref.Clip(0.2, 0.2), "seq-mean-token-mean", "all"),
        "cispo": (ref.Cispo(1.28, None), "token-mean", "all"),
        "sapo": (ref.Sapo(1.0, 1.05), "seq-mean-token-mean", "all"),
    }
    for name, (surrogate, aggregation, normalize_over) in table.items():
        objective = getattr(ref, name)()
        assert (objective.surrogate, objective.aggregation, objective.normalize_over) == (
            surrogate, aggregation, normalize_over,
        )  # fmt: skip
        assert objective.kl_coef == objective.entropy_coef == 0 and objective.kl_estimator == "k3"
        assert (objective.ratio_level == "sequence") == (name == "gspo")
        assert (objective.low_probability is not None) == (name == "lp_reg")
        changed = getattr(ref, name)(kl_coef=0.1, kl_estimator="k1", entropy_coef=0.2, aggregation="seq-mean-token-sum")
        assert (changed.kl_coef, changed.kl_estimator, changed.entropy_coef) == (0.1, "k1", 0.2)
        assert changed.aggregation == "seq-mean-token-sum" and changed.shaping == objective.shaping
    overridden = ref.a3po(ratio=0.3, schedule=ref.Constant(4.0), epsilon_low=0.1, dual_clip=3.0, delta=5.0)
    assert overridden.surrogate == ref.Clip(0.1, 0.28, 3.0, 5.0)
    assert [(r.polarity, r.side, r.ratio, r.selected_scale(0)) for r in overridden.shaping] == [
        (1, "low", 0.3, 4.0), (-1, "high", 0.3, 4.0),
    ]  # fmt: skip


def test_bad_values_are_refused():
    for call in (
        lambda: ref.Clip(epsilon_low=-0.1), lambda: ref.dapo(dual_clip=1.0), lambda: ref.dapo(delta=0.0),
        lambda: ref.sapo(tau_positive=0.0), lambda: ref.a3po(ratio=0.0), lambda: ref.a3po(metric="loss"),
        lambda: ref.grpo(aggregation="mean"), lambda: ref.grpo(kl_estimator="k4"), lambda: ref.lp_reg(min_p=2.0),
        lambda: ref.PolarityWeights(positive=-1.0), lambda: ref.TokenRule(polarity=0), lambda: ref.CosineDecay(2.0, 0),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            call()
    for call in (lambda: ref.sapo(epsilon_low=0.1), lambda: ref.cispo(dual_clip=3.0), lambda: ref.Objective((1,))):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(FrozenInstanceError):
        ref.dapo().kl_coef = 1.0


def test_bad_shapes_are_refused_by_name():
    p = torch.full((2, 3), 0.5)
    for advantages in (torch.ones(3), torch.ones(6), torch.ones(2, 1), torch.ones(())):
        with pytest.raises(ValueError, match="advantages"):
            rollout_loss(ref.dapo(), p, advantages)
    with pytest.raises(ValueError, match="ref_logprobs"):
        rollout_loss(ref.dapo(), p, torch.ones(2), ref_logprobs=torch.ones(2))
    with pytest.raises(ValueError, match="cu_seqlens"):
        rollout_loss(ref.dapo(), p, torch.ones(2), cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        rollout_loss(ref.dapo(), p[0], torch.ones(1))
    with pytest.raises(ValueError, match="max_length"):
        rollout_loss(ref.dr_grpo(), p[0], torch.ones(1), cu_seqlens=torch.tensor([0, 3]))


@pytest.mark.parametrize(
    "objective",
    [
        ref.grpo(kl_coef=0.1, entropy_coef=0.05, dual_clip=2.0),
        ref.a3po(kl_coef=0.1, kl_estimator="k2"),
        ref.gspo(entropy_coef=0.1),
        ref.sapo(kl_coef=0.1),
        ref.Objective(surrogate=ref.Reinforce(), entropy_coef=0.1),
    ],
)
def test_gradcheck_of_the_loss(objective):
    z, targets = random_logits(2, 3, 4)
    noise = random_logits(2, 2, 3, seed=3, scale=0.3)[0]
    now = torch.log_softmax(z, -1).gather(-1, targets[..., None])[..., 0]
    kwargs = {
        "old_logprobs": now + noise[0],
        "ref_logprobs": now + noise[1],
        "mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    advantages = torch.tensor([1.3, -0.8], dtype=F64)

    def loss(x):
        return ref.policy_loss(x, targets, advantages, objective=objective, **kwargs).loss

    assert torch.autograd.gradcheck(loss, z.requires_grad_())
