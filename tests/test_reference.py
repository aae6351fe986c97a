"""The reference against what is known without it: torch, autograd, and examples worked out by hand.

Examples use a vocabulary of two with logits [log p, log(1 - p)] and target 0, so that logp = log p, and
old_logprobs = log p - log r, so that the ratio is r. On-policy (r = 1) the clip's loss of a token is just -A.
"""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference as ref

F64 = torch.float64
INF, NAN = math.inf, math.nan


def close(actual, expected, tol=1e-12):
    expected = torch.as_tensor(expected, dtype=F64)
    torch.testing.assert_close(torch.as_tensor(actual, dtype=F64), expected, rtol=tol, atol=tol, equal_nan=True)


def random_logits(*shape, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, generator=generator, dtype=F64)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


def binary(p, r=None):
    """Logits, targets and (with r) old log-probabilities of tokens with probability p and ratio r."""
    p = torch.as_tensor(p, dtype=F64)
    logits = torch.stack([p.log(), (1 - p).log()], -1).requires_grad_()
    targets = torch.zeros(p.shape, dtype=torch.long)
    return logits, targets, None if r is None else p.log() - torch.as_tensor(r, dtype=F64).log()


def rollout_loss(objective, p, advantages, r=None, **kwargs):
    """Loss and dL/dlogp. With V = 2, dL/dz_0 = dL/dlogp (1 - p) + dL/dH p(1 - p)(...); no entropy term here."""
    logits, targets, old = binary(p, r)
    out = ref.policy_loss(
        logits, targets, torch.as_tensor(advantages, dtype=F64), objective=objective, old_logprobs=old, **kwargs
    )
    out.loss.backward()
    return out, logits.grad[..., 0] / (1 - torch.as_tensor(p, dtype=F64))


# --- token statistics ---


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 4),
    vocabulary=st.integers(1, 9),
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    scale=st.sampled_from([1.0, 0.3]),
)
def test_statistics_are_those_of_torch(rows, vocabulary, seed, temperature, softcap, scale):
    z, targets = random_logits(rows, vocabulary, seed=seed)
    y = scale * z
    x = (y if softcap is None else softcap * torch.tanh(y / softcap)) / temperature
    out = ref.token_logprobs(z, targets, temperature=temperature, softcap=softcap, logit_scale=scale)
    close(out.logprobs, torch.log_softmax(x, -1).gather(-1, targets[:, None])[:, 0])
    close(out.entropy, torch.distributions.Categorical(logits=x, validate_args=False).entropy())


def test_any_leading_dimensions_and_a_temperature_per_token():
    z, targets = random_logits(2, 3, 2, 5)
    tau = 0.5 + torch.arange(12, dtype=F64).reshape(2, 3, 2) / 8
    out = ref.token_logprobs(z, targets, temperature=tau)
    close(out.logprobs, torch.log_softmax(z / tau[..., None], -1).gather(-1, targets[..., None])[..., 0])
    same = ref.token_logprobs(z, targets, temperature=torch.tensor(0.7)).entropy
    close(same, ref.token_logprobs(z, targets, temperature=torch.tensor(0.7).item()).entropy)
    assert ref.token_logprobs(z[0, 0, 0], targets[0, 0, 0]).logprobs.shape == ()


