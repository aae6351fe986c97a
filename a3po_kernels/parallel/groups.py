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
                raise ValueError(f"{name} needs torch.distributed to be initialised; got a group of before or after")
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


def holds(group: Any, other: Any) -> bool:
    """Whether a group holds every rank of the group `other`."""
    if group_size(other) == 1:
        return True
    world = set(range(dist.get_world_size()))
    ranks = world if group is None else set(dist.get_process_group_ranks(group))
    return set(dist.get_process_group_ranks(other)) <= ranks


def first_rank(group: Any, other: Any) -> int:
    """The lowest number in a group of the ranks that are in `other` too: one number for all of these."""
    ranks = range(dist.get_world_size()) if group is None else dist.get_process_group_ranks(group)
    inside = set(dist.get_process_group_ranks(other))
    return next(number for number, rank in enumerate(ranks) if rank in inside)


def check_beside(group: Any, tp_group: Any) -> None:
    """Raises ValueError if group (None: the default) holds other ranks of tp_group, which have the same tokens."""
    if group_size(tp_group) == 1:
        return
    ranks = range(dist.get_world_size()) if group is None else dist.get_process_group_ranks(group)
    shared = set(ranks) & set(dist.get_process_group_ranks(tp_group))
    if len(shared) > 1:
        raise ValueError(
            f"group must hold, of the tensor-parallel ranks {dist.get_process_group_ranks(tp_group)}, this one alone: "
            f"they have the same tokens, which would be counted {len(shared)} times; got "
            + ("None, the default group" if group is None else f"the ranks {list(ranks)}")
        )


def check_apart(group: Any, cp_group: Any) -> None:
    """Raises ValueError unless group holds all ranks of cp_group, or this one alone."""
    if group_size(cp_group) == 1 or holds(group, cp_group):
        return
    shared = set(dist.get_process_group_ranks(group)) & set(dist.get_process_group_ranks(cp_group))
    if len(shared) > 1:
        raise ValueError(
            "group must hold every rank of cp_group or, of these, this one alone; got ranks "
            f"{dist.get_process_group_ranks(group)} beside {dist.get_process_group_ranks(cp_group)}"
        )


@torch.compiler.disable
def total(values: Tensor, group: Any) -> Tensor:
    """The sum of values over the ranks of a group: a new tensor, or the values themselves where there is one rank."""
    if group_size(group) == 1:
        return values
    values = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values, group=group)
    return values


@torch.compiler.disable
def gathered(values: Tensor, group: Any) -> Tensor:
    """[R, ...]: the values of every rank of a group, in the order of their numbers."""
    ranks = group_size(group)
    if ranks == 1:
        return values.unsqueeze(0)
    out = values.new_empty(ranks * values.numel())
    all_gather_single(out, values.detach().reshape(-1).contiguous(), group=group)
    return out.view(ranks, *values.shape)
