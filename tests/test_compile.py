"""torch.compile, fake and meta tensors, tracing: one graph, the same results, and no changing number compiled in."""

from __future__ import annotations

import contextlib

import pytest
import torch
from batches import INTERPRETED, PRESETS
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import a3po_kernels as ak

pytestmark = pytest.mark.skipif(INTERPRETED, reason="what is compiled here are not the kernels")

V, H, T = 13, 6, 5


def example(rollouts, packed, name, device="cpu", seed=0):
    """(hidden, weight, targets, advantages, old log-probs, keywords)."""
    torch.manual_seed(seed)
    shape = (rollouts * T,) if packed else (rollouts, T)
    keywords = {}
    if packed:
        keywords["cu_seqlens"] = torch.arange(0, rollouts * T + 1, T, device=device)[: rollouts + 1]
    if name == "dr_grpo":
        keywords["max_length"] = T
    old = -3 * torch.rand(shape, device=device)
    if name == "lp_reg":
        keywords["min_p_logprobs"] = old + 0.1
    hidden = torch.randn(*shape, H, device=device, requires_grad=True)
    targets = torch.zeros(shape, dtype=torch.long, device=device)
    if device != "meta":
        targets = torch.randint(0, V, shape, device=device)
    return hidden, torch.randn(V, H, device=device), targets, torch.randn(rollouts, device=device), old, keywords


def loss_of(entry, objective, hidden, weight, targets, advantages, old, **keywords):
    if entry == "logits":
        logits = hidden @ weight.t()
        return ak.policy_loss(logits, targets, advantages, objective=objective, old_logprobs=old, **keywords).loss
    if entry == "linear":
        return ak.linear_policy_loss(
            hidden, weight, targets, advantages, objective=objective, old_logprobs=old, **keywords
        ).loss
    logp = torch.log_softmax(hidden @ weight.t(), -1)[..., 0]
    return ak.logprob_policy_loss(
        logp, advantages, objective=objective, old_logprobs=old, entropy=-old, **keywords
    ).loss


# Every preset where tracing is cheap; of the others what takes another way.
SWEEP = [
    *(("logits", name, True) for name in PRESETS), ("logits", "a3po", False), ("logits", "dr_grpo", False),
    ("linear", "a3po", True), ("linear", "gspo", False), ("logprobs", "a3po", False),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "name", "packed"), SWEEP)
def test_dynamic_shapes(entry, name, packed, backend, device):
    """One rollout, two and none with one compiled function, whose sizes are symbolic from the first call."""
    objective = getattr(ak, name)()

    def step(hidden, weight, targets, advantages, old, keywords):
        return loss_of(entry, objective, hidden, weight, targets, advantages, old, backend=backend, **keywords)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rollouts in (1, 2, 0):
        arguments = example(rollouts, packed, name, device)
        expected = step(*arguments)
        found = compiled(*arguments)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        (gradient,), (truth,) = (torch.autograd.grad(loss, arguments[0]) for loss in (found, expected))
        torch.testing.assert_close(gradient, truth, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "inplace"), [("a3po", False), ("a3po", True), ("gspo", False), ("lp_reg", False), ("fork_tokens", False)]
)
def test_inductor(name, inplace, backend, device):
    """The default compiler, on logits that may be written over."""
    hidden, weight, targets, advantages, old, keywords = example(2, False, name, device)

    def step(hidden):
        return loss_of(
            "logits", getattr(ak, name)(), hidden, weight, targets, advantages, old, inplace_backward=inplace,
            backend=backend, **keywords,
        )  # fmt: skip

    torch._dynamo.reset()
    (expected,) = torch.autograd.grad(step(hidden), hidden)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager" if inplace else "inductor")
    (gradient,) = torch.autograd.grad(compiled(hidden), hidden)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


# Twelve values of each: more than torch.compile would compile anew for.
FLOATS = [0.5 + 0.1 * i for i in range(12)]
NUMBERS = {
    "temperature": lambda v: {"temperature": v},
    "softcap": lambda v: {"softcap": v},
    "logit_scale": lambda v: {"logit_scale": v},
    "denominator": lambda v: {"denominator": v},
    "step": lambda v: {"step": v},
    "max_length": lambda v: {"max_length": v, "objective": ak.dr_grpo()},
    "rho": lambda v: {"objective": ak.a3po(rho=1.0 + v), "step": 3},
    "epsilon_high": lambda v: {"objective": ak.dapo(epsilon_high=v, dual_clip=3.0)},
    "positive_weight": lambda v: {"objective": ak.w_reinforce(positive_weight=v)},
}


