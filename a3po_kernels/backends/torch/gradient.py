"""The gradient of the logits in chunked PyTorch."""

from __future__ import annotations

import torch

from ...core.checks import compute_dtype
from ...core.transform import LN2, Transform
from .rows import Rows, Scratch, capped, exponent_floor, row_scale, uniformly


def finish_gradient(grad, u, targets, one_hot, transform: Transform) -> None:
    """Adds one_hot [n, 1] at the targets [n] of a chunk, and takes the gradient through the softcap; in place."""
    target = targets.unsqueeze(-1).long()
    known = (target >= 0) & (target < grad.shape[-1])
    grad.scatter_add_(-1, target.clamp(0, grad.shape[-1] - 1), torch.where(known, one_hot, 0.0).to(grad.dtype))
    if transform.softcap:
        grad.mul_(torch.where(torch.isfinite(u), 1.0 - (u / transform.softcap).square_(), 1.0))


def row_slope(k: torch.Tensor | float, transform: Transform) -> torch.Tensor | float:
    """d x / d u, and d y / d z with a softcap between: k carries the logit scale otherwise."""
    return (k * LN2) * (transform.logit_scale if transform.softcap else 1.0)


def write_gradient(
    out, logits, targets, shift, log_sum, entropy, grad_logp, grad_entropy, transform: Transform, first_column: int = 0
) -> None:
    """Writes dL/dz into `out` ([batch, rows, V], possibly the logits themselves); rows without gradient become 0."""
    dtype = compute_dtype(logits.dtype)
    zeros = torch.zeros_like(shift)
    grad_logp = zeros if grad_logp is None else grad_logp.to(dtype)
    with_entropy = grad_entropy is not None
    grad_entropy = grad_entropy.to(dtype) if with_entropy else zeros
    active = (targets != transform.ignore_index) & ((grad_logp != 0) | (grad_entropy != 0))
    work = Rows(logits, active)
    if work.index is not None:
        work.write(out, (~active).nonzero()[:, 0], 0.0)
    u_scratch, t_scratch, e_scratch = (Scratch(work.step + 1, work.columns, logits, dtype) for _ in range(3))
    inverse_total = uniformly(torch.exp2, -log_sum)
    for rows in work.chunks():
        u = capped(work.read(rows), u_scratch, transform)
        n = u.shape[0]
        k = row_scale(rows, transform, dtype)
        slope = row_slope(k, transform)
        g_lp = grad_logp[rows].unsqueeze(-1)
        weight = -inverse_total[rows].unsqueeze(-1) * slope
        e = e_scratch.rows(n)
        if with_entropy:
            g_h = grad_entropy[rows].unsqueeze(-1)
            t = t_scratch.rows(n)
            torch.sub(u, shift[rows].unsqueeze(-1), out=t).mul_(k).clamp_min_(exponent_floor(dtype))
            e.copy_(t)
            e_scratch.apply_(torch.exp2_, n)
            constant = g_lp + g_h * (entropy[rows] - LN2 * log_sum[rows]).unsqueeze(-1)
            grad = t.mul_(g_h * LN2 * weight).add_(constant * weight).mul_(e)
        else:
            torch.sub(u, shift[rows].unsqueeze(-1), out=e).mul_(k)
            e_scratch.apply_(torch.exp2_, n)
            grad = e.mul_(g_lp * weight)
        finish_gradient(grad, u, targets[rows] - first_column, g_lp * slope, transform)
        if work.index is None and logits.device.type != "cpu":
            # Every row was computed: one without a gradient may have held NaN.
            grad.masked_fill_(~active[rows].unsqueeze(-1), 0.0)
        work.write(out, rows, grad)
