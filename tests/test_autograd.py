"""How the operations behave inside PyTorch: autograd, opcheck, torch.compile, checkpointing, autocast, accumulation."""

from __future__ import annotations

import functools

import pytest
import torch
from batches import INTERPRETED, random_batch, run
from torch.utils.checkpoint import checkpoint

import a3po_kernels
from a3po_kernels.backends.triton import statistics
from a3po_kernels.backends.triton.gradient import logits_gradient_kernel
from a3po_kernels.backends.triton.one_launch import one_launch_kernel
from a3po_kernels.backends.triton.policy_terms import policy_metrics_kernel, policy_terms_kernel
from a3po_kernels.backends.triton.scaling import scale_kernel
from a3po_kernels.backends.triton.selection import token_rules_kernel
from a3po_kernels.backends.triton.tokens import normalizer_kernel, read_tokens_kernel
from a3po_kernels.ops import linear_min_p, min_p, select_tokens, surrogate, token_logprobs, tokens
from a3po_kernels.ops import linear_token_logprobs as linear


def small(device, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 13, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
    targets = torch.randint(0, 13, (2, 5), generator=generator).to(device)
    old = (torch.randn(2, 5, generator=generator) - 2.5).to(device)
    return logits.requires_grad_(), targets, torch.tensor([1.0, -1.0], device=device), old


def loss_of(logits, targets, advantages, old, backend="auto", **keywords):
    objective = a3po_kernels.a3po(entropy_coef=0.05)
    keywords = {"objective": objective, "step": 3, "old_logprobs": old, "backend": backend, **keywords}
    return a3po_kernels.policy_loss(logits, targets, advantages, **keywords).loss


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 3.0, "logit_scale": 1.2}])
def test_gradcheck(options, backend, device):
    logits, targets, advantages, old = small(device)
    if INTERPRETED:  # a kernel launch per element and direction
        logits, targets, old = logits[:, :2, :4].detach().requires_grad_(), targets[:, :2] % 4, old[:, :2]
    targets[0, 1] = -100

    def statistics(z):
        return a3po_kernels.token_logprobs(z, targets, backend=backend, **options)

    assert torch.autograd.gradcheck(statistics, (logits,))
    loss = functools.partial(loss_of, targets=targets, advantages=advantages, old=old, backend=backend, **options)
    assert torch.autograd.gradcheck(functools.partial(loss, route="two-stage"), (logits,))
    # The one launch's backward runs once: its gradient is the other's.
    found = [torch.autograd.grad(loss(logits, route=route), logits)[0] for route in ("one-launch", "two-stage")]
    assert (found[0] - found[1]).abs().max() < 1e-15


def test_double_backward_raises(backend, device):
    logits, targets, advantages, old = small(device)
    for function in (
        lambda z: a3po_kernels.token_logprobs(z, targets, backend=backend).logprobs.sum(),
        lambda z: a3po_kernels.token_logprobs(z, targets, backend=backend).entropy.sum(),
        lambda z: loss_of(z, targets, advantages, old, backend),
        lambda z: loss_of(z, targets, advantages, old, backend, route="two-stage"),
    ):
        (gradient,) = torch.autograd.grad(function(logits), logits, create_graph=True)
        with pytest.raises(RuntimeError):
            gradient.square().sum().backward()


