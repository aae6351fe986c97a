"""The policy loss of N tokens and its two coefficients per token, dL/dlogp and dL/dH: everything but the vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import torch_surrogate
from ._dispatch import device_guard, triton_dtype, uses_triton
from ._surrogate_kernels import policy_terms_kernel, rollout_sums_kernel

_BLOCK = 1024
# Columns of the partial sums, one row a rollout; the last is a maximum.
SUMS = (
    "loss", "entropy", "kl", "approx_kl", "ratio", "clip_low", "clip_high", "dual_clip", "selected_positive",
    "selected_negative", "positive", "negative", "active", "tokens", "ratio_max",
)  # fmt: skip


class SurrogateForm(NamedTuple):
    """What the loss of a token is. Words choose code, numbers are run-time values.

    kind: "clip", "cispo", "sapo" or "reinforce"; low, high: bounds of the ratio (cispo: low 0 is none); dual_clip,
    delta: inf is none; tau_positive, tau_negative: SAPO's; beta: weight of the replacement regulariser.
    """

    kind: str
    sequence: bool
    kl_estimator: str
    low: float
    high: float
    dual_clip: float
    delta: float
    tau_positive: float
    tau_negative: float
    kl_coef: float
    entropy_coef: float
    beta: float


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
    count, rollouts = logp.numel(), offsets.numel() - 1
    arguments: Any = [
        logp, entropy, tokens, weights, advantages, polarity, old, reference, importance, proxy, replaced, selected,
    ]  # fmt: skip
    arguments = [x if x is None else x.contiguous() for x in arguments]  # the kernels know no strides
    d_entropy = torch.zeros(count if form.entropy_coef else 0, dtype=logp.dtype, device=logp.device)
    if count == 0:
        sums = logp.new_zeros(len(SUMS))
        return logp.new_zeros(()), torch.zeros_like(logp), d_entropy, sums
    if not uses_triton(backend, logp.device):
        return torch_surrogate.policy_terms(*arguments, offsets=offsets, form=form, scale=scale)
    compute = triton_dtype(logp.dtype)
    counts = logp.new_empty((2, rollouts))
    log_ratio = logp.new_empty(rollouts)
    d_logp = torch.zeros_like(logp)  # a row that no rollout holds has no gradient
    sums = logp.new_empty((rollouts, len(SUMS)))
    # On-policy the mean log ratio is 0 by definition: logp is its own old value.
    logp, _, tokens, weights, _, _, old, *_ = arguments
    before = logp if old is None else old
    with device_guard(logp):
        rollout_sums_kernel[(rollouts,)](
            tokens, weights, logp, before, offsets, counts, log_ratio, rollouts,
            SEQUENCE=sequence, BLOCK=_BLOCK, COMPUTE=compute,
        )  # fmt: skip
        policy_terms_kernel[(rollouts,)](
            *arguments, offsets, scale, counts, log_ratio, d_logp,
            d_entropy if form.entropy_coef else None, sums, *form[3:],
            KIND=kind, SEQUENCE=sequence, ESTIMATOR=kl_estimator, BLOCK=_BLOCK, COMPUTE=compute,
        )  # fmt: skip
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
    return torch.stack([torch_surrogate.segment_sum(x.to(weights.dtype), offsets) for x in flags])


def merge_sums(stacked: Tensor) -> Tensor:
    """The sums named in SUMS of disjoint batches [parts, 15] as those of all of them."""
    total = stacked.sum(0, dtype=torch.float64).to(stacked.dtype)
    total[-1:] = stacked[:, -1].amax(0, keepdim=True)
    return total
