"""estimate_memory against what the allocator saw."""

from __future__ import annotations

import pytest
import torch
from batches import INTERPRETED
from measured import peak_bytes

from a3po_kernels import dapo, estimate_memory, linear_policy_loss

ROWS, WIDTH, VOCABULARY = 1000, 256, 16000


@pytest.mark.skipif(INTERPRETED, reason="the torch backend, natively")
@pytest.mark.parametrize("active, statistics", [(1.0, "all"), (0.2, "all"), (0.2, "active")])
@pytest.mark.parametrize("budget", [None, 8 << 20, 1 << 20])
@pytest.mark.parametrize("route", ["one-pass", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_five_percent(dtype, route, budget, active, statistics):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, ROWS // 10, WIDTH, generator=generator).to(dtype)
    weight = (0.1 * torch.randn(VOCABULARY, WIDTH, generator=generator)).to(dtype)
    targets = torch.randint(0, VOCABULARY, (10, ROWS // 10), generator=generator)
    advantages = torch.tensor([1.0, -1.0]).repeat(5) * (torch.arange(10) < 10 * active)

    def go():
        # Its own leaves: memory that was there before is not measured.
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        output = linear_policy_loss(
            *leaves, targets, advantages, objective=dapo(), route=route, max_chunk_bytes=budget, statistics=statistics,
            backend="torch",
        )  # fmt: skip
        output.loss.backward()
        return output, leaves

    go()
    measured = peak_bytes(go)
    estimate = estimate_memory(
        ROWS, WIDTH, VOCABULARY, dtype, dapo(), route=route, active_fraction=active, statistics=statistics,
        max_chunk_bytes=budget, backend="torch",
    )  # fmt: skip
    assert estimate["total"] == sum(value for name, value in estimate.items() if name != "total")
    assert estimate["total"] == pytest.approx(measured, rel=0.05), (estimate, measured)


def test_errors():
    with pytest.raises(ValueError, match="route must be"):
        estimate_memory(1, 1, 1, route="auto")
    with pytest.raises(ValueError, match="must be positive"):
        estimate_memory(0, 1, 1)
