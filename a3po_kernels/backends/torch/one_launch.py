"""Both stages of a chunk of rows while it is in the cache: statistics, each row's own coefficient, and the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.checks import compute_dtype
from ...core.forms import PolicyInputs, SurrogateForm
from ...core.transform import LN2, Transform
from .gradient import finish_gradient, row_slope
from .rows import Rows, capped, row_scale, uniformly
from .statistics import Buffers, chunk_statistics, row_results
from .token_loss import behaviour, loss_terms


def write_statistics_and_gradient(
    out: Tensor, logits: Tensor, targets: Tensor, transform: Transform, results: tuple[Tensor, ...],
    inputs: PolicyInputs, form: SurrogateForm,
) -> None:  # fmt: skip
    """Statistics of logits [batch, rows, V] into `results`, and the loss's gradient into `out`, perhaps the logits."""
    dtype = compute_dtype(logits.dtype)
    tokens = targets != transform.ignore_index
    for result in results:
        result.zero_()
    work = Rows(logits, tokens)
    if work.index is not None:
        work.write(out, (~tokens).nonzero()[:, 0], 0.0)
    buffers = Buffers(work, dtype)
    scale = inputs.scale[inputs.rollout.long()]
    for rows in work.chunks():
        u = capped(work.read(rows), buffers.u, transform)
        n, k = u.shape[0], row_scale(rows, transform, dtype)
        shift, total, dot = chunk_statistics(u, k, buffers)
        target = targets[rows].long()
        known = (target >= 0) & (target < work.columns)
        target_u = u.gather(-1, target.clamp(0, work.columns - 1).unsqueeze(-1)).squeeze(-1)
        logp, entropy, log_sum = row_results(
            shift, total, dot, torch.where(known, target_u, torch.nan), k if isinstance(k, float) else k.squeeze(-1)
        )
        mine = tokens[rows]
        for result, values in zip(results, (logp, entropy, shift, log_sum), strict=True):
            result[rows] = values if work.index is not None else torch.where(mine, values, 0.0)
        weights = inputs.weights[rows]
        kept = mine & (weights != 0)
        old, own = behaviour(logp, None if inputs.old is None else inputs.old[rows])
        terms = loss_terms(
            form, kept, logp, inputs.advantages[rows] * weights,
            old, own, own,
            None if inputs.importance is None else inputs.importance[rows],
            None if inputs.reference is None else inputs.reference[rows],
        )  # fmt: skip
        d_logp = ((terms.d_logp + terms.d_ratio) * scale[rows]).unsqueeze(-1)
        slope = row_slope(k, transform)
        weight = -uniformly(torch.exp2, -log_sum).unsqueeze(-1) * slope
        grad = buffers.e.rows(n)
        active = d_logp != 0
        if form.entropy_coef:
            d_entropy = torch.where(kept, -form.entropy_coef * scale[rows], 0.0).unsqueeze(-1)
            active = active | (d_entropy != 0)
            constant = d_logp + d_entropy * (entropy - LN2 * log_sum).unsqueeze(-1)
            # 2^t (constant + d_entropy ln2 t), from the two products that the statistics left behind.
            grad.mul_(constant * weight).addcmul_(buffers.t.rows(n), d_entropy * LN2 * weight)
        else:
            grad.mul_(d_logp * weight)
        finish_gradient(grad, u, target, d_logp * slope, transform)
        if logits.device.type != "cpu" or not bool(active.all()):
            # A row without a gradient may hold what makes its products NaN.
            grad.masked_fill_(~active, 0.0)
        work.write(out, rows, grad)


def prefers_one_launch(logits: Tensor) -> bool:
    """Whether it beats two stages: no.

    On two cores of an AMD EPYC it took 1.06 to 1.12 times as long at 1020 x 32000 and 210 x 151936 in fp32 and bf16:
    the loss's small operations on each chunk of a few rows cost more than the second read of the logits.
    """
    return False
