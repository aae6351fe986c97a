"""What has no derivative must say so: second derivatives and forward-mode AD raise on every differentiable call."""

from __future__ import annotations

import pytest
import torch
from batches import INTERPRETED
from torch.autograd import forward_ad

import a3po_kernels as ak

# Every public call that is differentiable, as a function of its differentiable input.
CALLS = (
    "token_logprobs", "token_logprobs in place", "policy_loss two-stage", "policy_loss one-launch", "policy_loss auto",
    "linear_token_logprobs", "linear_policy_loss one-pass", "linear_policy_loss recompute", "linear_policy_loss auto",
    "logprob_policy_loss",
)  # fmt: skip


def build(call, device, backend):
    """(function to a scalar, its input)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64).to(device)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64).to(device)
    targets = torch.randint(0, 11, (2, 5), generator=generator).to(device)
    advantages = torch.tensor([1.0, -1.0], device=device)
    logits = hidden @ weight.t()
    logp = torch.log_softmax(logits, -1)[..., 0]
    name, _, route = call.partition(" ")
    options = {"objective": ak.dapo(entropy_coef=0.1), "old_logprobs": logp.detach() - 0.1, "backend": backend}
    if name == "token_logprobs":
        return lambda z: sum(
            x.sum() for x in ak.token_logprobs(z * 1.0, targets, inplace_backward=bool(route), backend=backend)
        ), logits
    if name == "linear_token_logprobs":
        return lambda h: sum(x.sum() for x in ak.linear_token_logprobs(h, weight, targets, backend=backend)), hidden
    if name == "policy_loss":
        return lambda z: ak.policy_loss(z, targets, advantages, route=route, **options).loss, logits
    if name == "linear_policy_loss":
        return lambda h: ak.linear_policy_loss(h, weight, targets, advantages, route=route, **options).loss, hidden
    entropy = torch.ones_like(logp)
    return lambda x: ak.logprob_policy_loss(x, advantages, entropy=entropy, **options).loss, logp


@pytest.mark.parametrize("call", CALLS)
def test_double_backward_raises(call, backend, device):
    """Also where a second derivative is asked for by name: no way to the input would read as zero."""
    if INTERPRETED and "auto" not in call:
        pytest.skip("the interpreter is slow; what is tested is not in a kernel")
    function, value = build(call, device, backend)
    value.requires_grad_()
    (gradient,) = torch.autograd.grad(function(value), value, create_graph=True)
    assert gradient.any()
    with pytest.raises(RuntimeError, match=r"double backward|no autograd formula"):
        (gradient.pow(2).sum() + value.pow(2).sum()).backward()
    (gradient,) = torch.autograd.grad(function(value), value, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|no autograd formula"):
        torch.autograd.grad(gradient.pow(2).sum(), value, allow_unused=True)
    with pytest.raises(RuntimeError, match=r"double backward|no autograd formula"):
        torch.autograd.functional.hvp(function, value, torch.ones_like(value))


@pytest.mark.parametrize("call", CALLS)
def test_forward_mode_raises(call, backend, device):
    if INTERPRETED and "auto" not in call:
        pytest.skip("the interpreter is slow; what is tested is not in a kernel")
    function, value = build(call, device, backend)
    error = RuntimeError if "one-launch" not in call else (RuntimeError, ValueError)
    with pytest.raises(error, match=r"forward-mode AD is not implemented|forward AD|forward mode AD"):
        torch.func.jvp(function, (value,), (torch.ones_like(value),))
    for leaf in (value, value.clone().requires_grad_()):
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward-mode AD|forward AD|forward mode AD"):
            function(forward_ad.make_dual(leaf, torch.ones_like(leaf)))


def test_constants_may_carry_tangents(backend, device):
    """Where nothing differentiable has one, a dual level changes nothing."""
    function, value = build("policy_loss auto", device, backend)
    with forward_ad.dual_level():
        assert torch.equal(function(value), function(value.clone()))


@pytest.mark.parametrize("call", CALLS)
def test_in_place_work_on_the_loss(call, backend, device):
    """A trainer may scale the loss in place before backward: nothing of the graph is held in it."""
    if INTERPRETED and "auto" not in call:
        pytest.skip("the interpreter is slow; what is tested is not in a kernel")
    function, value = build(call, device, backend)
    value.requires_grad_()
    (expected,) = torch.autograd.grad(function(value) * 0.25, value)
    loss = function(value)
    loss *= 0.25
    (gradient,) = torch.autograd.grad(loss, value)
    assert torch.equal(gradient, expected)
