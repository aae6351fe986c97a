"""Log-probabilities among the tokens that min-p sampling keeps, in chunked PyTorch."""

from __future__ import annotations

import math

import torch

from ...core.checks import compute_dtype
from ...core.transform import LN2, Transform
from .rows import Rows, Scratch, capped, uniformly


def row_maxima(logits, targets, transform: Transform):
    """[N]: the largest capped logit of each row; unspecified where the target is ignored."""
    dtype = compute_dtype(logits.dtype)
    work = Rows(logits, targets != transform.ignore_index)
    largest = torch.zeros(targets.numel(), dtype=dtype, device=logits.device)
    u_scratch = Scratch(work.step + 1, work.columns, logits, dtype)
    for rows in work.chunks():
        largest[rows] = capped(work.read(rows), u_scratch, transform).amax(-1)
    return largest


def min_p_part(logits, targets, largest, min_p, transform: Transform, first_column: int):
    """[2, N] of some columns: the sum of 2^t over what is kept, t = k (u - largest), and the target's t or NaN.

    largest: [N], row_maxima of the whole vocabulary; None: these columns are it.
    """
    dtype = compute_dtype(logits.dtype)
    targets_here = targets - first_column
    known = (targets != transform.ignore_index) & (targets_here >= 0) & (targets_here < logits.shape[-1])
    safe_targets = torch.where(known, targets_here, 0).long()
    part = torch.zeros((2, targets.numel()), dtype=dtype, device=logits.device)
    total, target_t = part
    work = Rows(logits, targets != transform.ignore_index)
    u_scratch, e_scratch = (Scratch(work.step + 1, work.columns, logits, dtype) for _ in range(2))
    floor = math.log2(min_p)
    k = transform.exponent_scale
    for rows in work.chunks():
        u = capped(work.read(rows), u_scratch, transform)
        n = u.shape[0]
        m = u.amax(-1, keepdim=True) if largest is None else largest[rows].unsqueeze(-1)
        e = e_scratch.rows(n)
        torch.sub(u, m, out=e).mul_(k)
        # "below" rather than "not at least": a NaN is kept, and makes the row NaN.
        e.masked_fill_(e < floor, -torch.inf)
        e_scratch.apply_(torch.exp2_, n)
        total[rows] = e_scratch.rows(max(n, 2)).sum(-1)[:n]
        target = safe_targets[rows].unsqueeze(-1)
        target_t[rows] = (u.gather(-1, target) - m).mul_(k).squeeze(-1)
    target_t.masked_fill_(~known, torch.nan)
    return part


def finish_min_p(parts, targets, min_p, transform: Transform):
    """[N] log-probs of the targets from the parts [parts, 2, N] of a vocabulary, in their order."""
    active = targets != transform.ignore_index
    total, target_t = parts[0]
    for more, found in parts[1:]:
        total, target_t = total + more, torch.where(target_t.isnan(), found, target_t)
    log_sum = uniformly(torch.log2, torch.where(active, total, 1.0))
    logp = (target_t - log_sum) * LN2
    logp = torch.where((target_t < math.log2(min_p)) & ~log_sum.isnan(), -torch.inf, logp)
    return torch.where(active, logp, 0.0)


def min_p_logprobs(logits, targets, min_p, transform: Transform):
    """[N] log-probs of the targets among the tokens with p >= min_p * max p."""
    return finish_min_p(min_p_part(logits, targets, None, min_p, transform, 0)[None], targets, min_p, transform)
