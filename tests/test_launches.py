"""A step is launches: how many the default path takes, so that the number cannot creep up."""

from __future__ import annotations

import pytest
import torch
from batches import INTERPRETED

import a3po_kernels
from a3po_kernels.core import checks, layout
from a3po_kernels.losses import batch, linear, scales

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="counts launches in Triton's interpreter"),
]
ROLLOUTS, LENGTH, VOCABULARY, WIDTH = 3, 5, 64, 8


def arguments():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, VOCABULARY, (ROLLOUTS, LENGTH), generator=generator)
    advantages = torch.tensor([1.0, -1.0, 0.0])
    mask = torch.ones(ROLLOUTS, LENGTH, dtype=torch.bool)
    old = torch.full((ROLLOUTS, LENGTH), -4.0)
    return targets, advantages, {"old_logprobs": old, "mask": mask}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Values are checked on a CPU alone."""
    for module in (batch, linear, scales, checks, layout):
        monkeypatch.setattr(module, "reads_values", lambda *_: False)


def on_logits(name: str, **options):
    from launches import describe, launches

    targets, advantages, keywords = arguments()
    logits = torch.randn(ROLLOUTS, LENGTH, VOCABULARY, requires_grad=True)
    objective = getattr(a3po_kernels, name)()

    def step():
        a3po_kernels.policy_loss(
            logits, targets, advantages, objective=objective, backend="triton", **keywords, **options
        ).loss.backward()

    step()  # gradients are there already, as in a training loop that keeps them
    logits.grad = None
    counted = launches(step)
    return counted.total(), describe(counted)


# The goal was 20 for DAPO and 26 for A3PO; what there is, is held.
@pytest.mark.parametrize(
    "name, route, most",
    [("dapo", "one-launch", 9), ("a3po", "one-launch", 10), ("dapo", "two-stage", 10), ("a3po", "two-stage", 11)],
)
def test_policy_loss(name, route, most):
    total, which = on_logits(name, route=route)
    assert total <= most, which
    assert total >= 6, f"the counter sees too little: {which}"


@pytest.mark.parametrize("name, most", [("dapo", 30), ("a3po", 31)])
def test_linear_policy_loss(name, most):
    """One chunk of every row: three products, and what stands around them."""
    from launches import describe, launches

    targets, advantages, keywords = arguments()
    hidden = torch.randn(ROLLOUTS, LENGTH, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    objective = getattr(a3po_kernels, name)()
    advantages = advantages + 0.5
    plan = a3po_kernels.plan_rows(keywords["mask"], advantages, objective=objective)

    def step():
        a3po_kernels.linear_policy_loss(
            hidden, weight, targets, advantages, objective=objective, backend="triton", plan=plan, **keywords
        ).loss.backward()

    step()
    hidden.grad = weight.grad = None
    counted = launches(step)
    assert counted.total() <= most, describe(counted)


def test_a_group_of_one_rank_costs_no_launch():
    """Tensor-parallel arguments with one rank: the very launches of a head without them."""
    import torch.distributed as dist
    from launches import describe, launches

    targets, advantages, keywords = arguments()
    hidden = torch.randn(ROLLOUTS, LENGTH, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)

    def step(**split):
        a3po_kernels.linear_policy_loss(
            hidden, weight, targets, advantages + 0.5, objective=a3po_kernels.dapo(), backend="triton", **keywords,
            **split,
        ).loss.backward()  # fmt: skip

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        step()
        hidden.grad = weight.grad = None
        alone = launches(step)
        hidden.grad = weight.grad = None
        grouped = launches(lambda: step(tp_group=dist.group.WORLD, vocab_size=VOCABULARY))
    finally:
        dist.destroy_process_group()
    assert describe(grouped) == describe(alone)
