"""select_tokens against a literal sort, over shapes, ties and every rounding."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from batches import INTERPRETED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import a3po_kernels
import reference
from a3po_kernels.core.rounding import bounded_fraction

EXAMPLES = 8 if INTERPRETED else 150


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_against_a_sort(data, backend, device):
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    count = sum(lengths)
    value = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf]) | st.floats(-2, 2, width=16)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    metric = torch.tensor(data.draw(st.lists(value, min_size=count, max_size=count)), dtype=dtype)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    keywords = {
        "ratio": data.draw(st.sampled_from([0.2, 0.29, 1.0, 0.001, 1 / 3, 0.5])),
        "side": data.draw(st.sampled_from(["low", "high"])),
        "scope": data.draw(st.sampled_from(["rollout", "batch", "global"])),
        "rounding": data.draw(st.sampled_from(["floor", "ceil"])),
    }
    ends = torch.tensor([0, *lengths]).cumsum(0)
    got = a3po_kernels.select_tokens(
        metric.to(device), mask.to(device), cu_seqlens=ends.to(device), backend=backend, **keywords
    )
    want = reference.select_tokens(metric, mask, cu_seqlens=ends, **keywords)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("length", [1, 2, 3, 511, 512, 513, 1500])
@pytest.mark.parametrize("side", ["low", "high"])
def test_lengths_around_a_block(length, side, backend, device):
    """Rollouts that end before, at and after a block of the kernel, with many ties."""
    metric = torch.randint(-3, 3, (2, length), generator=torch.Generator().manual_seed(length)).float()
    got = a3po_kernels.select_tokens(metric.to(device), ratio=0.37, side=side, backend=backend)
    assert torch.equal(got.cpu(), reference.select_tokens(metric, ratio=0.37, side=side))


def test_one_long_rollout_among_short_ones(backend, device):
    """Padding all to the longest would cost too much: the torch backend sorts them another way."""
    ends = torch.tensor([0, 400, *range(401, 451)])
    metric = torch.randint(-9, 9, (450,), generator=torch.Generator().manual_seed(0)).float()
    for side in ("low", "high"):
        got = a3po_kernels.select_tokens(
            metric.to(device), cu_seqlens=ends.to(device), ratio=0.37, side=side, backend=backend
        )
        assert torch.equal(got.cpu(), reference.select_tokens(metric, cu_seqlens=ends, ratio=0.37, side=side))


def test_counts_are_exact(backend, device):
    """0.29 of 100 is 29 (0.29 * 100 is 28.999...), at least one token, none of none."""
    metric = torch.arange(100.0, device=device).expand(3, 100)
    mask = torch.zeros(3, 100, dtype=torch.bool, device=device)
    mask[0], mask[1, 50:53] = True, True
    got = a3po_kernels.select_tokens(metric, mask, ratio=0.29, side="low", backend=backend)
    assert got.sum(1).tolist() == [29, 1, 0]
    assert got[1].nonzero().item() == 50
    got = a3po_kernels.select_tokens(metric, mask, ratio=0.29, side="high", rounding="ceil", backend=backend)
    assert got.sum(1).tolist() == [29, 1, 0]


def test_ties_go_to_the_earlier_position(backend, device):
    metric = torch.tensor([0.0, 1.0, -0.0, 0.0, 0.0, 2.0], device=device)
    low = a3po_kernels.select_tokens(metric, ratio=0.5, side="low", backend=backend)
    assert low.tolist() == [True, False, True, True, False, False]
    high = a3po_kernels.select_tokens(torch.ones(4, device=device), ratio=0.5, side="high", backend=backend)
    assert high.tolist() == [True, True, False, False]


@given(
    ratio=st.floats(1e-9, 1.0, exclude_min=True), limit=st.integers(1, 5000), ceil=st.booleans(), n=st.integers(0, 5000)
)
def test_bounded_fraction(ratio, limit, ceil, n):
    """Every multiple up to the limit rounds as that of the exact decimal does."""
    n = n % (limit + 1)
    exact, bounded = Fraction(str(ratio)), bounded_fraction(ratio, limit, ceil)
    round_ = math.ceil if ceil else math.floor
    assert round_(n * exact) == round_(n * bounded)
    assert bounded.denominator <= limit or bounded == 0


def test_long_single_rollout(backend, device):
    """Longer than what one program walks: the sort takes over, with the same tokens."""
    metric = torch.randn(20000, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    got = a3po_kernels.select_tokens(metric.to(device), ratio=0.2, side="low", scope="batch", backend=backend)
    order = torch.sort(metric, stable=True).indices[:4000]
    assert got.cpu().nonzero().squeeze(1).tolist() == sorted(order.tolist())
