"""What a head whose weight is a DTensor needs beyond its loss: its product, and its layer's hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.checks import is_dtensor
from ..parallel.dtensor import read_head_dtensors, wait_for
from ..parallel.vocabulary import Split


@torch.no_grad()
def check_split(hidden: Tensor, head: Mapping[str, Any]) -> None:
    """Raises ValueError or TypeError for a DTensor weight, bias or adapter that the loss would not take."""
    if is_dtensor(head["weight"]):
        read_head_dtensors(hidden, head["weight"], head["bias"], head["lora"], None, Split())


def to_hooks(output: Tensor, mesh: Any) -> Tensor:
    """A head's output as its hooks take it: where they made the hidden states a DTensor on a mesh they expect one.

    It is a part of theirs. Gathered or not, a rank finds its own part again.
    """
    if mesh is None:
        return output
    from torch.distributed.tensor import DTensor, Shard

    if mesh.ndim != 1:
        raise ValueError(f"the head's hidden states must be on a mesh of one dimension; got {list(mesh.shape)}")
    return DTensor.from_local(output, mesh, [Shard(output.ndim - 1)], run_check=False)


def from_hooks(output: Any, count: int, mesh: Any) -> Tensor:
    """This rank's `count` values of what the hooks gave, flat."""
    flat = wait_for(output.to_local() if is_dtensor(output) else output).reshape(-1)
    if mesh is not None and flat.numel() == count * mesh.size():
        return flat.narrow(0, mesh.get_local_rank() * count, count)
    return flat


def product(rows: Tensor, head: Mapping[str, Any]) -> Tensor:
    """rows @ (weight + scale * B @ A).T + bias, rows plain; whole on every rank."""
    weight, bias, lora = head["weight"], head["bias"], head["lora"]
    rows = like_weight(rows, weight)
    found = F.linear(rows.to(weight.dtype), weight, bias)
    if lora is not None:
        a, b, scale = lora
        found = found + scale * F.linear(F.linear(rows.to(a.dtype), like_weight(a, weight)), b)
    return whole(found)


def like_weight(values: Tensor, weight: Any) -> Tensor:
    """Values that every rank has, as a DTensor where the weight is one."""
    if not is_dtensor(weight) or is_dtensor(values):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    return DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)


def whole(values: Any) -> Any:
    """A DTensor's full tensor; all else as it is."""
    return values.full_tensor() if is_dtensor(values) else values
