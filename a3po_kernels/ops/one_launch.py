"""Statistics and gradient of logits together, where a token's coefficient needs that token alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..core.autograd import final
from ..core.forms import PolicyInputs, SurrogateForm
from ..core.transform import Transform
from .token_logprobs import empty_results


def prefers_one_launch(logits: Tensor, backend: str) -> bool:
    """Whether one launch was measured to be faster than two stages for logits [batch, rows, V]."""
    return choose(backend, logits.device).prefers_one_launch(logits)


def write_statistics_and_gradient(
    out: Tensor, logits: Tensor, targets: Tensor, transform: Transform, results: tuple[Tensor, ...],
    inputs: PolicyInputs, form: SurrogateForm, backend: str,
) -> None:  # fmt: skip
    """Fills `results`, (logp, entropy, shift, log2_sum) [N], of logits [batch, rows, V], and `out` with dL/dz.

    `out` may be the logits themselves. A row without a gradient becomes 0. See backends.triton.one_launch.
    """
    if targets.numel():
        choose(backend, logits.device).write_statistics_and_gradient(
            out, logits, targets, transform, results, inputs, form
        )


def scale_gradient(gradient: Tensor, factor: Tensor, backend: str, out: Tensor | None = None) -> Tensor:
    """factor * gradient in out's dtype, rounded once; in place, where a factor of 1 costs nothing, if out is None."""
    out = gradient if out is None else out
    choose(backend, gradient.device).scale(gradient, factor.detach(), out)
    return out


class _FormedInForward(torch.autograd.Function):
    """A loss whose gradient is formed beside it; backward scales that in place by the incoming one."""

    @staticmethod
    def forward(ctx, logits: Tensor, compute: Callable[[], tuple[Tensor, Tensor]], backend: str) -> Any:
        # In here, so that autograd has read the logits' history before they may be written over.
        loss, gradient = compute()
        anchor = loss.new_empty(0)
        ctx.save_for_backward(anchor, gradient)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.backend, ctx.spent = logits.shape, backend, False
        return loss, anchor

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _: None) -> Any:
        if ctx.spent:
            raise RuntimeError(
                "the one-launch route scales the gradient that it formed in forward in place, so backward runs once; "
                "route='two-stage' allows a second backward"
            )
        ctx.spent = True
        anchor, gradient = ctx.saved_tensors
        with torch.no_grad():
            gradient = scale_gradient(gradient, grad_loss, ctx.backend).view(ctx.shape)
        return final(gradient, anchor), None, None


def with_gradient(logits: Tensor, compute: Callable[[], tuple[Tensor, Tensor]], backend: str) -> Tensor:
    """The loss [] of compute() -> (loss, its gradient in the logits), differentiable in the logits."""
    return _FormedInForward.apply(logits, compute, backend)[0]


def one_launch(
    rows: Tensor, targets: Tensor, transform: Transform, inputs: PolicyInputs, form: SurrogateForm, inplace: bool,
    backend: str,
) -> tuple[tuple[Tensor, ...], Tensor]:  # fmt: skip
    """((logp, entropy, shift, log2_sum) [N], dL/dz) of logits [batch, rows, V]; with `inplace` over the logits."""
    rows = rows.detach()
    results = empty_results(rows, targets.numel())
    out = rows if inplace else torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    write_statistics_and_gradient(out, rows, targets, transform, results, inputs, form, backend)
    if inplace:
        # What else saved the logits for its backward is told that they are gone.
        torch.autograd.graph.increment_version(rows)
    return results, out
