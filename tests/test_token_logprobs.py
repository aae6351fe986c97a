"""token_logprobs and min_p_token_logprobs against fp64, at the edges of their domain."""

from __future__ import annotations

import math

import pytest
import torch
import triton
from batches import DTYPES, INTERPRETED, largest_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import a3po_kernels
import reference

EXAMPLES = 6 if INTERPRETED else 60
WIDE = (1, 2, 257, 32000, 151936)


def random_rows(seed, rows, vocabulary, dtype, device, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    return logits.to(device), torch.randint(0, vocabulary, (rows,), generator=generator).to(device)


def both(logits, targets, backend, weights=None, **options):
    """((logp, entropy, gradient) of ours, the same of the reference in fp64)."""
    results = []
    generator = torch.Generator().manual_seed(0)
    grads = weights or tuple(torch.randn(targets.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    for module, dtype, device in ((a3po_kernels, logits.dtype, logits.device), (reference, torch.float64, "cpu")):
        z = logits.detach().to(device=device, dtype=dtype).clone().requires_grad_()
        extra = {"backend": backend} if module is a3po_kernels else {}
        keywords = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        stats = module.token_logprobs(z, targets.to(device), **keywords, **extra)
        sum((s * g.to(device=device, dtype=s.dtype)).sum() for s, g in zip(stats, grads, strict=True)).backward()
        results.append((stats.logprobs, stats.entropy, z.grad))
    return results


def plain(logits, targets, **options):
    """What a user would write, in fp32 (fp64 for fp64 logits): the yardstick of accuracy."""
    z = logits.detach().clone().requires_grad_()
    x = z.double() if z.dtype == torch.float64 else z.float()
    x = x * options.get("logit_scale", 1.0)
    if options.get("softcap"):
        x = options["softcap"] * torch.tanh(x / options["softcap"])
    log_p = torch.log_softmax(x / options.get("temperature", 1.0), -1)
    logp = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return z, logp, entropy


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6, "softcap": 5.0, "logit_scale": 0.9}], ids=["plain", "capped"]
)
@pytest.mark.parametrize("vocabulary", WIDE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_plain_pytorch(dtype, vocabulary, options, backend, device):
    """The error against fp64 does not exceed that of the plain formula in the same dtype.

    Equal up to 1.5 roundings: both err by a few units in the last place of fp32, in a different order of operations. In
    fp64 the truth itself is rounded, hence 8; below V = 257 the plain formula is often exact: 4.
    The kernels' softcap is within 3 roundings of the cap, torch's within 1.
    """
    if INTERPRETED and vocabulary > 32000 and dtype is not torch.bfloat16:
        pytest.skip("the interpreter is slow: the widest vocabulary in bf16 alone")
    logits, targets = random_rows(1, 3 if vocabulary > 1000 else 17, vocabulary, dtype, device)
    generator = torch.Generator().manual_seed(0)
    weights = tuple(torch.randn(targets.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    ours, exact = both(logits, targets, backend, weights, **options)
    z, logp, entropy = plain(logits, targets, **options)
    (logp * weights[0].to(logp) + entropy * weights[1].to(logp)).sum().backward()
    slack = 8 if dtype == torch.float64 else 4 if vocabulary < 257 else 1.5
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for name, mine, user, truth in zip(
        ("logp", "entropy", "gradient"), ours, (logp, entropy, z.grad), exact, strict=True
    ):
        one_rounding = eps * max(truth.abs().max().item(), 1.0)
        if backend == "triton" and "softcap" in options:
            one_rounding += 2 * eps * options["softcap"] / options["temperature"]
        if name == "gradient":
            one_rounding += torch.finfo(dtype).eps * truth.abs().max().item()
        assert largest_error(mine, truth) <= largest_error(user, truth) + slack * one_rounding, name


def test_large_logits_keep_their_digits(backend, device):
    """At 1e4 the log-sum-exp alone has a rounding of 1e-3 in fp32; probabilities and gradients must not."""
    if INTERPRETED and triton.__version__.startswith("3.6"):
        pytest.skip("the interpreter of Triton 3.6 rounds the product inside tl.fma, as no GPU does")
    logits = torch.tensor([[1e4, 1e4 - 1.0, 1e4 - 3.0, -1e4], [-1e4, -1e4, 1e4, 1e4]], device=device)
    targets = torch.tensor([1, 3], device=device)
    (logp, entropy, gradient), exact = both(logits, targets, backend)
    for mine, truth in zip((logp, entropy, gradient), exact, strict=True):
        assert largest_error(mine, truth) < 1e-6


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_values(data, backend, device):
    """Shapes, ties, +-1e4, -inf and NaN: equal to the reference in fp64, NaN in the same rows."""
    rows = data.draw(st.integers(1, 4))
    vocabulary = data.draw(st.sampled_from([1, 2, 3, 8, 33, 257]))
    value = st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e4, -1e4, -math.inf]) | st.floats(-50, 50, width=32)
    if data.draw(st.booleans()):
        value = value | st.sampled_from([math.nan, math.inf])
    logits = torch.tensor(data.draw(st.lists(value, min_size=rows * vocabulary, max_size=rows * vocabulary)))
    logits = logits.view(rows, vocabulary).to(data.draw(st.sampled_from([torch.float64, torch.float32]))).to(device)
    target = st.integers(0, vocabulary - 1) | st.just(-100)
    targets = torch.tensor(data.draw(st.lists(target, min_size=rows, max_size=rows)), device=device)
    options = data.draw(st.sampled_from([{}, {"temperature": 0.5}, {"softcap": 30.0, "logit_scale": 0.5}]))
    ours, exact = both(logits, targets, backend, **options)
    tolerance = 1e-9 if logits.dtype == torch.float64 else 8e-3  # log-probs of -4e4: steps of 4e-3
    for mine, truth in zip(ours[:2], exact[:2], strict=True):
        assert largest_error(mine, truth) <= tolerance
    healthy = exact[0].isfinite() & exact[1].isfinite()
    assert largest_error(ours[2].cpu()[healthy], exact[2][healthy]) <= tolerance
    assert not ours[2].cpu()[targets.cpu() == -100].any()


def test_masked_vocabulary(backend, device):
    """-inf logits: probability 0, nothing in the entropy, gradient 0, save the one-hot term of a target at -inf."""
    logits = torch.tensor([[0.0, -math.inf, 1.0, -math.inf], [0.0, -math.inf, 1.0, 2.0]], device=device)
    targets = torch.tensor([2, 1], device=device)
    z = logits.clone().requires_grad_()
    stats = a3po_kernels.token_logprobs(z, targets, backend=backend)
    (stats.logprobs + 0.3 * stats.entropy).sum().backward()
    assert stats.logprobs[1].item() == -math.inf and stats.entropy.isfinite().all()
    assert z.grad[0, 1] == 0.0 and z.grad[0, 3] == 0.0 and z.grad[1, 1] == 1.0
    assert z.grad.isfinite().all()
    capped = a3po_kernels.token_logprobs(logits, targets, softcap=10.0, backend=backend)
    assert capped.logprobs[1].item() == -math.inf and capped.entropy.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("place", [0, 4999])
def test_broken_rows_give_nan(bad, softcap, place, backend, device):
    """NaN or +inf anywhere, or nothing but -inf: NaN, never a plausible number; other rows are untouched."""
    logits, targets = random_rows(2, 3, 5000, torch.float32, device)
    clean = a3po_kernels.token_logprobs(logits, targets, softcap=softcap, backend=backend)
    logits[1, place] = bad
    logits[2] = -math.inf
    stats = a3po_kernels.token_logprobs(logits, targets, softcap=softcap, backend=backend)
    for mine, before in zip(stats, clean, strict=True):
        assert mine[1:].isnan().all() and mine[0] == before[0]


@pytest.mark.parametrize("temperature", ["per token", "0-d"])
def test_temperature_tensor(temperature, backend, device):
    logits, targets = random_rows(3, 6, 300, torch.float64, device)
    value = (
        torch.linspace(0.5, 2.0, 6, device=device) if temperature == "per token" else torch.tensor(0.7, device=device)
    )
    ours, exact = both(logits, targets, backend, temperature=value.double())
    assert all(largest_error(a, b) < 1e-12 for a, b in zip(ours, exact, strict=True))


def test_strides(backend, device):
    """Sliced, transposed and expanded tensors, and odd row strides, equal their contiguous copies to the bit."""
    base = torch.randn(3, 6, 41, device=device)
    targets = torch.randint(0, 37, (3, 5), device=device)
    for view in (
        base[:, :-1, :37],
        base[:, 1:, 3:40],
        base.transpose(0, 1).contiguous().transpose(0, 1)[:, :5, :37],
        base.transpose(1, 2).contiguous().transpose(1, 2)[:, :5, :37],
        base[:1].expand(3, 6, 41)[:, :5, :37],
    ):
        z = view.detach().requires_grad_()
        same = view.detach().contiguous().requires_grad_()
        one = a3po_kernels.token_logprobs(z, targets, backend=backend)
        two = a3po_kernels.token_logprobs(same, targets, backend=backend)
        (one.logprobs.sum() + one.entropy.sum()).backward()
        (two.logprobs.sum() + two.entropy.sum()).backward()
        assert torch.equal(one.logprobs, two.logprobs) and torch.equal(one.entropy, two.entropy)
        assert torch.equal(z.grad, same.grad)
    one_rollout = base[:1, :5, :37]
    for view in (torch.arange(10, device=device)[None, ::2], torch.tensor([[3]], device=device).expand(1, 5)):
        one = a3po_kernels.token_logprobs(one_rollout, view, backend=backend)
        two = a3po_kernels.token_logprobs(one_rollout, view.contiguous(), backend=backend)
        assert torch.equal(one.logprobs, two.logprobs)
        one = a3po_kernels.min_p_token_logprobs(one_rollout, view, backend=backend)
        assert torch.equal(one, a3po_kernels.min_p_token_logprobs(one_rollout, view.contiguous(), backend=backend))


def test_incoming_gradients(backend, device):
    """Absent, expanded and non-contiguous incoming gradients."""
    logits, targets = random_rows(4, 6, 50, torch.float64, device)
    logits, targets = logits.view(2, 3, 50), targets.view(2, 3)
    exact_in = logits.cpu().requires_grad_()
    exact = reference.token_logprobs(exact_in, targets.cpu())
    for which, grad in (
        (0, torch.ones(1, 1).expand(2, 3)),
        (1, torch.randn(3, 2).t()),
        (0, torch.randn(4, 6)[::2, ::2]),
    ):
        z = logits.clone().requires_grad_()
        stats = a3po_kernels.token_logprobs(z, targets, backend=backend)
        (mine,) = torch.autograd.grad(stats[which], z, grad.double().to(device))
        (truth,) = torch.autograd.grad(exact[which], exact_in, grad.double(), retain_graph=True)
        assert largest_error(mine, truth) < 1e-13


def test_targets_and_leading_dims(backend, device):
    """int32 targets, one row without leading dims, four dims, and no rows."""
    logits, targets = random_rows(5, 8, 29, torch.float32, device)
    stats = a3po_kernels.token_logprobs(logits, targets, backend=backend)
    same = a3po_kernels.token_logprobs(logits.view(2, 2, 2, 29), targets.view(2, 2, 2).int(), backend=backend)
    assert torch.equal(stats.logprobs.view(2, 2, 2), same.logprobs)
    one = a3po_kernels.token_logprobs(logits[0], targets[0], backend=backend)
    assert one.logprobs.shape == () and torch.equal(one.entropy, stats.entropy[0])
    none = a3po_kernels.token_logprobs(logits[:0], targets[:0], backend=backend)
    assert none.logprobs.shape == (0,)


def test_softcap_near_zero(backend, device):
    """The softcap keeps the digits of small logits, where 1 - 2 / (e^2a + 1) would cancel."""
    logits = torch.logspace(-6, 1.5, 200, device=device).view(2, 100) * torch.tensor([[1.0], [-1.0]], device=device)
    ours, exact = both(logits, torch.tensor([0, 99], device=device), backend, softcap=30.0)
    assert all(largest_error(a, b) < 4 * 30.0 * 1.2e-7 for a, b in zip(ours, exact, strict=True))
    tiny = torch.tensor([[1e-5, 2e-5]], device=device)  # here the cancelling form would lose every digit
    stats = a3po_kernels.token_logprobs(tiny, torch.tensor([1], device=device), softcap=30.0, backend=backend)
    assert abs(stats.logprobs.item() + 0.6931421805599454) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("min_p", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_min_p(dtype, min_p, softcap, backend, device):
    logits, targets = random_rows(6, 12, 301, dtype, device)
    targets[::2] = logits[::2].argmax(-1)
    targets[3] = -100
    logits[5, :100] = -math.inf
    got = a3po_kernels.min_p_token_logprobs(logits, targets, min_p, softcap=softcap, logit_scale=1.2, backend=backend)
    want = reference.min_p_token_logprobs(logits.cpu().double(), targets.cpu(), min_p, softcap=softcap, logit_scale=1.2)
    assert torch.equal(got.isinf().cpu(), want.isinf())
    leaf = logits.clone().requires_grad_()
    assert not a3po_kernels.min_p_token_logprobs(leaf, targets, backend=backend).requires_grad
    assert largest_error(got, want) < (1e-12 if dtype == torch.float64 else 1e-5)
    logits[0, 7], logits[2, 9], logits[4] = math.nan, math.inf, -math.inf
    got = a3po_kernels.min_p_token_logprobs(logits, targets, min_p, softcap=softcap, backend=backend)
    assert got[[0, 2, 4]].isnan().all() and not got[[1, 3]].isnan().any()


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements():
    """Offsets past 2^31: the last rows of a tensor of 2.4e9 elements are right."""
    rows, vocabulary = 16384, 147456
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device="cuda").normal_()
    targets = torch.randint(0, vocabulary, (rows,), device="cuda")
    stats = a3po_kernels.token_logprobs(logits, targets, backend="triton")
    tail = torch.log_softmax(logits[-8:].double(), -1).gather(-1, targets[-8:, None])[:, 0]
    assert largest_error(stats.logprobs[-8:], tail) < 1e-5


@pytest.mark.cuda
def test_target_out_of_range_on_a_gpu():
    """No host read: the row is NaN; with validate it is an IndexError."""
    logits, targets = torch.randn(3, 100, device="cuda"), torch.tensor([0, 100, -1], device="cuda")
    stats = a3po_kernels.token_logprobs(logits, targets)
    assert stats.logprobs.isnan().tolist() == [False, True, True]
    with pytest.raises(IndexError):
        a3po_kernels.token_logprobs(logits, targets, validate=True)