def test_dtypes():
    z, targets = random_logits(3, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert ref.token_logprobs(z.to(dtype), targets).entropy.dtype == torch.float32
    close(ref.token_logprobs(z.float(), targets).logprobs, ref.token_logprobs(z, targets).logprobs, 1e-5)


def test_gradcheck():
    z, targets = random_logits(3, 4)
    kwargs = {"temperature": torch.tensor([0.6, 1.0, 1.4], dtype=F64), "softcap": 3.0, "logit_scale": 0.7}
    assert torch.autograd.gradcheck(lambda x: tuple(ref.token_logprobs(x, targets, **kwargs)), z.requires_grad_())


@pytest.mark.parametrize("softcap", [None, 2.5])
def test_closed_form_gradient_is_that_of_autograd(softcap):
    z, targets = random_logits(6, 7)
    z[0, 2] = z[0, 5] = -INF  # masked vocabulary
    targets[0], z[1, 3], targets[1], targets[2] = 1, -INF, 3, -100  # target at -inf; ignored
    z[3] = NAN
    mask = torch.tensor([1, 1, 1, 0, 1, 1])
    tau = torch.linspace(0.5, 1.5, 6, dtype=F64)
    g_lp, g_h = random_logits(2, 6, seed=1)[0]
    kwargs = {"temperature": tau, "softcap": softcap, "logit_scale": 0.8, "mask": mask}
    z.requires_grad_()
    out = ref.token_logprobs(z, targets, **kwargs)
    for a, b in [(g_lp, g_h), (g_lp, None), (None, g_h)]:
        pairs = [(o, g) for o, g in zip(out, (a, b), strict=True) if g is not None]
        (auto,) = torch.autograd.grad([p[0] for p in pairs], z, [p[1] for p in pairs], retain_graph=True)
        close(ref.logits_gradient(z, targets, a, b, **kwargs), auto)
        assert auto[2].eq(0).all() and auto[3].eq(0).all() and auto.isfinite().all()


def test_minus_infinity_is_masked_vocabulary():
    # Two live entries, equal: logp = -log 2, H = log 2, dlogp/dz = [1 - 1/2, 0, -1/2], dH/dz = 0 at the maximum of H.
    z = torch.tensor([0.0, -INF, 0.0], dtype=F64, requires_grad=True)
    for softcap in (None, 5.0):
        out = ref.token_logprobs(z, torch.tensor(0), softcap=softcap)
        close(torch.stack(out), [-math.log(2), math.log(2)])
        close(torch.autograd.grad(out.logprobs, z, retain_graph=True)[0], [0.5, 0, -0.5])
        close(torch.autograd.grad(out.entropy, z)[0], [0, 0, 0])
        # The target itself at -inf: logp = -inf as in torch, and the gradient is the one-hot less p.
        out = ref.token_logprobs(z, torch.tensor(1), softcap=softcap)
        assert out.logprobs.item() == -INF
        close(torch.autograd.grad(out.logprobs, z)[0], [-0.5, 1, -0.5])


@pytest.mark.parametrize("row", [[NAN, 0.0], [INF, 0.0], [0.0, INF], [-INF, -INF], [INF, -INF]])
def test_bad_rows_are_nan_and_touch_no_other(row):
    z = torch.tensor([row, [0.0, 0.0]], dtype=F64, requires_grad=True)
    for softcap in (None, 3.0):
        out = ref.token_logprobs(z, torch.tensor([1, 0]), softcap=softcap)
        close(out.logprobs, [NAN, -math.log(2)])
        close(out.entropy, [NAN, math.log(2)])
        assert ref.min_p_token_logprobs(z, torch.tensor([1, 0]), softcap=softcap)[0].isnan()
        close(torch.autograd.grad(out.logprobs[1] + out.entropy[1], z)[0][1], [0.5, -0.5])


def test_rows_that_are_not_tokens_are_exactly_zero():
    z = torch.tensor([[NAN, INF], [1.0, 2.0], [NAN, 0.0]], dtype=F64, requires_grad=True)
    out = ref.token_logprobs(z, torch.tensor([-100, 1, 77]), mask=torch.tensor([1, 1, 0]))
    assert out.logprobs[[0, 2]].tolist() == out.entropy[[0, 2]].tolist() == [0, 0]
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert z.grad[[0, 2]].eq(0).all() and z.grad[1].ne(0).all()


def test_bad_arguments_of_the_statistics():
    z, targets = random_logits(2, 3)
    for bad in (3, -1):
        with pytest.raises(IndexError):
            ref.token_logprobs(z, torch.tensor([0, bad]))
    for kwargs in ({"temperature": 0.0}, {"softcap": 0.0}, {"logit_scale": -1.0}, {"mask": torch.ones(3)}):
        with pytest.raises(ValueError):
            ref.token_logprobs(z, targets, **kwargs)
    with pytest.raises(ValueError):
        ref.token_logprobs(z, targets[:1])
    with pytest.raises(TypeError):
        ref.token_logprobs(z, targets.double())


def test_min_p():
    # p = .9, .09, .01: at kappa = .02 the bound is .018, so the last is filtered and .99 is left to renormalise by.
    z = torch.tensor([0.9, 0.09, 0.01], dtype=F64).log().expand(4, 3)
    t = ref.min_p_token_logprobs(z, torch.tensor([0, 1, 2, -100]), 0.02)
    close(t, [math.log(0.9 / 0.99), math.log(0.09 / 0.99), -INF, 0.0])
    # Temperature plays no part, scale does: p^2 normalised is .81 : .0081, below kappa = .02 (bound .0162).
    assert ref.min_p_token_logprobs(z, torch.tensor([1] * 4), logit_scale=2.0)[0].item() == -INF


# --- selection ---


def picked(metric, **kwargs):
    return torch.nonzero(ref.select_tokens(torch.tensor(metric), **kwargs)).tolist()


def test_selection_by_hand():
    # n = 7: floor(7 * .3) = 2, ceil(7 * .3) = 3; ties go to the earlier position.
    metric = [3.0, 1.0, 2.0, 1.0, 1.0, 3.0, 3.0]
    assert picked(metric, ratio=0.3, side="low") == [[1], [3]]
    assert picked(metric, ratio=0.3, side="low", rounding="ceil") == [[1], [3], [4]]
    assert picked(metric, ratio=0.3, side="high") == [[0], [5]]
    assert picked(metric, ratio=0.01, side="high") == [[0]]  # at least one
    assert picked(metric, ratio=0.3, side="low", mask=torch.tensor([1, 0, 1, 1, 1, 1, 1])) == [[3]]  # n = 6: 1
    assert picked(metric, ratio=1.0, side="low", mask=torch.zeros(7)) == []
    # .29 of 100 is 29, although 100 * .29 is 28.999999999999996.
    assert len(picked([0.0] * 100, ratio=0.29, side="low")) == 29


def test_selection_of_unusual_values():
    assert picked([0.0, -0.0, NAN, INF], ratio=0.25, side="low") == [[0]]
    assert picked([-0.0, 0.0, NAN, INF], ratio=0.25, side="low") == [[0]]
    assert picked([1.0, INF, NAN, NAN], ratio=0.25, side="high") == [[2]]
    assert picked([NAN, INF, -INF, NAN], ratio=0.75, side="low") == [[0], [1], [2]]


def test_selection_scopes():
    # Rollouts {5, 1 | - | 2, 4, 3}: per rollout 1 each of floor(2 * .5), floor(3 * .5); batch: floor(5 * .5) = 2.
    metric, cu = [5.0, 1.0, 2.0, 4.0, 3.0], torch.tensor([0, 2, 2, 5])
    assert picked(metric, cu_seqlens=cu, ratio=0.5, side="low") == [[1], [2]]
    assert picked(metric, cu_seqlens=cu, ratio=0.5, side="high", scope="batch") == [[0], [3]]
    assert picked([[5.0, 1.0], [2.0, 4.0]], ratio=0.5, side="low") == [[0, 1], [1, 0]]
    assert picked([[5.0, 4.0], [2.0, 1.0]], ratio=0.5, side="low", scope="global") == [[1, 0], [1, 1]]
    for kwargs in ({"ratio": 0.0}, {"ratio": 1.1}, {"side": "top"}, {"scope": "all"}, {"rounding": "up"}):
        with pytest.raises(ValueError):
            picked(metric, **({"ratio": 0.5, "side": "low"} | kwargs))
    for bad in ([0, 4], [1, 5], [0, 3, 2, 5]):
        with pytest.raises(ValueError):
            picked(metric, cu_seqlens=torch.tensor(bad), ratio=0.5, side="low")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 100), st.sampled_from(["low", "high"]))
