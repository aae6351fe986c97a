"""Determinism, and batch invariance to the bit: what a row gives does not depend on which rows share the batch."""

from __future__ import annotations

import pytest
import torch
from batches import INTERPRETED, random_batch, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import a3po_kernels

EXAMPLES = 3 if INTERPRETED else 25


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """CPU threads: ATen splits its loops by their number."""
    if INTERPRETED and request.param > 1:
        pytest.skip("the interpreter runs one program after another")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def statistics(logits, targets, backend, **options):
    z = logits.detach().clone().requires_grad_()
    stats = a3po_kernels.token_logprobs(z, targets, backend=backend, **options)
    (stats.logprobs * 1.5 - stats.entropy * 0.25).sum().backward()
    return stats.logprobs.detach(), stats.entropy.detach(), z.grad


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**16), rows=st.integers(2, 70), vocabulary=st.sampled_from([1, 5, 257, 1000, 4097, 50257]),
    softcap=st.sampled_from([None, 15.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_a_row_alone_is_the_row_in_a_batch(threads, seed, rows, vocabulary, softcap, dtype, backend, device):
    rows = min(rows, 4) if INTERPRETED or vocabulary > 5000 else rows
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, vocabulary, generator=generator)).to(device=device, dtype=dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator).to(device)
    together = statistics(logits, targets, backend, softcap=softcap, temperature=0.9)
    for part in (slice(0, 1), slice(rows - 1, rows), slice(1, rows), slice(0, rows - 1)):
        alone = statistics(logits[part], targets[part], backend, softcap=softcap, temperature=0.9)
        for whole, piece in zip(together, alone, strict=True):
            assert torch.equal(whole[part], piece)


@pytest.mark.parametrize("vocabulary", [32000, 151936])
def test_wide_rows(threads, vocabulary, backend, device):
    """Wide enough that one row alone would be split over the threads, and one row fills a chunk."""
    if INTERPRETED and vocabulary > 32000:
        pytest.skip("the interpreter is slow")
    count = 3 if INTERPRETED else 40
    logits = torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(1)).to(device)
    targets = torch.arange(count, device=device) * 7
    together = statistics(logits, targets, backend)
    for part in (slice(0, 1), slice(1, 3), slice(0, count - 1)):
        for whole, piece in zip(together, statistics(logits[part], targets[part], backend), strict=True):
            assert torch.equal(whole[part], piece)


def test_masked_neighbours_do_not_matter(threads, backend, device):
    """The rows that are computed give the same bits whichever others are masked."""
    logits = torch.randn(23, 3001, generator=torch.Generator().manual_seed(2)).to(device)
    targets = torch.arange(23, device=device)
    together = statistics(logits, targets, backend)
    masked = targets.clone()
    masked[::3] = -100
    kept = masked != -100
    for whole, part in zip(together, statistics(logits, masked, backend), strict=True):
        assert torch.equal(whole[kept], part[kept]) and not part[~kept].any()


@pytest.mark.parametrize("name", ["a3po", "gspo", "fork_tokens", "lp_reg"])
def test_the_same_bits_twice(name, backend, device):
    batch = random_batch(4, rollouts=7, length=19, vocabulary=300, dtype=torch.float32, device=device)
    objective = getattr(a3po_kernels, name)(kl_coef=0.1, entropy_coef=0.01)
    first, gradient = run(a3po_kernels, batch, objective, backend=backend)
    for _ in range(1 if INTERPRETED else 3):
        again, same = run(a3po_kernels, batch, objective, backend=backend)
        assert torch.equal(first.loss, again.loss)
        assert torch.equal(gradient, same)
        assert torch.equal(first.weights, again.weights)
        assert all(torch.equal(first.metrics[key], again.metrics[key]) for key in first.metrics)
