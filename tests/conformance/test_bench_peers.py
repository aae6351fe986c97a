"""The peers that the benchmarks measure on a CPU compute what "eager" computes: a ratio of times is one of equals."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")
from bench import providers
from bench.harness import Problem

pytestmark = pytest.mark.trl
PROBLEM = Problem("linear", 40, 300, 16)


@pytest.mark.parametrize("name", ["TRL head", "TRL head, 8192 columns", "Liger chunked GRPO"])
def test_a_peer_gives_eagers_loss_and_gradients(name):
    if name.startswith("Liger"):
        pytest.importorskip("liger_kernel")
    batch = providers.inputs(PROBLEM, torch.device("cpu"))

    def run(provider):
        inputs = providers.leaves(provider.prepare(batch))
        loss = provider.forward(inputs)
        return loss.detach(), *torch.autograd.grad(loss, [inputs["hidden"], inputs["weight"]])

    expected = run(providers.named(f"linear:{providers.BASELINE}"))
    for found, right in zip(run(providers.named(f"linear:{name}")), expected, strict=True):
        # Sums of 300 or fewer fp32 products in another order.
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
