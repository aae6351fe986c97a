"""The reference's surrogates, regularisers and aggregations against examples worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from reference_examples import F64, INF, NAN, binary, close, random_logits, rollout_loss

import reference as ref

# --- surrogates: one token with p = .5, advantage A and ratio r; loss and dL/dlogp (= r dL/dr where r is live) ---

CLIP = ref.Clip(0.2, 0.28)
LOG_HALF = math.log(0.5)
SIGMOID = 1 / (1 + math.exp(-0.5))  # sigmoid(1 * (1.5 - 1))
SIGMOID_N = 1 / (1 + math.exp(-1.05 * 0.5))


@pytest.mark.parametrize(
    ("surrogate", "advantage", "ratio", "loss", "gradient", "low", "high"),
    [
        (CLIP, 2.0, 1.1, -2.2, -2.2, 0, 0),  # inside: -A r, derivative -A r
        (CLIP, 2.0, 1.5, -2.56, 0.0, 0, 1),  # -2 * 1.28, clipped
        (CLIP, 2.0, 0.5, -1.0, -1.0, 0, 0),  # max(-1, -1.6): a good token below the range is not clipped
        (CLIP, -2.0, 0.5, 1.6, 0.0, 1, 0),  # max(1, 1.6)
        (CLIP, -2.0, 1.5, 3.0, 3.0, 0, 0),
        (CLIP, 0.0, 1.5, 0.0, 0.0, 0, 0),
        (ref.Clip(dual_clip=3.0), -2.0, 4.0, 6.0, 0.0, 0, 0),  # min(8, 2 * 3)
        (ref.Clip(dual_clip=3.0), -2.0, 2.5, 5.0, 5.0, 0, 0),  # min(5, 6)
        (ref.Clip(dual_clip=3.0), 2.0, 4.0, -2.4, 0.0, 0, 1),  # only where A < 0
        (ref.Clip(delta=2.0), -2.0, 4.0, 4.0, 0.0, 0, 0),  # max(2 * min(4, 2), 2 * 1.2)
        (ref.Clip(delta=2.0), -2.0, 1.5, 3.0, 3.0, 0, 0),
        (ref.Cispo(), 2.0, 1.5, -1.28 * 2 * LOG_HALF, -2.56, 0, 1),  # -sg(min(r, 1.28)) A l: never cut off
        (ref.Cispo(), -2.0, 0.5, LOG_HALF, 1.0, 0, 0),
        (ref.Cispo(epsilon_low=0.2), -2.0, 0.5, 1.6 * LOG_HALF, 1.6, 1, 0),
        (ref.Sapo(), 2.0, 1.5, -8 * SIGMOID, -8 * SIGMOID * (1 - SIGMOID) * 1.5, 0, 0),
        (ref.Sapo(), -2.0, 1.5, 8 / 1.05 * SIGMOID_N, 8 * SIGMOID_N * (1 - SIGMOID_N) * 1.5, 0, 0),
        (ref.Sapo(), 2.0, 1.0, -4.0, -2.0, 0, 0),  # at r = 1 the slope is A: 4 sigma' = 1
        (ref.Reinforce(), 2.0, 1.5, -2 * LOG_HALF, -2.0, 0, 0),
    ],
)
def test_surrogates_by_hand(surrogate, advantage, ratio, loss, gradient, low, high):
    out, grad = rollout_loss(ref.Objective(surrogate=surrogate), [[0.5]], [advantage], [[ratio]])
    close(out.loss, loss)
    close(grad, [[gradient]])
    assert out.metrics["clip_fraction_low"] == low and out.metrics["clip_fraction_high"] == high
    assert out.metrics["active_fraction"] == (gradient != 0)
    assert out.metrics["dual_clip_fraction"] == (loss == 6.0)
    close(out.metrics["ratio_mean"], ratio)
    close(out.metrics["approx_kl"], -math.log(ratio))


def test_the_ratio_is_clamped_at_twenty():
    out, grad = rollout_loss(ref.Objective(surrogate=ref.Clip()), [[0.5]], [-1.0], [[math.exp(25)]])
    close(out.loss, math.exp(20))
    close(grad, [[0.0]])


def test_on_policy_the_ratio_is_exactly_one_even_at_minus_infinity():
    # -A r with r = 1: dL/dl = -A, and dL/dz = -A (one-hot - p) with p = [1, 0] and the target at -inf.
    z = torch.tensor([[[0.0, -INF]]], dtype=F64, requires_grad=True)
    out = ref.policy_loss(z, torch.tensor([[1]]), torch.tensor([2.0]), objective=ref.dapo())
    out.loss.backward()
    close(out.loss, -2.0)
    close(z.grad[0, 0], [2.0, -2.0])
    assert out.metrics["ratio_mean"] == 1 and out.metrics["approx_kl"] == 0
    # A row of NaN is still NaN.
    nan = torch.full((1, 1, 2), NAN, dtype=F64)
    assert ref.policy_loss(nan, torch.tensor([[1]]), torch.tensor([2.0]), objective=ref.dapo()).loss.isnan()


def test_sequence_ratio_by_hand():
    # Rollout 0: log-ratios log 1.2, log 1.2, log .9 * mean = (1.2 * 1.2 * .9)^(1/3) = 1.296^(1/3) = 1.0902...
    # Rollout 1: one token, r = 2: clipped at 1.2 for A > 0.
    r0 = 1.296 ** (1 / 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    ratio = [[1.2, 1.2, 0.9], [2.0, NAN, NAN]]
    out, grad = rollout_loss(ref.gspo(), [[0.5, 0.4, 0.3], [0.5, 0.5, 0.5]], [2.0, 1.0], ratio, mask=mask)
    close(out.loss, (-2 * r0 - 1.2) / 2)
    # dL/dl_t: the rollout's loss -2 r0 has derivative -2 r0 / 3 in every l_t; the mean over 2 rollouts halves it.
    close(grad, [[-r0 / 3] * 3, [0.0] * 3])
    close(out.metrics["ratio_mean"], (3 * r0 + 2) / 4)
    close(out.metrics["ratio_max"], 2.0)
    assert out.metrics["clip_fraction_high"] == 0.25


def test_kl_entropy_and_importance_weights_by_hand():
    # p = .5, reference .25: d = l - l_ref = log 2. k1 = log 2; k2 = log(2)^2 / 2; k3 = 1/2 + log 2 - 1;
    # on-policy r k3 = k3, with a derivative of k3 + 1/2.
    d = math.log(2)
    reference = torch.tensor([[0.25]], dtype=F64).log()
    cases = [("k1", d, 1.0), ("k2", d * d / 2, d), ("k3", d - 0.5, 0.5), ("k3-ratio", d - 0.5, d)]
    for estimator, value, slope in cases:
        objective = ref.grpo(kl_coef=0.1, kl_estimator=estimator)
        out, grad = rollout_loss(
            objective, [[0.5]], [2.0], ref_logprobs=reference, importance_weights=torch.tensor([3.0])
        )
        close(out.loss, -6 + 0.1 * value)  # importance weights scale the surrogate, not the KL term
        close(grad, [[-6 + 0.1 * slope]])
        close(out.metrics["kl"], value)
    # H of p = .8 by definition, and dH/dz_0 = -p (log p + H) for the entropy term -c H.
    h = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    logits, targets, _ = binary([[0.8]])
    out = ref.policy_loss(logits, targets, torch.tensor([0.0]), objective=ref.dapo(entropy_coef=0.5))
    out.loss.backward()
    close(out.loss, -0.5 * h)
    close(logits.grad[0, 0, 0], 0.5 * 0.8 * (math.log(0.8) + h))
    close(out.metrics["entropy"], h)
    assert out.metrics["active_fraction"] == 1  # through H alone
    with pytest.raises(ValueError, match="ref_logprobs"):
        rollout_loss(ref.grpo(kl_coef=0.1), [[0.5]], [2.0])


# --- aggregation: on-policy clip, so the loss of a token is -A ---

ADVANTAGES = [[1.0, 2.0, 3.0], [4.0, NAN, NAN], [NAN, NAN, NAN]]
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("aggregation", "expected", "numerator"),
    [
        ("token-mean", -10 / 4, -10),
        ("seq-mean-token-sum", -(6 + 4) / 2, -10),  # two rollouts have a token
        ("seq-mean-token-mean", -(2 + 4) / 2, -6),
        ("seq-mean-token-sum-norm", -10 / (3 * 3), -10),  # all three rollouts, length T = 3
    ],
)
def test_aggregation_by_hand(aggregation, expected, numerator):
    objective = ref.Objective(aggregation=aggregation)
    p = torch.full((3, 3), 0.5)
    close(rollout_loss(objective, p, ADVANTAGES, mask=MASK)[0].loss, expected)
    for denominator in (8, torch.tensor(8.0)):
        out, _ = rollout_loss(objective, p, ADVANTAGES, mask=MASK, denominator=denominator)
        close(out.loss, numerator / 8)
    if aggregation.endswith("norm"):
        close(rollout_loss(objective, p, ADVANTAGES, mask=MASK, max_length=10)[0].loss, -10 / 30)


def test_a_denominator_over_selected_tokens_by_hand():
    # psr keeps rollout 0 (A = 1, 2 tokens of loss -1) and drops rollout 1: -2 over 2 tokens, not over 3.
    advantages, mask = [1.0, -1.0], torch.tensor([[1, 1], [1, 0]])
    p = torch.full((2, 2), 0.5)
    for aggregation, over_selected, over_all in [
        ("token-mean", -2 / 2, -2 / 3),
        ("seq-mean-token-sum", -2 / 1, -2 / 2),
        ("seq-mean-token-mean", -1 / 1, -1 / 2),
        ("seq-mean-token-sum-norm", -2 / 4, -2 / 4),
    ]:
        objective = ref.psr(aggregation=aggregation)
        close(rollout_loss(objective, p, advantages, mask=mask)[0].loss, over_selected)
        objective = replace(objective, normalize_over="all")
        close(rollout_loss(objective, p, advantages, mask=mask)[0].loss, over_all)


def test_padded_and_packed_agree():
    z, targets = random_logits(3, 4, 6)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    on, cu = mask.bool(), torch.tensor([0, 4, 4, 6], dtype=torch.int32)
    advantages = torch.tensor([1.5, 0.3, -0.7], dtype=F64)
    old = torch.log_softmax(z + 0.3 * random_logits(3, 4, 6, seed=2)[0], -1).gather(-1, targets[..., None])[..., 0]
    for objective in (ref.a3po(entropy_coef=0.1), ref.gspo(), ref.fork_tokens(), ref.dr_grpo()):
        padded = ref.policy_loss(z, targets, advantages, objective=objective, old_logprobs=old, mask=mask)
        packed = ref.policy_loss(
            z[on], targets[on], advantages, objective=objective, old_logprobs=old[on], cu_seqlens=cu, max_length=4
        )
        close(packed.loss, padded.loss)
        for a, b in zip(packed[1:4], padded[1:4], strict=True):
            assert a.equal(b[on]) and b[~on].eq(0).all()
        for name, value in packed.metrics.items():
            close(value, padded.metrics[name])


def test_per_rollout_advantages_win_where_s_equals_n():
    # Three segments of 0, 2 and 1 tokens: [1, 2, 3] are the rollouts' advantages, so the tokens have 2, 2, 3.
    out, _ = rollout_loss(ref.dapo(), [0.5] * 3, [1.0, 2.0, 3.0], cu_seqlens=torch.tensor([0, 0, 2, 3]))
    close(out.loss, -(2 + 2 + 3) / 3)


@pytest.mark.parametrize("objective", [ref.a3po(kl_coef=0.1), ref.lp_reg(), ref.gspo(), ref.dr_grpo(), ref.psr()])
def test_nothing_to_sum_is_zero_not_nan(objective):
    packed = {"cu_seqlens": torch.tensor([0, 0, 0]), "max_length": 5}
    masked = {"mask": torch.zeros(2, 3)}
    for shape, kwargs in [((0, 4), packed), ((2, 3, 4), masked)]:
        z = torch.full(shape, NAN, dtype=F64, requires_grad=True)
        targets = torch.zeros(shape[:-1], dtype=torch.long)
        old = torch.full(targets.shape, NAN, dtype=F64)
        kwargs = kwargs | {"old_logprobs": old, "ref_logprobs": old, "min_p_logprobs": old}
        out = ref.policy_loss(z, targets, torch.tensor([NAN, 1.0]), objective=objective, **kwargs)
        out.loss.backward()
        assert out.loss == 0 and z.grad.eq(0).all()
        assert all(value == 0 for name, value in out.metrics.items() if name != "weight")
