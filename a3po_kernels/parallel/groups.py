"""Process groups as arguments, and the two collectives that all reductions here are made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Their names since PyTorch 2.13, and before.
all_gather_single: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


def check_group(name: str, group: Any) -> None:
    """Raises TypeError or ValueError unless group is None or a process group that this rank is in."""
    if group is None:
        return
    if dist.is_available():
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{name} must be a process group that this rank is in; got one that it is no member of")
        if isinstance(group, dist.ProcessGroup):
            if not dist.is_initialized():
                raise ValueError(f"{name} needs torch.distributed to be initialised; got a group, and it is not")
            if dist.get_rank(group) < 0:
                raise ValueError(f"{name} must be a process group that this rank is in; rank {dist.get_rank()} is not")
            return
    raise TypeError(f"{name} must be a torch.distributed ProcessGroup or None; got {type(group).__name__}")


def group_size(group: Any) -> int:
    """The ranks of a group; None is the default group, which without torch.distributed is this process alone."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def group_rank(group: Any) -> int:
    """This rank's number in a group."""
    return dist.get_rank(group) if group_size(group) > 1 else 0


def ranks_of(group: Any) -> list[int]:
    """The global numbers of a group's ranks; None is the default group."""
    return list(range(dist.get_world_size())) if group is None else dist.get_process_group_ranks(group)


def holds(group: Any, other: Any) -> bool:
    """Whether a group holds every rank of the group `other`."""
    return group_size(other) == 1 or set(ranks_of(other)) <= set(ranks_of(group))


def first_rank(group: Any, other: Any) -> int:
    """The lowest number in a group of the ranks that are in `other` too: one number for all of these."""
    inside = set(ranks_of(other))
    return next(number for number, rank in enumerate(ranks_of(group)) if rank in inside)


def check_not_the_same_tokens(name: str, group: Any, tp_group: Any) -> None:
    """Raises ValueError if a group (None: the default) holds other ranks of tp_group, which have the same tokens."""
    shared = set(ranks_of(group)) & set(ranks_of(tp_group))
    if len(shared) > 1:
        raise ValueError(
            f"{name} must hold, of the tensor-parallel ranks {ranks_of(tp_group)}, this one alone: they have the same "
            f"tokens, which would be counted {len(shared)} times; got "
            + ("None, the default group" if group is None else f"the ranks {ranks_of(group)}")
        )


def check_all_or_one(group: Any, cp_group: Any) -> None:
    """Raises ValueError unless group (None: the default) holds all ranks of cp_group, or this one alone."""
    shared = set(ranks_of(group)) & set(ranks_of(cp_group))
    if not holds(group, cp_group) and len(shared) > 1:
        raise ValueError(
            "group must hold every rank of cp_group or, of these, this one alone; got ranks "
            f"{ranks_of(group)} beside {ranks_of(cp_group)}"
        )


def total(values: Tensor, group: Any) -> Tensor:
    """The sum of values over the ranks of a group: a new tensor, or the values themselves where there is one rank."""
    return values if group_size(group) == 1 else _total(values, group)


def total_over(values: Tensor, group: Any, cp_group: Any) -> Tensor:
    """The sum over the ranks of both groups, each of which counts once."""
    return total(values if holds(group, cp_group) else total(values, cp_group), group)


@torch.compiler.disable
def _total(values: Tensor, group: Any) -> Tensor:
    values = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values, group=group)
    return values


def gathered(values: Tensor, group: Any) -> Tensor:
    """[R, ...]: the values of every rank of a group, in the order of their numbers."""
    return values.unsqueeze(0) if group_size(group) == 1 else _gathered(values, group)


@torch.compiler.disable
def _gathered(values: Tensor, group: Any) -> Tensor:
    ranks = group_size(group)
    out = values.new_empty(ranks * values.numel())
    all_gather_single(out, values.detach().reshape(-1).contiguous(), group=group)
    return out.view(ranks, *values.shape)
