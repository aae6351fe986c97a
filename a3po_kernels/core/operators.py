"""Custom operators, and the same work without their dispatch where nothing needs it.

torch.compile, fake tensors and the modes that trace need operators; a plain call does not, and an operator's dispatch
costs more of the host's time than the launch of a kernel (0.3 ms each with torch 2.11, measured beside an H200).

A number that torch.compile keeps symbolic, such as a new temperature at each call, has to enter a graph through a
tensor: as a float argument of an operator it would be compiled in. Each operator therefore has a twin whose floats are
tensors on the host, which is called where one is symbolic.
"""

from __future__ import annotations

import contextlib
import inspect
import re
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
        and tensor.device.type != "meta"
    )


def reads_values(tensor: Tensor, validate: bool) -> bool:
    """Whether values may be looked at, which on a GPU waits for the device."""
    return runs_plainly(tensor) and (tensor.device.type == "cpu" or validate)


def without_autocast(device: torch.device) -> Any:
    """A context in which the dtypes of products are what the code says."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _symbolic(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_symbolic, value))
    return isinstance(value, (torch.SymFloat, Tensor))


def _as_tensor(value: Any) -> Tensor:
    """A float, symbolic or not, or several, as fp64 on the host."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)):
        return torch.stack([_as_tensor(x) for x in value]) if value else torch.zeros(0, dtype=torch.float64)
    return torch.zeros((), dtype=torch.float64) + value  # of an addition torch.compile keeps the number symbolic


def traced(operator: Any, differentiable: tuple[Callable, Callable] | None = None) -> Callable:
    """The operator, or its twin where one of its floats is symbolic."""
    schema = str(operator._opoverload._schema).removeprefix(operator._qualname)
    arguments = operator._opoverload._schema.arguments
    floats = [at for at, argument in enumerate(arguments) if str(argument.type) in ("float", "List[float]")]
    if not floats:
        return operator
    work, mutated = operator._init_fn, {a.name for a in arguments if a.alias_info is not None}

    def by_tensors(*given):
        return work(*(x.tolist() if at in floats else x for at, x in enumerate(given)))

    # A captured graph would keep the numbers that it was captured with. Older versions have no such tags.
    tagged = "tags" in inspect.signature(torch.library.custom_op).parameters
    tags: dict[str, Any] = {}
    if tagged and hasattr(torch.Tag, "cudagraph_unsafe"):
        tags["tags"] = (torch.Tag.cudagraph_unsafe,)
    twin = torch.library.custom_op(
        f"{operator._qualname}_by_tensors", by_tensors, mutates_args=mutated, **tags,
        schema=re.sub(r"\bfloat(\[\])? ", "Tensor ", schema),
    )  # fmt: skip
    twin.register_fake(operator._abstract_fn)
    if differentiable is not None:
        setup_context, backward = differentiable
        twin.register_autograd(backward, setup_context=setup_context)

    # Where torch.compile traces it, the numbers look like floats to the code outside.
    @torch.compiler.allow_in_graph
    def call(*given):
        if not any(_symbolic(given[at]) for at in floats):
            return operator(*given)
        return twin(*(_as_tensor(x) if at in floats else x for at, x in enumerate(given)))

    return call


def plainly(operator: Any) -> Callable:
    """The function of a custom operator without autograd, called as it is where that is enough.

    The first argument that is a tensor decides.
    """
    function, otherwise = operator._init_fn, traced(operator)

    def call(*arguments):
        first = next(x for x in arguments if isinstance(x, Tensor))
        if not runs_plainly(first):
            return otherwise(*arguments)
        with torch.no_grad():  # as below an operator
            return function(*arguments)

    return call


def plainly_differentiable(operator: Any, setup_context: Callable, backward: Callable) -> Callable:
    """The same for an operator with autograd, by an autograd function of the same three parts."""
    operator.register_autograd(backward, setup_context=setup_context)
    work, otherwise = operator._init_fn, traced(operator, (setup_context, backward))

    # Not with a setup_context of its own: PyTorch then binds the arguments by inspecting the signature at every call.
    def forward(ctx, *arguments):
        output = work(*arguments)
        setup_context(ctx, arguments, output)
        return output

    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"_{operator._name}", (torch.autograd.Function,), parts)

    def call(*arguments):
        if not runs_plainly(arguments[0]):
            return otherwise(*arguments)
        return function.apply(*arguments) if torch.is_grad_enabled() else work(*arguments)

    return call
