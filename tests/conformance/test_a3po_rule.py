"""The A3PO weighting rule written out, against the weights of policy_loss: one threshold a rollout, no ties."""

from __future__ import annotations

import pytest
import torch

import a3po_kernels


def released_rule(old: list[float], advantage: float, step: int, rho=2.0, alpha=0.005) -> list[float]:
    """Weights of one rollout: beta below its 20 % quantile (A > 0) or above its 80 % quantile (A < 0), else 1."""
    beta = max(1.0, rho - alpha * step)
    count = max(1, len(old) * 2 // 10)
    ranked = sorted(old)
    if not old:
        return []
    if advantage > 0:
        threshold = ranked[count - 1]
        return [beta if value <= threshold else 1.0 for value in old]
    if advantage < 0:
        threshold = ranked[-count]
        return [beta if value >= threshold else 1.0 for value in old]
    return [1.0] * len(old)


@pytest.mark.parametrize("step", [0, 50, 150, 400])
@pytest.mark.parametrize("seed", range(5))
def test_weights(seed, step):
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 4, 5, 9, 10, 11, 0, 37, 100]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    count = int(ends[-1])
    old = -torch.rand(count, generator=generator) * 5
    advantages = torch.randn(len(lengths), generator=generator)
    advantages[seed] = 0.0
    output = a3po_kernels.policy_loss(
        torch.zeros(count, 3), torch.zeros(count, dtype=torch.long), advantages, objective=a3po_kernels.a3po(),
        old_logprobs=old, cu_seqlens=ends, step=step,
    )  # fmt: skip
    expected = []
    for rollout, (start, stop) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        expected += released_rule(old[start:stop].tolist(), advantages[rollout].item(), step)
    assert torch.allclose(output.weights, torch.tensor(expected))
