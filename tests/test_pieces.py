"""What no call on a CPU reaches, taken piece by piece: found by mutants that nothing noticed."""

from __future__ import annotations

import torch

from a3po_kernels.backends.triton.launch import loads_of
from a3po_kernels.core.checks import compute_dtype
from a3po_kernels.core.transform import Transform
from a3po_kernels.ops.min_p import min_p_rows
from a3po_kernels.ops.one_launch import scale_gradient
from a3po_kernels.ops.tokens import read_tokens


def test_rows_outside_of_every_rollout(backend, device):
    """Where cu_seqlens cannot be read, on a GPU, rows before the first rollout and behind the last are no tokens."""
    offsets = torch.tensor([1, 3, 4], device=device)
    advantages = torch.tensor([2.0, -1.0], device=device)
    read = read_tokens(
        torch.zeros(6, dtype=torch.long, device=device), None, offsets, 6, torch.float32, advantages, None, None,
        [True, False, False], (1.0, 1.0, 1.0), -100, backend,
    )  # fmt: skip
    assert read.tokens.tolist() == [False, True, True, True, False, False]
    assert read.advantages.tolist() == [0.0, 2.0, 2.0, -1.0, 0.0, 0.0]
    assert read.counts.tolist() == [2.0, 1.0] and read.weights.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_a_target_outside_of_the_vocabulary(backend, device):
    """NaN where targets cannot be read on the host, and no read out of bounds; 0 where the row is ignored."""
    logits = torch.randn(1, 4, 9, device=device)
    targets = torch.tensor([9, -1, -100, 3], device=device)
    found = min_p_rows(logits, targets, 0.02, Transform(None, 1.0, 1.0, 0.0, -100), backend)
    assert found.isnan().tolist() == [True, True, False, False] and found[2] == 0


def test_scaling_rows_of_any_width(backend, device):
    """A row wider than the piece that is widened at a time, a number, and nothing at all."""
    factor = torch.tensor(0.3, device=device)
    for shape in ((3, 300_000), (2, 5, 7), (4,), (), (0, 3), (1, 600_000)):
        for dtype in (torch.float32, torch.bfloat16):
            gradient = torch.randn(shape, device=device).to(dtype)
            expected = (gradient.double() * factor.double().item()).to(compute_dtype(dtype))
            found = scale_gradient(gradient.clone(), factor, backend)
            bound = {"rtol": 1e-2 if dtype is torch.bfloat16 else 1e-6, "atol": 1e-6}
            torch.testing.assert_close(found.to(expected.dtype), expected, **bound)


def test_scaling_in_place_between_other_numbers(backend, device):
    """Of logits with strides of their own: what lies between them stays."""
    for spread in ((slice(None), slice(None, None, 2)), (slice(None, None, 2), slice(1, None)), (..., slice(3, 9))):
        wide = torch.randn(4, 6, 11, device=device)
        expected = wide.clone()
        expected[spread] *= 0.3
        scale_gradient(wide[spread], torch.tensor(0.3, device=device), backend)
        torch.testing.assert_close(wide, expected, rtol=1e-6, atol=0.0)


def test_rows_are_read_the_fastest_way_that_they_allow():
    assert loads_of(torch.zeros(2, 3, 64)) == "aligned"
    assert loads_of(torch.zeros(2, 3, 63)) == "shifted"
    assert loads_of(torch.zeros(2, 64, 3).transpose(1, 2)) == "strided"
    assert loads_of(torch.zeros(2, 64, 1).transpose(0, 1)) != "strided"
