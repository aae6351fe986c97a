"""What autograd is told of a gradient that was computed without its graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Final(torch.autograd.Function):
    """Passes a gradient on that has no derivative: a double backward through it raises, it does not give zeros."""

    @staticmethod
    def forward(ctx, anchor: Tensor, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Any:
        raise RuntimeError("a double backward is not implemented: this gradient was formed without its graph")


def final(gradient: Tensor) -> Tensor:
    """A gradient as backward should return it; under create_graph=True its own backward raises."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradient
    return _Final.apply(torch.zeros((), device=gradient.device, requires_grad=True), gradient)
