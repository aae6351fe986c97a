"""A slice of the standing fuzz, and that it is what it says: reproducible, and blind to nothing that it counts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from batches import INTERPRETED

import a3po_kernels
from tests.fuzz.cases import ENTRIES, draw
from tests.fuzz.judge import Fault, expect, run_case

SEED = 10
CASES, PIECES = (40, 4) if INTERPRETED else (500, 5)


@pytest.mark.parametrize("piece", range(PIECES))
def test_a_slice(piece, backend, device):
    if device.type != "cpu":
        pytest.skip("the fuzz draws its tensors on the CPU")
    numbers = range(piece * CASES // PIECES, (piece + 1) * CASES // PIECES)
    verdicts = [run_case(SEED, index, backend) for index in numbers]
    wrong = [f"{v.case.command}  # {v.fault}" for v in verdicts if v.fault]
    assert not wrong, "\n".join(wrong)
    assert Counter(v.kind for v in verdicts)["compared"] > len(verdicts) // 2


def test_cases_repeat_and_differ():
    one, same, other = draw(3, 17, "torch"), draw(3, 17, "torch"), draw(3, 18, "torch")
    assert one.spec == same.spec and one.options.keys() == same.options.keys() and one.shape == same.shape
    assert (one.entry, one.shape, one.spec) != (other.entry, other.shape, other.spec)
    entries = Counter(draw(0, index, "torch").entry for index in range(400))
    assert set(entries) == set(ENTRIES)


def test_what_is_compared():
    nan = torch.tensor([1.0, torch.nan])
    expect("x", nan, nan, 0.0)
    for got in (torch.tensor([1.0, 2.0]), torch.tensor([torch.nan, torch.nan]), torch.ones(3)):
        with pytest.raises(Fault):
            expect("x", got, nan, 0.5)
    with pytest.raises(Fault):
        expect("x", torch.tensor([1.0]), torch.tensor([torch.inf]), 1e9)


# Found by the fuzz, and mended.


@pytest.mark.parametrize("route", ["one-pass", "recompute"])
def test_active_statistics_leave_the_divisor(route, backend, device):
    """statistics="active" changes which means the metrics are, and not the loss."""
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, device=device).requires_grad_()
    weight = torch.randn(7, 4, dtype=torch.float64, device=device)
    targets = torch.zeros(2, 3, dtype=torch.long, device=device)
    objective = a3po_kernels.Objective(normalize_over="selected")
    advantages = torch.tensor([1.0, 0.0], device=device)
    every, active = (
        a3po_kernels.linear_policy_loss(
            hidden, weight, targets, advantages, objective=objective, route=route, statistics=statistics,
            backend=backend,
        ).loss
        for statistics in ("all", "active")
    )  # fmt: skip
    torch.testing.assert_close(active, every)


def test_an_empty_batch_in_place(backend, device):
    logits = torch.zeros(3, 0, 1, device=device, requires_grad=True) + 0.0
    targets = torch.zeros(3, 0, dtype=torch.long, device=device)
    a3po_kernels.token_logprobs(logits, targets, inplace_backward=True, backend=backend).logprobs.sum().backward()


@pytest.mark.parametrize("on_policy", [False, True])
def test_a_broken_row_reaches_loss_and_gradient(on_policy, backend, device):
    """SPEC: a row with NaN gives NaN, never a plausible number."""
    logits = torch.randn(2, 3, 7, dtype=torch.float64, device=device)
    logits[0, 1, 2] = torch.nan
    logits.requires_grad_()
    old = {} if on_policy else {"old_logprobs": torch.full((2, 3), -2.0, device=device)}
    targets, advantages = torch.zeros(2, 3, dtype=torch.long, device=device), torch.ones(2, device=device)
    loss = a3po_kernels.policy_loss(logits, targets, advantages, objective=a3po_kernels.dapo(), backend=backend, **old)
    (gradient,) = torch.autograd.grad(loss.loss, logits)
    assert loss.loss.isnan() and gradient[0, 1].isnan().all()