@pytest.mark.parametrize(
    ("number", "entry"), [*((number, "logits") for number in NUMBERS), ("temperature", "linear"), ("rho", "linear")]
)
def test_numbers_are_not_compiled_in(number, entry, backend, device):
    """A new value of a number is a value, not a new graph; an objective may be built inside what is compiled."""
    hidden, weight, targets, advantages, old, _ = example(2, False, "a3po", device)

    def step(hidden, value):
        keywords = {"objective": ak.a3po(), **NUMBERS[number](value)}
        objective = keywords.pop("objective")
        return loss_of(entry, objective, hidden, weight, targets, advantages, old, backend=backend, **keywords)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for value in FLOATS:
        found, expected = compiled(hidden, value), step(hidden, value)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        (gradient,), (truth,) = (torch.autograd.grad(loss, hidden) for loss in (found, expected))
        torch.testing.assert_close(gradient, truth, atol=1e-6, rtol=1e-5)
    assert counter.frame_count == 2  # the first value as a constant, then any
    if number in ("step", "denominator"):
        for value in range(12):
            compiled(hidden, value + 1)
        assert counter.frame_count <= 4


def test_forced_routes_are_refused(backend, device):
    """What a compiled graph cannot do is refused, not replaced by something else."""
    hidden, weight, targets, advantages, old, _ = example(2, False, "dapo", device)
    options = {"objective": ak.dapo(), "old_logprobs": old, "backend": backend}

    def one_pass(hidden):
        return ak.linear_policy_loss(hidden, weight, targets, advantages, route="one-pass", **options).loss

    def one_launch(hidden):
        return ak.policy_loss(hidden @ weight.t(), targets, advantages, route="one-launch", **options).loss

    for function in (one_pass, one_launch):
        function(hidden)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="is not possible"):
            torch.compile(function, fullgraph=True, backend="aot_eager")(hidden)


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("name", PRESETS)
def test_tensors_without_values(name, kind):
    """Shapes and dtypes of everything, forward and backward, where there is nothing to compute."""
    objective = getattr(ak, name)()
    with FakeTensorMode() if kind == "fake" else contextlib.nullcontext():
        device = "cpu" if kind == "fake" else "meta"
        for entry in ("logits", "linear", "logprobs"):
            hidden, weight, targets, advantages, old, keywords = example(2, False, name, device)
            keywords |= {"temperature": torch.ones(2, T, device=device)} if entry != "logprobs" else {}
            loss = loss_of(entry, objective, hidden, weight, targets, advantages, old, **keywords)
            loss.backward()
            assert loss.shape == () and hidden.grad.shape == hidden.shape
        stats = ak.linear_token_logprobs(hidden, weight, targets)
        assert stats.entropy.shape == (2, T) and stats.entropy.dtype == torch.float32
        assert ak.linear_min_p_token_logprobs(hidden, weight, targets).shape == (2, T)
        assert ak.min_p_token_logprobs(hidden @ weight.t(), targets).shape == (2, T)
        assert ak.select_tokens(old, ratio=0.2, side="low").dtype == torch.bool
        with pytest.raises(ValueError, match="plan_rows counts rows and needs real values"):
            ak.plan_rows(torch.ones(2, T, device=device), advantages, objective=objective)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("entry", ["logits", "linear", "logprobs"])
def test_make_fx(entry, mode, backend, device):
    hidden, weight, targets, advantages, old, _ = example(2, False, "a3po", device)

    def step(hidden, weight, targets, advantages, old):
        hidden = hidden.detach().requires_grad_()
        loss = loss_of(entry, ak.a3po(), hidden, weight, targets, advantages, old, backend=backend)
        return loss, *torch.autograd.grad(loss, hidden)

    arguments = (hidden, weight, targets, advantages, old)
    traced = make_fx(step, tracing_mode=mode)(*arguments)
    for found, expected in zip(traced(*arguments), step(*arguments), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_global_rule_of_one_process_is_one_graph():
    """Without other ranks nothing crosses, and nothing breaks the graph."""
    rule = ak.TokenRule(source="current", ratio=0.4, rest_scale=0.5, scope="global")
    objective = ak.Objective(shaping=(rule,))
    hidden, weight, targets, advantages, old, _ = example(2, False, "dapo")

    def call(hidden):
        return ak.linear_policy_loss(
            hidden, weight, targets, advantages, objective=objective, old_logprobs=old, reduce_metrics=True
        ).loss

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(hidden), call(hidden))
