"""What autograd is told of gradients that have no derivative of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _Final(torch.autograd.Function):
    """Passes a gradient on that has no derivative: a double backward through it raises, it does not give zeros."""

    @staticmethod
    def forward(ctx, anchor: Tensor, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Any:
        raise RuntimeError("a double backward is not implemented: this gradient was formed without its graph")


def final(gradient: Tensor, anchor: Tensor) -> Tensor:
    """A gradient as backward should return it; under create_graph=True its own backward raises.

    anchor: a tensor that depends on what the gradient is of, or is it; else a second derivative that is asked for by
    name would find no way to it and be taken for zero.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradient
    return _Final.apply(anchor, gradient)


def refuse_tangents(**tensors: Tensor | None) -> None:
    """Raises RuntimeError for a tensor with a tangent: forward-mode AD would find a derivative of 0."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"forward-mode AD is not implemented: {name} carries a tangent; use backward")
