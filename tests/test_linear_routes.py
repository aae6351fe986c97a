"""The routes of linear_policy_loss: what they multiply, what they hold, how they fail."""

from __future__ import annotations

import copy

import pytest
import torch
from batches import INTERPRETED
from measured import gemm_flops

import a3po_kernels
from a3po_kernels import LinearPolicyLoss, TokenRule, dapo, gspo, linear_policy_loss

ROLLOUTS, LENGTH, WIDTH, COLUMNS = 10, 6, 16, 3000
ONE = 2 * ROLLOUTS * LENGTH * COLUMNS * WIDTH  # operations of one product, 2 N V H / 2 in the units of the docstrings


def batch(active=1.0, masked=0, dtype=torch.float32, device="cpu"):
    """On-policy, so that every token of a rollout with an advantage has a gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROLLOUTS, LENGTH, WIDTH, generator=generator).to(device=device, dtype=dtype)
    weight = torch.randn(COLUMNS, WIDTH, generator=generator).to(device=device, dtype=dtype)
    targets = torch.randint(0, COLUMNS, (ROLLOUTS, LENGTH), generator=generator).to(device)
    targets[:, LENGTH - masked :] = -100
    advantages = torch.tensor([1.0, -1.0]).repeat(ROLLOUTS // 2) * (torch.arange(ROLLOUTS) < active * ROLLOUTS)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, advantages.to(device)


def products(arguments, objective=None, **options):
    """(matrix products of N V H, route) of forward and backward."""
    routes = []

    def go():
        output = linear_policy_loss(*arguments, objective=objective or dapo(), backend="torch", **options)
        routes.append(output.route)
        if output.loss.requires_grad:
            output.loss.backward()

    return gemm_flops(go) / ONE, routes[-1]


pytestmark = pytest.mark.filterwarnings("ignore:.*Memory block of unknown size")
needs_torch = pytest.mark.skipif(INTERPRETED, reason="counts products of the torch backend, natively")


@needs_torch
@pytest.mark.parametrize("budget", [None, 20 * COLUMNS * 4, 7 * COLUMNS * 4])
@pytest.mark.parametrize("active", [0.0, 0.2, 0.5, 1.0])
def test_products(active, budget):
    """In units of 2 N V H: 3 in one pass, 1 + 2 f where a share f is active, 1 + 3 f by recomputation, else 3 f."""
    options = {"max_chunk_bytes": budget}
    count, route = products(batch(active), **options)
    assert count == pytest.approx(1 + 2 * active)
    assert route == ("one-pass" if active else "recompute")
    assert products(batch(active), route="recompute", **options)[0] == pytest.approx(1 + 3 * active)
    assert products(batch(active), statistics="active", **options)[0] == pytest.approx(3 * active)
    assert products(batch(active), compaction="none", **options)[0] == pytest.approx(3)
    assert products(batch(active), compaction="none", route="recompute", **options)[0] == pytest.approx(4)


@needs_torch
def test_masked_rows_and_frozen_weights_cost_nothing():
    half = LENGTH // 2
    assert products(batch(masked=half))[0] == pytest.approx(3 / 2)
    assert products(batch(masked=half), route="recompute")[0] == pytest.approx(4 / 2)
    hidden, weight, *rest = batch()
    assert products((hidden, weight.detach(), *rest))[0] == pytest.approx(2)
    assert products((hidden.detach(), weight, *rest))[0] == pytest.approx(2)
    assert products((hidden.detach(), weight.detach(), *rest)) == (pytest.approx(1), "statistics")
    with torch.no_grad():
        assert products(batch()) == (pytest.approx(1), "statistics")


def test_forced_one_pass_needs_room(backend, device):
    arguments = batch(device=device)
    fork, shaped = a3po_kernels.fork_tokens(), a3po_kernels.a3po()
    for objective, unit, rows in ((gspo(), "rollout", LENGTH - 1), (fork, "batch", 20), (shaped, "rollout", 3)):
        with pytest.raises(ValueError, match=f"a whole {unit}"):
            linear_policy_loss(
                *arguments, objective=objective, route="one-pass", max_chunk_bytes=rows * COLUMNS * 4, backend=backend
            )
    output = linear_policy_loss(
        *arguments, objective=gspo(), route="one-pass", max_chunk_bytes=LENGTH * COLUMNS * 4, backend=backend
    )
    assert output.route == "one-pass"


def test_backward_of_one_pass_runs_once(backend, device):
    """Its gradient is scaled in place; a second backward says so instead of scaling twice."""
    loss = linear_policy_loss(*batch(device=device), objective=dapo(), backend=backend).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="route='recompute'"):
        loss.backward()
    hidden, *rest = batch(device=device)
    loss = linear_policy_loss(hidden, *rest, objective=dapo(), backend=backend, route="recompute").loss
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * first, rtol=0, atol=0)


@pytest.mark.parametrize("route", ["one-pass", "recompute"])
def test_double_backward_raises(route, backend, device):
    hidden, *rest = batch(device=device)
    loss = linear_policy_loss(hidden, *rest, objective=dapo(), backend=backend, route=route).loss
    with pytest.raises(RuntimeError):
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        gradient.sum().backward()


@pytest.mark.parametrize("route", ["one-pass", "recompute"])
def test_same_bits_twice_and_accumulation(route, backend, device):
    def go(repeats):
        hidden, weight, *rest = batch(device=device)
        for _ in range(repeats):
            linear_policy_loss(
                hidden, weight, *rest, objective=dapo(), backend=backend, route=route, max_chunk_bytes=90000
            ).loss.backward()
        return hidden.grad, weight.grad

    once, again, twice = go(1), go(1), go(2)
    for a, b, c in zip(once, again, twice, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(2 * a, c)


def test_active_statistics_leave_the_rest_unread(backend, device):
    """NaN in the hidden states of rollouts without an advantage reaches nothing; counts are of all tokens."""
    hidden, weight, targets, advantages = batch(0.2, device=device)
    with torch.no_grad():
        hidden[2:] = torch.nan
    output = linear_policy_loss(
        hidden, weight, targets, advantages, objective=dapo(), statistics="active", compaction="exact", backend=backend
    )
    output.loss.backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all() and not hidden.grad[2:].any()
    assert all(value.isfinite() for value in output.metrics.values())
    assert output.metrics["token_count"] == ROLLOUTS * LENGTH
    assert output.metrics["active_fraction"].item() == pytest.approx(0.2)
    assert not output.logprobs[2:].any() and output.logprobs[:2].all()


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("route", ["auto", "recompute"])
def test_empty_batches(count, route, backend, device):
    """No tokens, or none at all: loss 0, gradients 0, nothing NaN."""
    hidden, weight, targets, advantages = batch(device=device)
    hidden = hidden.detach()[:count].requires_grad_()
    targets = torch.full_like(targets[:count], -100)
    output = linear_policy_loss(
        hidden, weight, targets, advantages[:count], objective=a3po_kernels.a3po(), route=route, backend=backend
    )
    output.loss.backward()
    assert output.loss == 0 and not weight.grad.any() and not hidden.grad.any()
    assert all(value.isfinite() for value in output.metrics.values())


def test_module(backend, device):
    arguments = batch(device=device)
    module = LinearPolicyLoss(dapo(), temperature=0.7, backend=backend)
    expected = linear_policy_loss(*arguments, objective=dapo(), temperature=0.7, backend=backend).entropy
    assert torch.equal(copy.deepcopy(module)(*arguments).entropy, expected)
    assert not torch.equal(module(*arguments, temperature=1.0).entropy, expected)
    with pytest.raises(TypeError, match="unexpected keyword 'inplace_backward'"):
        LinearPolicyLoss(dapo(), inplace_backward=True)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"route": "two-pass"}, ValueError, "route must be one of auto, one-pass, recompute"),
        ({"statistics": "some"}, ValueError, "statistics must be"),
        ({"objective": "dappo"}, ValueError, "objective must be an Objective or one of .*did you mean 'dppo'"),
        ({"advantages": torch.zeros(3)}, ValueError, "advantages must have shape"),
        ({"hidden": torch.zeros(60, WIDTH)}, ValueError, "need cu_seqlens"),
    ],
)
def test_errors(change, error, message):
    hidden, weight, targets, advantages = batch()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "advantages": advantages, "objective": dapo()}
    with pytest.raises(error, match=message):
        linear_policy_loss(**{**arguments, **change})


@needs_torch
def test_compiles_without_graph_breaks():
    """Under torch.compile the loops over tiles stay inside operators."""
    arguments = batch(0.5)

    def step(hidden, weight, targets, advantages):
        return linear_policy_loss(hidden, weight, targets, advantages, objective=dapo(), backend="torch").loss

    expected = step(*arguments)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(loss, expected)
    gradient = torch.autograd.grad(loss, arguments[1])[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, arguments[1])[0])


def test_selection_of_the_whole_batch_in_one_chunk(backend, device):
    """A rule over the batch is one pass where the batch is one chunk, and says so."""
    rule = TokenRule(metric="entropy", source="current", side="high", ratio=0.5, rest_scale=0.0, scope="batch")
    objective = a3po_kernels.Objective(shaping=(rule,), normalize_over="selected")
    found = {}
    for route in ("one-pass", "recompute"):
        hidden, *rest = batch(device=device)
        output = linear_policy_loss(hidden, *rest, objective=objective, route=route, backend=backend)
        output.loss.backward()
        found[route] = output.loss.detach(), hidden.grad
    for a, b in zip(found["one-pass"], found["recompute"], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("statistics", ["all", "active"])
@pytest.mark.parametrize("capacity", [12, 20, 1000])
def test_a_fixed_capacity_that_holds(capacity, statistics, backend, device):
    """12 of 60 rows have a gradient: any capacity from there on gives it, NaN in idle rows or not."""
    found = {}
    for compaction in (capacity, "none"):
        hidden, weight, targets, advantages = batch(0.2, device=device)
        targets[4] = -100
        with torch.no_grad():
            hidden[4] = torch.nan
        output = linear_policy_loss(
            hidden, weight, targets, advantages, objective=dapo(), route="recompute", compaction=compaction,
            statistics=statistics, backend=backend,
        )  # fmt: skip
        output.loss.backward()
        found[compaction] = output.loss.detach(), hidden.grad, weight.grad
    for a, b in zip(found[capacity], found["none"], strict=True):
        torch.testing.assert_close(a, b)
    assert found[capacity][1][:2].abs().sum() > 0


@pytest.mark.parametrize("statistics", ["all", "active"])
def test_a_fixed_capacity_that_overflows(statistics, backend, device):
    """11 rows do not hold 12: NaN everywhere on a GPU, never a gradient that lacks a row; the CPU counts."""
    hidden, weight, targets, advantages = batch(0.2, device=device)
    output = linear_policy_loss(
        hidden, weight, targets, advantages, objective=dapo(), compaction=11, statistics=statistics, backend=backend
    )
    assert output.route == ("one-pass" if backend == "torch" and device.type == "cpu" else "recompute")
    output.loss.backward()
    if output.route == "one-pass":
        assert hidden.grad[:2].all() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()
        return
    assert hidden.grad.isnan().all() and weight.grad.isnan().all()
    assert bool(output.logprobs.isnan().any()) == (statistics == "active")


def test_one_pass_takes_no_capacity(backend, device):
    if backend == "torch" and device.type == "cpu":
        pytest.skip("a number of rows is exact on the CPU")
    with pytest.raises(ValueError, match="needs 'recompute'"):
        linear_policy_loss(*batch(device=device), objective=dapo(), route="one-pass", compaction=5, backend=backend)
