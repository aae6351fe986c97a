"""Custom operators, and the same work without their dispatch where nothing needs it.

torch.compile, fake tensors and the modes that trace need operators; a plain call does not, and an operator's dispatch
costs more of the host's time than the launch of a kernel (0.3 ms each with torch 2.11, measured beside an H200).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = torch._C._disabled_torch_dispatch_impl


def runs_plainly(tensor: Tensor) -> bool:
    """Whether a call is an ordinary one: not compiled, traced or transformed, on real tensors."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and getattr(type(tensor), "__torch_dispatch__", None) is _PLAIN
    )


def plainly(operator: Any) -> Callable:
    """The function of a custom operator without autograd, called as it is where that is enough.

    The first argument that is a tensor decides.
    """
    function = operator._init_fn

    def call(*arguments):
        first = next(x for x in arguments if isinstance(x, Tensor))
        if not runs_plainly(first):
            return operator(*arguments)
        with torch.no_grad():  # as below an operator
            return function(*arguments)

    return call


def plainly_differentiable(operator: Any, setup_context: Callable, backward: Callable) -> Callable:
    """The same for an operator with autograd, by an autograd function of the same three parts."""
    work = operator._init_fn

    # Not with a setup_context of its own: PyTorch then binds the arguments by inspecting the signature at every call.
    def forward(ctx, *arguments):
        output = work(*arguments)
        setup_context(ctx, arguments, output)
        return output

    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"_{operator._name}", (torch.autograd.Function,), parts)

    def call(*arguments):
        if not runs_plainly(arguments[0]):
            return operator(*arguments)
        return function.apply(*arguments) if torch.is_grad_enabled() else work(*arguments)

    return call
