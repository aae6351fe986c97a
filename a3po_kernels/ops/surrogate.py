"""The policy loss of N tokens and its two coefficients per token, dL/dlogp and dL/dH: everything but the vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import choose
from ..core.segments import segment_sum
from ..core.surrogate_form import SUMS, SurrogateForm


def normalizer(
    counts: Tensor, aggregation: str, selected: bool, max_length: float, denominator: Tensor | None, value: float | None
) -> Tensor:
    """1 / (what a token's loss is divided by), per rollout [S]; 0 where that is 0.

    counts: [2, S], tokens and kept tokens of each rollout; `selected` normalises over the kept ones.
    """
    size = counts[1 if selected else 0]
    if denominator is not None:
        total = denominator.to(counts.dtype)
    elif value is not None:
        total = torch.full((), value, dtype=counts.dtype, device=counts.device)
    elif aggregation == "token-mean":
        total = size.sum()
    elif aggregation == "seq-mean-token-sum-norm":
        total = torch.full((), size.shape[0] * max_length, dtype=counts.dtype, device=counts.device)
    else:
        total = (size > 0).sum().to(counts.dtype)
    scale = torch.where(total > 0, 1.0 / total, 0.0).expand(size.shape[0])
    if aggregation == "seq-mean-token-mean":
        scale = torch.where(size > 0, scale / size, 0.0)
    return scale.contiguous()


@torch.library.custom_op("a3po::policy_terms", mutates_args=())
def _policy_terms(
    logp: Tensor, entropy: Tensor, tokens: Tensor, weights: Tensor, advantages: Tensor, polarity: Tensor,
    old: Tensor | None, reference: Tensor | None, importance: Tensor | None, proxy: Tensor | None,
    replaced: Tensor | None, selected: Tensor | None, offsets: Tensor, scale: Tensor,
    kind: str, sequence: bool, kl_estimator: str, numbers: list[float], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [], dL/dlogp [N], dL/dH [N] or [0] without an entropy bonus, sums [15]) of flat [N] tensors."""
    form = SurrogateForm(kind, sequence, kl_estimator, *numbers)
    count = logp.numel()
    arguments: Any = [
        logp, entropy, tokens, weights, advantages, polarity, old, reference, importance, proxy, replaced, selected,
    ]  # fmt: skip
    arguments = [x if x is None else x.contiguous() for x in arguments]  # the kernels know no strides
    d_entropy = torch.zeros(count if form.entropy_coef else 0, dtype=logp.dtype, device=logp.device)
    d_logp = torch.zeros_like(logp)  # a row that no rollout holds has no gradient
    if count == 0:
        sums = logp.new_zeros(len(SUMS))
        return logp.new_zeros(()), d_logp, d_entropy, sums
    sums = choose(backend, logp.device).policy_terms(*arguments, offsets, scale, form, d_logp, d_entropy)
    total = merge_sums(sums)
    return total[0].clone(), d_logp, d_entropy, total


@_policy_terms.register_fake
def _(logp, *arguments):
    numbers = arguments[-2]
    count = logp.shape[0] if SurrogateForm("", False, "", *numbers).entropy_coef else 0
    return logp.new_empty(()), torch.empty_like(logp), logp.new_empty(count), logp.new_empty(len(SUMS))


def _setup_context(ctx, inputs, output):
    _, d_logp, d_entropy, sums = output
    ctx.save_for_backward(d_logp, d_entropy)
    ctx.mark_non_differentiable(d_logp, d_entropy, sums)
    ctx.arguments = len(inputs)


def _backward(ctx, grad_loss, *_):
    d_logp, d_entropy = ctx.saved_tensors
    grad_entropy = grad_loss * d_entropy if d_entropy.numel() else None
    return grad_loss * d_logp, grad_entropy, *([None] * (ctx.arguments - 2))


_policy_terms.register_autograd(_backward, setup_context=_setup_context)


class PolicyTerms(NamedTuple):
    """loss 0-d, differentiable in logp and entropy; d_logp [N], d_entropy [N] or [0]: its derivatives; sums: SUMS."""

    loss: Tensor
    d_logp: Tensor
    d_entropy: Tensor
    sums: Tensor


def policy_terms(
    logp: Tensor, entropy: Tensor, *, tokens: Tensor, weights: Tensor, advantages: Tensor, polarity: Tensor,
    offsets: Tensor, scale: Tensor, form: SurrogateForm, old: Tensor | None = None, reference: Tensor | None = None,
    importance: Tensor | None = None, proxy: Tensor | None = None, replaced: Tensor | None = None,
    selected: Tensor | None = None, backend: str = "auto",
) -> PolicyTerms:  # fmt: skip
    """The loss and its coefficients of flat [N] tensors.

    tokens: bool [N]; weights: shaping factors [N], 0 for a dropped token; scale: [S], multiplies the tokens of a
    rollout; advantages, polarity: [N]; old, reference: log-probs [N]; importance: [N]; proxy: log-probs [N] of the
    regulariser that replaces the `replaced` tokens' loss.
    """
    return PolicyTerms(*_policy_terms(
        logp, entropy, tokens, weights, advantages, polarity, old, reference, importance, proxy, replaced, selected,
        offsets, scale, form.kind, form.sequence, form.kl_estimator, [float(x) for x in form[3:]], backend,
    ))  # fmt: skip


def token_counts(tokens: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """[2, S]: the tokens and the kept tokens of each rollout, in the weights' dtype."""
    flags = (tokens, tokens & (weights != 0))
    return torch.stack([segment_sum(x.to(weights.dtype), offsets) for x in flags])


def merge_sums(stacked: Tensor) -> Tensor:
    """The sums named in SUMS of disjoint batches [parts, 15] as those of all of them."""
    total = stacked.sum(0, dtype=torch.float64).to(stacked.dtype)
    total[-1:] = stacked[:, -1].amax(0, keepdim=True)
    return total