def test_selection_is_a_stable_sort(values, percent, side):
    metric = torch.tensor(values, dtype=F64)
    order = torch.sort(metric, descending=side == "high", stable=True).indices
    k = max(1, len(values) * percent // 100)
    assert picked(metric.tolist(), ratio=percent / 100, side=side) == [[i] for i in sorted(order[:k].tolist())]


def test_group_advantages():
    # Group a: 1, 0, 0, 1: mean 1/2, unbiased sigma sqrt(4 (1/4) / 3) = 1/sqrt 3. Group b: one: A = R. Group c: equal.
    rewards = torch.tensor([1, 5, 0, 0, 1, 2, 2], dtype=F64)
    ids = ["a", "b", "a", "a", "a", "c", "c"]
    a = 0.5 / (1 / math.sqrt(3) + 1e-6)
    close(ref.group_advantages(rewards, ids), [a, 5, -a, -a, a, 0, 0])
    close(ref.group_advantages(rewards, ids, "none"), [0.5, 5, -0.5, -0.5, 0.5, 0, 0])
    close(ref.group_advantages(rewards.long(), torch.tensor([0, 1, 0, 0, 0, 2, 2])), [a, 5, -a, -a, a, 0, 0], 1e-6)
    with pytest.raises(ValueError):
        ref.group_advantages(rewards, ids[1:])


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
    # p = .5, reference .25: d = l - l_ref = log 2. k1 = log 2; k2 = log(2)^2 / 2; k3 = 1/2 + log 2 - 1.
    d = math.log(2)
    reference = torch.tensor([[0.25]], dtype=F64).log()
    for estimator, value, slope in [("k1", d, 1.0), ("k2", d * d / 2, d), ("k3", 0.5 + d - 1, 0.5)]:
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
