"""Softmax statistics of the rows of logits in chunked PyTorch."""

from __future__ import annotations

import torch

from ...core.transform import LN2, Transform
from .rows import Rows, Scratch, capped, exponent_floor, row_scale, uniformly


class Buffers:
    """Room for the capped logits, exponents and exponentials of a chunk of rows."""

    def __init__(self, work: Rows, dtype: torch.dtype):
        self.u, self.t, self.e = (Scratch(work.step + 1, work.columns, work.logits, dtype) for _ in range(3))


def empty_shift(dtype: torch.dtype) -> float:
    """Where a row's largest capped logit starts: finite, so that nothing but -inf sums to 0 instead of NaN."""
    return torch.finfo(dtype).min


def chunk_statistics(
    u: torch.Tensor, k: torch.Tensor | float, buffers: Buffers
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(shift, sum of 2^t, sum of 2^t t) of capped logits u [n, V]; leaves 2^t t and 2^t in the buffers t and e."""
    n = u.shape[0]
    at_least_two = max(n, 2)
    m = u.amax(-1, keepdim=True).clamp_min_(empty_shift(u.dtype))
    t, e = buffers.t.rows(n), buffers.e.rows(n)
    torch.sub(u, m, out=t).mul_(k).clamp_min_(exponent_floor(t.dtype))
    e.copy_(t)
    buffers.e.apply_(torch.exp2_, n)
    total = buffers.e.rows(at_least_two).sum(-1)[:n]
    t.mul_(e)
    return m.squeeze(-1), total, buffers.t.rows(at_least_two).sum(-1)[:n]


def row_results(shift, total, dot, target, k) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logp, entropy, log2 sum) from merged statistics and the target's capped logit, NaN where that is unknown."""
    # Nothing but -inf in the row: no distribution.
    total = torch.where(total == 0, torch.nan, total)
    log_sum = uniformly(torch.log2, total)
    # Not clamped as t is: a target at -inf has logp -inf.
    return ((target - shift) * k - log_sum) * LN2, (log_sum - dot / total) * LN2, log_sum


def _tile_statistics(logits, targets, active, transform: Transform, dtype: torch.dtype) -> torch.Tensor:
    """State [4, N] of a tile: shift m = max u, sum of 2^t and of 2^t t with t = k (u - m), the target's u (or NaN)."""
    count = targets.numel()
    known = active & (targets >= 0) & (targets < logits.shape[-1])
    safe_targets = torch.where(known, targets, 0).long()
    state = torch.zeros((4, count), dtype=dtype, device=logits.device)
    shift, total, dot, target_u = state.unbind()
    work = Rows(logits, active)
    buffers = Buffers(work, dtype)
    for rows in work.chunks():
        u = capped(work.read(rows), buffers.u, transform)
        found = chunk_statistics(u, row_scale(rows, transform, dtype), buffers)
        shift[rows], total[rows], dot[rows] = found
        target_u[rows] = u.gather(-1, safe_targets[rows].unsqueeze(-1)).squeeze(-1)
    target_u.masked_fill_(~known, torch.nan)
    return state


def merge_statistics(a: torch.Tensor, b: torch.Tensor, k: torch.Tensor | float) -> torch.Tensor:
    """The state [4, N] of two disjoint parts of a vocabulary; associative up to rounding. k: base-2 exponents per u."""
    shift = torch.maximum(a[0], b[0])

    def moved(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        move = ((state[0] - shift) * k).clamp_min(exponent_floor(shift.dtype))
        scale = uniformly(torch.exp2, move)
        return scale * state[1], scale * (state[2] + move * state[1])

    (sum_a, dot_a), (sum_b, dot_b) = moved(a), moved(b)
    return torch.stack([shift, sum_a + sum_b, dot_a + dot_b, torch.where(a[3].isnan(), b[3], a[3])])


def fold_statistics(
    logits, targets, transform: Transform, results, *, first_column: int = 0, vocabulary: int | None = None,
    first: bool = True, last: bool = True, state=None,
) -> None:  # fmt: skip
    """Folds a tile of a vocabulary into the statistics of its rows; see backends.triton.statistics."""
    dtype = results[0].dtype
    active = targets != transform.ignore_index
    k = _scale_per_row(transform, dtype)
    merged = _tile_statistics(logits, targets - first_column, active, transform, dtype)
    if not first:
        merged = merge_statistics(state, merged, k)
    if not last:
        state.copy_(merged)
        return
    _store(merged, active, k, results)


def finish_statistics(states, targets, transform: Transform, results) -> None:
    """Merges the states [parts, 4, N] of the parts of a vocabulary, in their order, and writes the rows' results."""
    k = _scale_per_row(transform, results[0].dtype)
    merged = states[0]
    for part in states[1:]:
        merged = merge_statistics(merged, part, k)
    _store(merged, targets != transform.ignore_index, k, results)


def _scale_per_row(transform: Transform, dtype: torch.dtype) -> torch.Tensor | float:
    k = row_scale(slice(None), transform, dtype)
    return k if isinstance(k, float) or k.ndim == 0 else k.squeeze(-1)


def _store(merged: torch.Tensor, active: torch.Tensor, k: torch.Tensor | float, results) -> None:
    """Writes (logp, entropy, shift, log2 sum) of merged states [4, N], 0 where a row is not active."""
    shift, total, dot, target = merged
    # A row left out has no statistics.
    total = torch.where(active, total, 1.0)
    logp, entropy, log_sum = row_results(shift, total, dot, target, k)
    for result, values in zip(results, (logp, entropy, shift, log_sum), strict=True):
        result.copy_(torch.where(active, values, 0.0))
