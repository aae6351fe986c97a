"""Log-probabilities among the tokens that min-p sampling keeps, in chunked PyTorch."""

from __future__ import annotations

import math

import torch

from ...core.checks import compute_dtype
from ...core.transform import LN2, Transform
from .rows import Rows, Scratch, capped, uniformly


def min_p_logprobs(logits, targets, min_p, transform: Transform):
    """[N] log-probs of the targets among the tokens with p >= min_p * max p."""
    dtype = compute_dtype(logits.dtype)
    active = targets != transform.ignore_index
    known = active & (targets >= 0) & (targets < logits.shape[-1])
    safe_targets = torch.where(known, targets, 0).long()
    target_t, total = (torch.zeros(targets.numel(), dtype=dtype, device=logits.device) for _ in range(2))
    work = Rows(logits, active)
    u_scratch, e_scratch = (Scratch(work.step + 1, work.columns, logits, dtype) for _ in range(2))
    floor = math.log2(min_p)
    k = transform.exponent_scale
    for rows in work.chunks():
        u = capped(work.read(rows), u_scratch, transform)
        n = u.shape[0]
        m = u.amax(-1, keepdim=True)
        e = e_scratch.rows(n)
        torch.sub(u, m, out=e).mul_(k)
        # "below" rather than "not at least": a NaN is kept, and makes the row NaN.
        e.masked_fill_(e < floor, -torch.inf)
        e_scratch.apply_(torch.exp2_, n)
        total[rows] = e_scratch.rows(max(n, 2)).sum(-1)[:n]
        target = safe_targets[rows].unsqueeze(-1)
        target_t[rows] = (u.gather(-1, target) - m).mul_(k).squeeze(-1)
    log_sum = uniformly(torch.log2, torch.where(active, total, 1.0))
    logp = (target_t - log_sum) * LN2
    logp = torch.where((target_t < floor) & ~log_sum.isnan(), -torch.inf, logp)
    return torch.where(known, logp, torch.where(active, torch.nan, 0.0).to(dtype))
