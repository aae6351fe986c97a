"""Shaping rules, schedules and advantages, and the pure mathematics behind A3PO's choice of tokens."""

from __future__ import annotations

import math

import pytest
import torch

import a3po_kernels
import reference


@pytest.mark.parametrize("step", [0, 1, 37, 200, 10_000])
@pytest.mark.parametrize(
    "name, arguments",
    [
        ("LinearDecay", (2.0, 0.005)),
        ("LinearDecay", (3.0, 0.1, 0.5)),
        ("ExponentialDecay", (2.0, 0.01)),
        ("CosineDecay", (2.0, 100)),
        ("Constant", (1.7,)),
    ],
)
def test_schedules(name, arguments, step):
    """Numbers and 0-d tensors alike, equal to the reference."""
    ours, theirs = getattr(a3po_kernels, name)(*arguments), getattr(reference, name)(*arguments)
    assert math.isclose(float(ours(step)), float(theirs(step)), rel_tol=1e-12)
    assert math.isclose(float(ours(torch.tensor(step, dtype=torch.float64))), float(theirs(step)), rel_tol=1e-12)


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.float32])
def test_beta_of_a_tensor_step(kind, default):
    """Whatever PyTorch's default dtype, beta is that of the number; fp64 logits get it in fp64."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        step = torch.tensor(123, dtype=kind)
        for schedule in (a3po_kernels.LinearDecay(), a3po_kernels.ExponentialDecay(), a3po_kernels.CosineDecay()):
            assert float(schedule(step)) == pytest.approx(float(schedule(123)), rel=1e-15)
        logits = torch.randn(1, 5, 9, dtype=torch.float64)
        out = a3po_kernels.policy_loss(
            logits, torch.zeros(1, 5, dtype=torch.long), torch.ones(1, dtype=torch.float64),
            objective=a3po_kernels.a3po(), step=step,
        )  # fmt: skip
    finally:
        torch.set_default_dtype(old)
    assert out.weights.max().item() == out.metrics["weight"].item() == pytest.approx(2.0 - 0.005 * 123, rel=1e-15)


def test_any_callable_is_a_schedule():
    objective = a3po_kernels.a3po(schedule=lambda step: 1.0 + 1.0 / (1 + step))
    logits, targets = torch.randn(1, 5, 9), torch.zeros(1, 5, dtype=torch.long)
    output = a3po_kernels.policy_loss(logits, targets, torch.ones(1), objective=objective, step=1)
    assert output.weights.max().item() == 1.5 and output.metrics["weight"].item() == 1.5


@pytest.mark.parametrize("normalize", ["std", "none"])
def test_group_advantages(normalize):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(20, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 6, (20,), generator=generator) * 1000 - 5
    rewards[ids == ids[0]] = 0.1  # a group of equal rewards, whose mean in floating point need not be 0.1
    got = a3po_kernels.group_advantages(rewards, ids, normalize)
    want = reference.group_advantages(rewards, ids, normalize)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    assert not got[ids == ids[0]].any(), "equal rewards give exactly zero: their rows cost nothing"
    assert a3po_kernels.group_advantages(torch.tensor([0.7]), torch.tensor([3])).item() == pytest.approx(0.7)
    assert a3po_kernels.group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_a3po_by_hand():
    """Ten tokens: 2 - 100 * .005 for the two least likely of the positive and the two likeliest of the negative."""
    old = torch.log(torch.tensor([[0.9, 0.1, 0.5, 0.4, 0.3, 0.2, 0.8, 0.7, 0.6, 0.05]])).repeat(2, 1)
    logits, targets = torch.zeros(2, 10, 4), torch.zeros(2, 10, dtype=torch.long)
    output = a3po_kernels.policy_loss(
        logits, targets, torch.tensor([1.0, -1.0]), objective=a3po_kernels.a3po(), old_logprobs=old, step=100
    )
    positive, negative = torch.ones(10), torch.ones(10)
    positive[[1, 9]], negative[[0, 6]] = 1.5, 1.5
    assert torch.equal(output.weights, torch.stack([positive, negative]))
    assert output.metrics["selected_fraction_positive"].item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    "sign, likely, raises", [(1, False, True), (-1, True, True), (1, True, False), (-1, False, False)]
)
def test_entropy_moves_as_the_paper_says(sign, likely, raises):
    """For one softmax row, a small step that raises an unlikely token or lowers a likely one raises its entropy.

    dH/dx_j = -p_j (log p_j + H), so along the gradient of logp the change is -sum_j (1[j=t] - p_j) p_j (log p_j + H):
    positive where log p_t lies well below -H, negative where it lies above. Shown on every row of a batch through
    a3po's own selection: the selected tokens' steps change the entropy in the stated direction.
    """
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(64, 5, 40, generator=generator, dtype=torch.float64)
    log_p = torch.log_softmax(logits, -1)
    rank = log_p.argsort(-1, descending=True)
    # The first token of a rollout is its likeliest (or least likely) by far; the others sit in between.
    targets = rank[..., 10].clone()
    targets[:, 0] = rank[:, 0, 0 if likely else -1]
    old = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    rule = a3po_kernels.TokenRule(sign, side="high" if likely else "low", selected_scale=1.0, rest_scale=0.0)
    objective = a3po_kernels.Objective(shaping=(rule,), surrogate=a3po_kernels.Clip(), aggregation="seq-mean-token-sum")
    z = logits.clone().requires_grad_()
    output = a3po_kernels.policy_loss(
        z, targets, torch.full((64,), float(sign), dtype=torch.float64), objective=objective, old_logprobs=old
    )
    assert torch.equal(output.weights[:, 0], torch.ones(64).double()) and not output.weights[:, 1:].any()
    output.loss.backward()
    after = a3po_kernels.token_logprobs(logits - 0.01 * z.grad, targets).entropy
    change = (after - output.entropy)[:, 0]
    assert bool((change > 0).all() if raises else (change < 0).all())
