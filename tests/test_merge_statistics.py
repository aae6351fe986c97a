"""The rule that merges the softmax statistics of parts of a vocabulary: associative, and it gives the whole."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from batches import largest_error

from a3po_kernels.backends.torch.statistics import merge_statistics
from a3po_kernels.backends.triton import math as _math
from a3po_kernels.core.transform import LN2, LOG2E, Transform
from a3po_kernels.ops.token_logprobs import empty_results, fold_statistics

ROWS, PARTS, COLUMNS = 6, 4, 50


@triton.jit
def _merge_kernel(a_ptr, b_ptr, out_ptr, ROWS: tl.constexpr):
    rows = tl.arange(0, 8)
    inside = rows < ROWS
    shift, total, dot = _math.merge_statistics(
        tl.load(a_ptr + rows, mask=inside), tl.load(a_ptr + ROWS + rows, mask=inside),
        tl.load(a_ptr + 2 * ROWS + rows, mask=inside), tl.load(b_ptr + rows, mask=inside),
        tl.load(b_ptr + ROWS + rows, mask=inside), tl.load(b_ptr + 2 * ROWS + rows, mask=inside),
    )  # fmt: skip
    tl.store(out_ptr + rows, shift, mask=inside)
    tl.store(out_ptr + ROWS + rows, total, mask=inside)
    tl.store(out_ptr + 2 * ROWS + rows, dot, mask=inside)


def merge(backend, a, b):
    if backend == "torch":
        return merge_statistics(a, b, 1.0)
    out = a.clone()
    _merge_kernel[(1,)](a, b, out, ROWS)
    out[3] = torch.where(a[3].isnan(), b[3], a[3])
    return out


def parts(device):
    """Base-2 logits [parts, rows, columns], one part masked with -inf, and the state [4, rows] of each part."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(PARTS, ROWS, COLUMNS, generator=generator, dtype=torch.float64).to(device)
    logits[1] += 300.0
    logits[2, 0] = -torch.inf
    shift = logits.amax(-1).clamp(min=-1e38)
    t = logits - shift.unsqueeze(-1)
    e = t.exp2()
    dot = (e * t.clamp(min=-2000.0)).sum(-1)
    target = torch.full_like(shift, torch.nan)
    target[3] = logits[3, :, 7]
    return logits, torch.stack([shift, e.sum(-1), dot, target], 1)


def same(a, b):
    """Equal up to rounding, whatever the shift."""
    return max(largest_error(x / y.abs().clamp(min=1.0), y / y.abs().clamp(min=1.0)) for x, y in zip(a, b, strict=True))


def test_any_bracketing_and_order_agree(backend, device):
    _, states = parts(device)
    a, b, c, d = states
    expected = merge(backend, merge(backend, a, b), merge(backend, c, d))
    assert same(merge(backend, a, merge(backend, b, merge(backend, c, d))), expected) < 1e-13
    assert same(merge(backend, merge(backend, merge(backend, a, b), c), d), expected) < 1e-13
    for order in itertools.permutations(states):
        merged = order[0]
        for state in order[1:]:
            merged = merge(backend, merged, state)
        assert same(merged, expected) < 1e-13


def test_the_merged_parts_are_the_whole(backend, device):
    logits, states = parts(device)
    merged = states[0]
    for state in states[1:]:
        merged = merge(backend, merged, state)
    whole = torch.cat(list(logits), -1)
    p = torch.softmax(whole / LOG2E, -1)
    entropy = -torch.where(p > 0, p * p.log(), 0.0).sum(-1)
    shift, total, dot, target = merged
    assert largest_error((total.log2() - dot / total) * LN2, entropy) < 1e-12
    assert largest_error((target - shift - total.log2()) * LN2, torch.log(p[:, 3 * COLUMNS + 7])) < 1e-12


@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_tiles_fold_to_the_whole(softcap, backend, device):
    """Any cut of the vocabulary, a tile of nothing but -inf, targets in any tile, NaN where there is nothing at all."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(ROWS, 90, generator=generator, dtype=torch.float64).to(device)
    logits[2, :40] = -torch.inf
    logits[4] = -torch.inf
    targets = torch.tensor([0, 39, 41, -100, 3, 95], device=device)  # the last is outside
    transform = Transform(None, 0.7, 1.3, softcap, -100)
    found = []
    for cuts in ((0, 90), (0, 40, 90), (0, 8, 40, 41, 90)):
        results = empty_results(logits, ROWS)
        state = torch.empty((4, ROWS), dtype=torch.float64, device=device)
        for start, stop in itertools.pairwise(cuts):
            fold_statistics(
                logits[None, :, start:stop].contiguous(), targets, transform, results, backend, first_column=start,
                first=start == 0, last=stop == 90, state=state,
            )  # fmt: skip
        found.append(torch.stack(results[:2]))
    for other in found[1:]:
        assert largest_error(other, found[0]) < 1e-12
    assert found[0][:, 4].isnan().all() and found[0][0, 5].isnan() and not found[0][:, 3].any()