@pytest.mark.parametrize("route", ["one-launch", "two-stage"])
def test_inplace_backward(route, backend, device):
    """The same bits, written over the logits; a consumer that still needs the logits is told."""
    leaf, targets, advantages, old = small(device, torch.float32)
    expected = torch.autograd.grad(loss_of(leaf, targets, advantages, old, backend, route=route), leaf)[0]
    logits = leaf * 1.0
    address = logits.data_ptr()
    output = a3po_kernels.policy_loss(
        logits, targets, advantages, objective=a3po_kernels.a3po(entropy_coef=0.05), old_logprobs=old, step=3,
        backend=backend, inplace_backward=True, route=route,
    )  # fmt: skip
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    assert torch.equal(gradient, expected) and output.route == route
    assert seen == [address], "the gradient lies where the logits lay"

    logits = leaf * 1.0
    square = (logits * logits).sum()  # saves the logits, and runs its backward after the head's
    stats = a3po_kernels.token_logprobs(logits, targets, backend=backend, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (stats.logprobs.sum() + square).backward()
    with pytest.raises(ValueError, match="inplace_backward"):
        shared = leaf[:1, :1].expand(2, 5, 13)
        a3po_kernels.token_logprobs(shared, targets, backend=backend, inplace_backward=True)


@pytest.mark.parametrize("route", ["one-launch", "two-stage"])
def test_overlapping_logits_are_not_written_over(route, backend, device):
    """Windows of one buffer share elements: a gradient written in place would be of whichever came last."""
    buffer = torch.randn(200, device=device)
    windows = buffer.as_strided((2, 5, 9), (20, 4, 1))
    expanded = torch.randn(1, 5, 9, device=device).expand(2, 5, 9)
    apart = buffer.as_strided((2, 5, 9), (1, 2, 10))
    targets, advantages = torch.zeros(2, 5, dtype=torch.long, device=device), torch.ones(2, device=device)
    options = {"objective": a3po_kernels.dapo(), "inplace_backward": True, "backend": backend, "route": route}
    for logits in (windows, expanded):
        leaf = logits.detach().requires_grad_()
        with pytest.raises(ValueError, match="own every element"):
            a3po_kernels.policy_loss(leaf, targets, advantages, **options)
        with pytest.raises(ValueError, match="own every element"):
            a3po_kernels.token_logprobs(leaf, targets, inplace_backward=True, backend=backend)
    leaf = apart.detach().requires_grad_()
    a3po_kernels.policy_loss(leaf, targets, advantages, **options).loss.backward()
    assert leaf.grad.any()


def test_needs_input_grad_and_no_grad(backend, device):
    logits, targets, advantages, old = small(device)
    assert not loss_of(logits.detach(), targets, advantages, old, backend).requires_grad
    with torch.no_grad():
        assert not loss_of(logits, targets, advantages, old, backend).requires_grad
    old = old.requires_grad_()
    advantages = advantages.requires_grad_()
    loss_of(logits, targets, advantages, old, backend).backward()
    assert old.grad is None and advantages.grad is None


def test_gradient_accumulation(backend, device):
    """Micro-batches with the global token count as denominator add up to the whole batch."""
    batch = random_batch(2, rollouts=6, dtype=torch.float64, device=device)
    for name in ("old_entropy", "min_p_logprobs"):
        del batch.keywords[name]
    objective = a3po_kernels.a3po(kl_coef=0.1)
    whole, expected = run(a3po_kernels, batch, objective, backend=backend)
    tokens = whole.metrics["token_count"]
    logits = batch.logits.clone().requires_grad_()
    total = 0.0
    for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
        keywords = {name: value[part] for name, value in batch.keywords.items()}
        output = a3po_kernels.policy_loss(
            logits[part], batch.targets[part], batch.advantages[part], objective=objective, denominator=tokens,
            backend=backend, **keywords,
        )  # fmt: skip
        output.loss.backward()
        total += output.loss.item()
    assert abs(total - whole.loss.item()) < 1e-12
    assert (logits.grad - expected).abs().nan_to_num().max() < 1e-13


@pytest.mark.parametrize("inplace", [False, True])
def test_one_launch_backward_runs_once(inplace, backend, device):
    """Its gradient is scaled in place; a second backward says so instead of scaling twice."""
    leaf, targets, advantages, old = small(device, torch.float32)
    options = {"route": "one-launch", "inplace_backward": inplace}
    once = torch.autograd.grad(loss_of(leaf * 1.0, targets, advantages, old, backend, **options) * 3.0, leaf)[0]
    plain = torch.autograd.grad(loss_of(leaf, targets, advantages, old, backend, route="two-stage") * 3.0, leaf)[0]
    torch.testing.assert_close(once, plain)
    loss = loss_of(leaf * 1.0, targets, advantages, old, backend, **options)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="route='two-stage'"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, backend, device):
    logits, targets, advantages, old = small(device)
    expected = torch.autograd.grad(loss_of(logits, targets, advantages, old, backend), logits)[0]
    checkpoint(loss_of, logits, targets, advantages, old, backend, use_reentrant=reentrant).backward()
    assert torch.equal(logits.grad, expected)


