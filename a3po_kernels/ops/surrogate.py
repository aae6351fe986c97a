"""The policy loss of N tokens and its two coefficients per token, dL/dlogp and dL/dH: everything but the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import choose
from ..core.autograd import final
from ..core.forms import METRICS, PolicyInputs, SurrogateForm
from ..core.operators import plainly_differentiable


@torch.library.custom_op("a3po::policy_terms", mutates_args=())
def _policy_terms(
    logp: Tensor, entropy: Tensor, tokens: Tensor, rollout: Tensor, weights: Tensor, advantages: Tensor,
    polarity: Tensor, old: Tensor | None, reference: Tensor | None, importance: Tensor | None, proxy: Tensor | None,
    replaced: Tensor | None, selected: Tensor | None, offsets: Tensor, counts: Tensor, scale: Tensor,
    beta_tensor: Tensor | None, beta: float, kind: str, sequence: bool, own_gradient: bool, kl_estimator: str,
    numbers: list[float], has_bonus: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [], dL/dlogp [N], dL/dH [N] or [0] without an entropy bonus, METRICS, [0]) of flat [N] tensors.

    The last is nothing but a tensor that depends on what the loss does, see core.autograd.final.
    """
    form = SurrogateForm(kind, sequence, own_gradient, kl_estimator, *numbers)
    inputs = PolicyInputs(
        tokens, rollout, weights, advantages, polarity, old, reference, importance, proxy, replaced, selected, offsets,
        counts, scale,
    )  # fmt: skip
    logp, entropy = logp.contiguous(), entropy.contiguous()
    d_logp = torch.empty_like(logp)
    d_entropy = torch.empty(logp.numel() if has_bonus else 0, dtype=logp.dtype, device=logp.device)
    weight = beta if beta_tensor is None else beta_tensor
    loss, metrics = choose(backend, logp.device).loss_and_coefficients(
        logp, entropy, inputs, form, weight, d_logp, d_entropy
    )
    return loss, d_logp, d_entropy, metrics, logp.new_empty(0)


@_policy_terms.register_fake
def _(logp, *arguments):
    sizes = (logp.shape[0] if arguments[-2] else 0, len(METRICS), 0)
    return logp.new_empty(()), torch.empty_like(logp), *(logp.new_empty(size) for size in sizes)


def _setup_context(ctx, inputs, output):
    _, d_logp, d_entropy, metrics, anchor = output
    ctx.save_for_backward(d_logp, d_entropy, anchor)
    ctx.mark_non_differentiable(d_logp, d_entropy, metrics)
    ctx.set_materialize_grads(False)
    ctx.arguments = len(inputs)


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * ctx.arguments
    d_logp, d_entropy, anchor = ctx.saved_tensors
    grad_entropy = final(grad_loss * d_entropy, anchor) if d_entropy.numel() else None
    return final(grad_loss * d_logp, anchor), grad_entropy, *([None] * (ctx.arguments - 2))


_terms_plainly = plainly_differentiable(_policy_terms, _setup_context, _backward)


@torch.library.custom_op("a3po::with_coefficients", mutates_args=())
def _with_coefficients(
    logp: Tensor, entropy: Tensor, loss: Tensor, d_logp: Tensor, d_entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields that _policy_terms gives, of a loss and coefficients that are known."""
    return loss.clone(), d_logp.clone(), d_entropy.clone(), logp.new_empty(0), logp.new_empty(0)


@_with_coefficients.register_fake
def _(logp, entropy, loss, d_logp, d_entropy):
    empty = logp.new_empty(0)
    return torch.empty_like(loss), torch.empty_like(d_logp), torch.empty_like(d_entropy), empty, torch.empty_like(empty)


_attach_plainly = plainly_differentiable(_with_coefficients, _setup_context, _backward)


def with_coefficients(logp: Tensor, entropy: Tensor, loss: Tensor, d_logp: Tensor, d_entropy: Tensor) -> Tensor:
    """The loss [], differentiable: its derivatives in logp and entropy [N] are d_logp and d_entropy ([0]: none)."""
    return _attach_plainly(logp, entropy, loss, d_logp, d_entropy)[0]


class PolicyTerms(NamedTuple):
    """loss 0-d, differentiable in logp and entropy; d_logp [N], d_entropy [N] or [0]: its derivatives; METRICS."""

    loss: Tensor
    d_logp: Tensor
    d_entropy: Tensor
    metrics: Tensor


def policy_terms(
    logp: Tensor, entropy: Tensor, inputs: PolicyInputs, form: SurrogateForm, beta: float | Tensor, backend: str
) -> PolicyTerms:
    """The loss of flat [N] log-probs and entropies, and its coefficients. beta: the metric `weight`."""
    tensor = beta if isinstance(beta, Tensor) else None
    *found, _ = _terms_plainly(
        logp, entropy, *inputs, tensor, 1.0 if tensor is not None else float(beta), form.kind, form.sequence,
        form.own_gradient, form.kl_estimator, [float(x) for x in form.numbers], bool(form.entropy_coef), backend,
    )  # fmt: skip
    return PolicyTerms(*found)


def joined_policy_terms(
    logp: Tensor, entropy: Tensor, inputs: PolicyInputs, form: SurrogateForm, beta: float | Tensor, lengths: Tensor,
    join: Callable[[Tensor], Tensor], backend: str,
) -> PolicyTerms:  # fmt: skip
    """policy_terms of a rollout-wide ratio where other ranks hold tokens of the rollouts; loss and metrics are of ours.

    lengths: [S] tokens of the rollouts on all ranks; join: sums [S] of one rank -> of all. Kernels cannot wait for
    those in the middle: PyTorch goes through these N numbers on every backend.
    """
    own, own_entropy = logp.detach().contiguous(), entropy.detach().contiguous()
    d_logp = torch.empty_like(own)
    d_entropy = torch.empty_like(own) if form.entropy_coef else own[:0]
    with torch.no_grad():
        loss, metrics = choose(backend, own.device).joined_loss_and_coefficients(
            own, own_entropy, inputs, form, beta, d_logp, d_entropy, lengths, join
        )
    return PolicyTerms(with_coefficients(logp, entropy, loss, d_logp, d_entropy), d_logp, d_entropy, metrics)
