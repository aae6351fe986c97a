"""The reference's statistics and selection against torch, autograd and examples worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_examples import F64, INF, NAN, close, random_logits

import reference as ref

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


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_group_of_equal_rewards_has_advantage_exactly_zero(dtype):
    # The mean of three (fp64) or eleven (fp32) times .7 is not .7; the residue over 1e-6 would be 1e-10 or 0.1.
    for n in (2, 3, 11):
        for normalize in ("std", "none"):
            assert ref.group_advantages(torch.full((n,), 0.7, dtype=dtype), [0] * n, normalize).eq(0).all()
