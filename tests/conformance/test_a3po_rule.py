"""The A3PO weighting rule written out, against the weights of policy_loss: one threshold a rollout, no ties."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import a3po_kernels

LENGTHS = [1, 4, 5, 9, 10, 11, 0, 37, 100]


def released_rule(
    old: list[float], sign: float, step: int, rho: float = 2.0, alpha: float = 0.005, ratio: str = "0.2"
) -> list[float]:
    """Weights of one rollout: beta up to its 20 % quantile (sign > 0) or from its 80 % one on (sign < 0), else 1."""
    beta = max(1.0, rho - alpha * step)
    count = max(1, int(len(old) * Fraction(ratio)))
    ranked = sorted(old)
    if not old:
        return []
    if sign > 0:
        threshold = ranked[count - 1]
        return [beta if value <= threshold else 1.0 for value in old]
    if sign < 0:
        threshold = ranked[-count]
        return [beta if value >= threshold else 1.0 for value in old]
    return [1.0] * len(old)


def distinct(count: int, generator: torch.Generator) -> torch.Tensor:
    """Log-probs in (-5, 0) without ties."""
    return -5 * (torch.randperm(count, generator=generator) + 0.5) / max(count, 1)


@pytest.mark.parametrize("step", [0, 50, 150, 400])
@pytest.mark.parametrize("seed", range(5))
def test_weights(seed, step):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    count = int(ends[-1])
    old = distinct(count, generator)
    advantages = torch.randn(len(LENGTHS), generator=generator)
    advantages[seed] = 0.0
    output = a3po_kernels.policy_loss(
        torch.zeros(count, 3), torch.zeros(count, dtype=torch.long), advantages, objective=a3po_kernels.a3po(),
        old_logprobs=old, cu_seqlens=ends, step=step,
    )  # fmt: skip
    expected = []
    for rollout, (start, stop) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        expected += released_rule(old[start:stop].tolist(), advantages[rollout].item(), step)
    torch.testing.assert_close(output.weights, torch.tensor(expected))


@pytest.mark.parametrize("rho, alpha, ratio", [(2.0, 0.005, "0.2"), (3.0, 0.01, "0.2"), (1.5, 0.0, "0.29")])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_length_padded(sign, rho, alpha, ratio):
    """Rollouts of 0 to 40 tokens at random places of their rows; padding holds NaN and never counts."""
    generator = torch.Generator().manual_seed(int(sign) + 1)
    rows, width, step = 41, 48, 70
    mask = torch.zeros(rows, width, dtype=torch.bool)
    old = torch.full((rows, width), float("nan"))
    expected = torch.zeros(rows, width)
    for length in range(rows):
        places = torch.randperm(width, generator=generator)[:length].sort().values
        mask[length, places] = True
        old[length, places] = distinct(length, generator)
        weights = released_rule(old[length, places].tolist(), sign, step, rho, alpha, ratio)
        expected[length, places] = torch.tensor(weights)
    output = a3po_kernels.policy_loss(
        torch.zeros(rows, width, 3), torch.zeros(rows, width, dtype=torch.long), torch.full((rows,), sign),
        objective=a3po_kernels.a3po(rho=rho, alpha=alpha, ratio=float(ratio)), old_logprobs=old, mask=mask, step=step,
    )  # fmt: skip
    torch.testing.assert_close(output.weights, expected)
    chosen = (output.weights > 1).sum(1).tolist()
    assert chosen == [max(1, int(n * Fraction(ratio))) if n else 0 for n in range(rows)]


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient(seed):
    """A3PO is DAPO on the advantages times the rule's weights; the sign that the rule reads may be given apart."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    count, vocabulary = int(ends[-1]), 17
    targets = torch.randint(0, vocabulary, (count,), generator=generator)
    logits = torch.randn(count, vocabulary, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(count, generator=generator, dtype=torch.float64)
    old = torch.log_softmax(logits, -1)[torch.arange(count), targets] + noise
    advantages = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)
    polarity = torch.tensor([1, -1, 0, 1, -1, 1, 1, -1, 1]) if seed else None
    weights = []
    for rollout, (start, stop) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        sign = advantages[rollout] if polarity is None else polarity[rollout]
        weights += released_rule(old[start:stop].tolist(), sign.item(), 30)
    shaped = advantages.repeat_interleave(ends.diff()) * torch.tensor(weights, dtype=torch.float64)

    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    keywords = {"old_logprobs": old, "cu_seqlens": ends}
    loss = a3po_kernels.policy_loss(
        ours, targets, advantages, objective=a3po_kernels.a3po(), polarity=polarity, step=30, **keywords
    ).loss
    loss.backward()
    logp = torch.log_softmax(theirs, -1)[torch.arange(count), targets]
    ratio = (logp - old).exp()
    expected = torch.maximum(-shaped * ratio, -shaped * ratio.clamp(1 - 0.2, 1 + 0.28)).mean()
    expected.backward()
    # fp64 on both sides.
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=0)