def test_autocast(backend, device):
    """Statistics stay fp32 under autocast."""
    logits, targets, advantages, old = small(device, torch.float32)
    expected = loss_of(logits, targets, advantages, old, backend)
    with torch.autocast(device.type, torch.bfloat16):
        loss = loss_of(logits, targets, advantages, old, backend)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def test_opcheck(backend, device):
    logits, targets, _, _ = small(device, torch.float32)
    flat = targets.reshape(-1)
    ones = torch.ones(10, device=device)
    columns = logits.shape[-1]
    whole = (-100, columns, False, backend, "", [])
    torch.library.opcheck(token_logprobs._token_statistics, (logits, flat, None, 0.7, 1.0, 0.0, *whole))
    stats = token_logprobs._token_statistics(logits.detach(), flat, None, 0.7, 1.0, 5.0, *whole)
    found = (stats[2], stats[3], stats[1], ones, None)
    gradient = (logits.detach(), flat, *found, None, 0.7, 1.0, 5.0, -100, columns - 2, backend, 0)
    torch.library.opcheck(token_logprobs._logits_gradient, gradient)
    torch.library.opcheck(token_logprobs._logits_gradient_, (logits.detach().clone(), *gradient[1:]))
    offsets = torch.tensor([0, 4, 10], device=device)
    torch.library.opcheck(select_tokens._select_tokens, (ones, ones > 0, offsets, 0.2, False, False, 1, 0, backend))
    torch.library.opcheck(min_p._min_p, (logits.detach(), flat, 0.02, 1.0, 0.0, -100, backend, "", []))
    per_rollout = ones[:2]
    read = (flat, flat > 0, offsets, per_rollout, ones, per_rollout, 10, [True, False, True], [1.0, 0.5, 1.0], -100)
    torch.library.opcheck(tokens._read_tokens, (*read, torch.float32, backend))
    torch.library.opcheck(tokens._read_tokens, (None, None, *read[2:4], None, None, *read[6:], torch.float32, backend))
    torch.library.opcheck(tokens._count_kept, (ones, offsets, backend))
    torch.library.opcheck(tokens._normalizer, (per_rollout, "tokens", True, None, 0.0, 0.0, backend))
    rules = ([ones, ones], [1, 0, 0, 0, -1, 1, 1, 1], [0.2, 1.0, 2.0, 0.3, 0.0, 0.0], [ones[0]])
    torch.library.opcheck(tokens._apply_rules, (ones, ones, offsets, *rules, backend))
    logp, entropy = stats[0].requires_grad_(), stats[1].requires_grad_()
    numbers = [0.8, 1.28, float("inf"), float("inf"), 1.0, 1.0, 0.0, 0.1, 0.0, float("inf"), 0.0, 0.0]
    rollout = torch.zeros(10, dtype=torch.int32, device=device)
    torch.library.opcheck(
        surrogate._policy_terms,
        (
            logp, entropy, ones > 0, rollout, ones, ones, ones, None, None, None, None, None, None, offsets,
            per_rollout * 5, per_rollout / 10, None, 1.0, "clip", False, False, "k3", numbers, True, backend,
        ),
    )  # fmt: skip
    torch.library.opcheck(surrogate._with_coefficients, (logp, entropy, logp.detach().sum(), ones, ones))
    hidden, weight = torch.randn(10, 4, device=device), torch.randn(9, 4, device=device)
    proxy = (hidden, weight, None, None, None, flat % 8, 1.0, 8, torch.float32, 0.1, 1.0, 5.0, -100, 200, -1, backend)
    torch.library.opcheck(linear_min_p._linear_min_p, (*proxy, "", "", []))
    lora = (torch.randn(2, 4, device=device), torch.randn(9, 2, device=device))
    leaves = [x.requires_grad_() for x in (hidden, weight, torch.randn(9, device=device), *lora)]
    targets = flat % 8
    options = (0.5, 8, torch.float32, torch.float32, None, 0.7, 1.0, 5.0, -100, 200, -1, -1, backend, "", "", [])
    given = (None, None)
    torch.library.opcheck(linear._linear_statistics, (*leaves, None, targets, *options, *given))
    with torch.no_grad():
        stats = linear._linear_statistics(*leaves, None, targets, *options, *given)
        gradient = (targets, stats[2], stats[3], stats[1], ones, None, [True] * 5, *options, None)
        torch.library.opcheck(linear._linear_gradient, (*leaves, None, *gradient))
        torch.library.opcheck(linear._linear_gradient, (*leaves, torch.zeros(9, 4, device=device), *gradient))


@pytest.mark.cuda
def test_no_synchronisation_and_graph_capture():
    """The default path reads nothing back, and a captured graph replays with new values."""
    batch = random_batch(3, dtype=torch.float32, device="cuda")
    keywords = {k: v for k, v in batch.keywords.items() if k not in ("min_p_logprobs", "old_entropy")}
    logits = batch.logits.clone().requires_grad_()
    step = torch.zeros((), device="cuda")

    def forward_backward():
        logits.grad = None
        output = a3po_kernels.policy_loss(
            logits, batch.targets, batch.advantages, objective=a3po_kernels.a3po(alpha=0.01), step=step, **keywords
        )
        output.loss.backward()
        return output.loss

    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward_backward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward()
    step.fill_(60.0)
    graph.replay()
    replayed, gradient = captured.item(), logits.grad.clone()
    assert replayed == forward_backward().item() and torch.equal(gradient, logits.grad)


@pytest.mark.cuda
def test_nothing_recompiles():
    """Other lengths, batch sizes, steps, temperatures and coefficients reuse the compiled kernels."""
    kernels = [
        statistics.row_statistics_kernel, logits_gradient_kernel, one_launch_kernel, token_rules_kernel,
        policy_terms_kernel, policy_metrics_kernel, read_tokens_kernel, normalizer_kernel, scale_kernel,
    ]  # fmt: skip

    def compiled():
        return [len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()]

    def go(rollouts, length, **keywords):
        logits = torch.randn(rollouts, length, 512, device="cuda", requires_grad=True)
        targets = torch.randint(0, 512, (rollouts, length), device="cuda")
        objective = a3po_kernels.a3po(**keywords.pop("objective", {}))
        advantages = torch.ones(rollouts, device="cuda")
        for route in ("one-launch", "two-stage"):
            a3po_kernels.policy_loss(
                logits, targets, advantages, objective=objective, route=route,
                old_logprobs=-torch.rand(rollouts, length, device="cuda"), **keywords,
            ).loss.backward()  # fmt: skip

    go(2, 7)
    go(2, 7, denominator=3.0)
    before = compiled()
    go(1, 1)
    go(16, 32, step=17, temperature=0.7)
    go(3, 160, objective={"epsilon_high": 0.4, "rho": 3.0}, denominator=4.0)
    assert compiled() == before
