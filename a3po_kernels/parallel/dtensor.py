"""Heads and logits that are DTensors: placements say what tp_group, vocab_start and hidden_layout would.

What goes on from here are the local tensors; their gradients come back as DTensors. A dimension of the mesh over which
the weight is replicated and the rows are not is data parallel: each rank's gradient is a part of a sum, a Partial.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.checks import is_dtensor, is_on_its_way
from .groups import check_group
from .vocabulary import Split

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

    Placements = tuple[Placement, ...]

LOCAL = "or call it on local tensors, with tp_group where the vocabulary is split"


def shards(placement: Placement, dim: int, ndim: int) -> bool:
    """Whether it is a plain Shard(dim); FSDP2's _StridedShard is none."""
    from torch.distributed.tensor import Shard

    return type(placement) is Shard and placement.dim % ndim == dim % ndim


def describe(tensor: DTensor) -> str:
    mesh = tensor.device_mesh
    return f"a DTensor {list(tensor.placements)} on the mesh {mesh.mesh_dim_names or ''}{list(mesh.shape)}"


def dims_of(tensor: DTensor) -> Iterator[tuple[int, Placement]]:
    """Each dimension of the mesh that has more than one rank, and the placement there."""
    mesh = tensor.device_mesh
    return ((d, placement) for d, placement in enumerate(tensor.placements) if mesh.size(d) > 1)


class _Local(torch.autograd.Function):
    """A DTensor's local tensor, arrived; the gradient is a DTensor of the placements given."""

    @staticmethod
    def forward(ctx, tensor: DTensor, placements: Placements) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.mesh, ctx.placements, ctx.shape = tensor.device_mesh, placements, tensor.shape
        return _arrived(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> Any:
        from torch.distributed.tensor import DTensor

        if grad is None:
            return None, None
        # Of uneven shards no rank knows the whole.
        stride = torch.empty(ctx.shape, device="meta").stride()
        whole = DTensor.from_local(
            grad.contiguous(), ctx.mesh, ctx.placements, run_check=False, shape=ctx.shape, stride=stride
        )
        return whole, None


def _arrived(tensor: DTensor) -> Tensor:
    with torch.no_grad():
        local: Any = tensor.to_local()
        local = local.wait() if is_on_its_way(local) else local
        return local.view_as(local)


class _Wait(torch.autograd.Function):
    """What a collective gives, once it has."""

    @staticmethod
    def forward(ctx, tensor: Any) -> Tensor:
        return tensor.wait()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def wait_for(tensor: Tensor) -> Tensor:
    """A tensor, or what it becomes when the collective that gives it is done; all else goes through as it is."""
    return _Wait.apply(tensor) if is_on_its_way(tensor) else tensor


def _local(tensor: DTensor, placements: Placements) -> Tensor:
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _Local.apply(tensor, placements)
    return _arrived(tensor).requires_grad_(tensor.requires_grad)


class Part(NamedTuple):
    """Along which dimension of a mesh a vocabulary is split, and the columns [first, stop) of it that are here."""

    dim: int
    group: dist.ProcessGroup
    first: int
    stop: int


def _split_dim(name: str, tensor: DTensor, dim: int, others: str) -> int | None:
    """The dimension of the mesh that shards dim of the tensor; others: what other dimensions may be, "" for whole."""
    mesh, ndim = tensor.device_mesh, tensor.ndim
    found = [d for d, placement in dims_of(tensor) if shards(placement, dim, ndim)]
    takes = f"takes Shard({dim}) over one dimension of the mesh and Replicate{others} over the others"
    strange = [p for d, p in dims_of(tensor) if d not in found and not p.is_replicate()]
    if others:
        strange = [p for p in strange if not any(shards(p, d, ndim) for d in range(ndim))]
    if any(type(p).__name__ == "_StridedShard" for p in strange):
        raise ValueError(
            f"{name} is {describe(tensor)}, which FSDP2 shards further: it {takes}, as the weight is inside its "
            "module's forward or after unshard()"
        )
    if strange or len(found) > 1:
        raise ValueError(f"{name} {takes}; got {describe(tensor)}")
    if found:
        return found[0]
    alone = [d for d, p in enumerate(tensor.placements) if mesh.size(d) == 1 and shards(p, dim, ndim)]
    return alone[-1] if alone else None


def _part(name: str, tensor: DTensor, dim: int, at: int, vocab_size: int | None) -> Part:
    """Reads the part that is here: as torch.chunk cuts, so that some may be short or empty."""
    mesh, size, here = tensor.device_mesh, tensor.shape[dim], _arrived(tensor).shape[dim]
    group, rank, ranks = mesh.get_group(at), mesh.get_local_rank(at), mesh.size(at)
    if rank != dist.get_rank(group):
        raise ValueError(f"{name} is on a mesh, {mesh.mesh.tolist()}, whose ranks are not in their group's order")
    each = -(-size // ranks)
    first, stop = min(rank * each, size), min((rank + 1) * each, size)
    if here != stop - first:
        raise ValueError(f"{name} must be sharded as torch.chunk cuts {size}: {stop - first} on this rank; got {here}")
    if isinstance(vocab_size, int) and not isinstance(vocab_size, bool):
        if vocab_size > size:
            raise ValueError(f"vocab_size must lie in [1, {size}], all of {name}; got {vocab_size}")
        first, stop = min(first, vocab_size), min(stop, vocab_size)
    return Part(at, group, first, stop)


def _implied(name: str, part: Part, split: Split) -> Split:
    """The split that a part is; raises ValueError where the caller says another."""
    if split.tp_group is not None:
        check_group("tp_group", split.tp_group)
        given: dist.ProcessGroup = split.tp_group
        if given.group_name != part.group.group_name:
            raise ValueError(
                f"tp_group must be that of the mesh's dimension {part.dim} over which {name} is sharded, or None; got "
                f"the ranks {dist.get_process_group_ranks(given)}, not {dist.get_process_group_ranks(part.group)}"
            )
    if split.vocab_start not in (None, part.first, (part.first, part.stop)):
        raise ValueError(
            f"vocab_start must be {part.first} or None, as {name} is sharded; got {split.vocab_start!r}"
        )  # fmt: skip
    return split._replace(tp_group=part.group, vocab_start=(part.first, part.stop))


def _refuse_whole(name: str, tensor: DTensor, split: Split) -> None:
    check_group("tp_group", split.tp_group)
    if split.tp_group is not None and dist.get_world_size(split.tp_group) > 1:
        raise ValueError(f"tp_group says that {name} is a part of the vocabulary, and it is {describe(tensor)}")


def _module_states() -> list[Any]:
    """What FSDP2 keeps beside each of its modules; PyTorch has no public way to it."""
    from torch.distributed import _composable_state

    found = getattr(_composable_state, "_module_state_mapping", None)
    if found is None:
        warnings.warn("this PyTorch does not tell which DTensors are FSDP2's shards: give none as weight", stacklevel=2)
    return [state() if isinstance(state, weakref.ref) else state for state in (found or {}).values()]


def fsdp_shards(tensor: DTensor) -> bool:
    """Whether a DTensor is, or is a view of, the shard that FSDP2 keeps of a parameter outside its module's forward.

    It looks as a head that is split over tensor-parallel ranks does, and its ranks have different rows.
    """
    address = _arrived(tensor).untyped_storage().data_ptr()
    for state in _module_states():
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for held in (held for group in groups if group is not None for held in group.fsdp_params):
            kept = held.sharded_param
            if kept is tensor:
                return True
            near = address and kept.device_mesh is tensor.device_mesh
            if near and _arrived(kept).untyped_storage().data_ptr() == address:
                return True
    return False


class _Reader:
    """A head's DTensors against its weight's mesh and placements."""

    def __init__(self, hidden: Tensor, weight: DTensor, part_dim: int | None):
        self.weight, self.at = weight, part_dim
        self.mesh: DeviceMesh = weight.device_mesh
        self.hidden: DTensor | None = hidden if is_dtensor(hidden) else None  # type: ignore[assignment]

    def check_hidden(self, split: Split) -> str:
        """hidden_layout, as the hidden states are placed or as it is given."""
        hidden, mesh = self.hidden, self.mesh
        if hidden is None:
            return split.hidden_layout
        if hidden.device_mesh != mesh:
            raise ValueError(f"hidden must be on the mesh of weight, {describe(self.weight)}; got {describe(hidden)}")
        ndim, layout = hidden.ndim, "replicated"
        rows_by = [d for d, p in enumerate(hidden.placements) if ndim > 1 and shards(p, -2, ndim)]
        for d, placement in enumerate(hidden.placements):
            if d == self.at and d in rows_by:
                layout = "sequence_sharded"
                if hidden.shape[-2] % mesh.size(d) or len([x for x in rows_by if mesh.size(x) > 1]) > 1:
                    raise ValueError(
                        f"hidden's rows, {hidden.shape[-2]}, must be split evenly over the tensor-parallel ranks and "
                        f"over no others; got {describe(hidden)}"
                    )
            elif mesh.size(d) > 1 and not placement.is_replicate():
                split_rows = any(shards(placement, row, ndim) for row in range(ndim - 1))
                if d == self.at or not split_rows:
                    takes = f"Replicate or Shard({ndim - 2})" if d == self.at else "Replicate or a Shard of its rows"
                    raise ValueError(
                        f"hidden takes {takes} over the mesh's dimension {d}, where weight is "
                        f"{self.weight.placements[d]}; got {describe(hidden)}"
                    )
        if split.hidden_layout == "sequence_sharded" and layout == "replicated":
            raise ValueError(f"hidden_layout is 'sequence_sharded', and hidden {describe(hidden)}")
        return layout

    def hidden_gradient(self, grad_hidden: str | None) -> Placements:
        from torch.distributed.tensor import Partial, Replicate

        assert self.hidden is not None
        found = [Replicate() if p.is_partial() else p for p in self.hidden.placements]
        if self.at is not None and found[self.at].is_replicate() and grad_hidden not in (None, "all_reduce"):
            # The rows of "reduce_scatter", 0 elsewhere, add up to the sum as the parts do.
            found[self.at] = Partial()
        return tuple(found)

    def gradient(self, name: str, tensor: DTensor) -> Placements:
        """Placements of the gradient of a parameter that is sharded as the weight or not at all."""
        from torch.distributed.tensor import Partial, Replicate

        found = [Replicate() if p.is_partial() else p for p in tensor.placements]
        for d, _ in dims_of(tensor):
            if d == self.at:
                continue
            if self.hidden is not None:
                found[d] = found[d] if self.hidden.placements[d].is_replicate() else Partial()
            elif tensor.requires_grad and torch.is_grad_enabled():
                names = self.mesh.mesh_dim_names
                raise ValueError(
                    f"{name} is replicated over the mesh's dimension {names[d] if names else d}, and a plain hidden "
                    "does not say whether the rows there are the same (a gradient Replicate) or others (a sum, "
                    f"Partial): give hidden as a DTensor, {LOCAL}"
                )
        return tuple(found)

    def parameter(self, name: str, value: Any, *, whole: bool = False) -> Any:
        """The local tensor of a bias or of an adapter; whole: of its A, which may be plain."""
        if not is_dtensor(value):
            if isinstance(value, Tensor) and not whole:
                raise TypeError(f"{name} must be a DTensor where weight is one; got {type(value).__name__}")
            return value
        if value.device_mesh != self.mesh:
            raise ValueError(f"{name} must be on the mesh of weight, {describe(self.weight)}; got {describe(value)}")
        for d, placement in dims_of(value):
            split = d == self.at and not whole
            if not (shards(placement, 0, value.ndim) if split else placement.is_replicate()):
                raise ValueError(
                    f"{name} takes {'Shard(0)' if split else 'Replicate'} over the mesh's dimension {d}, where weight "
                    f"is {self.weight.placements[d]}; got {describe(value)}"
                )
        return _local(value, self.gradient(name, value))


@torch.compiler.disable
def read_head_dtensors(
    hidden: Tensor, weight: Tensor, bias: Any, lora: Any, vocab_size: int | None, split: Split
) -> tuple[Tensor, Tensor, Any, Any, int | None, Split]:
    """The local tensors of a head's DTensors, whose gradients come back as DTensors, and the split that they are.

    Raises:
        ValueError, TypeError: for placements that are no head, that contradict each other or the split, or of whose
            gradient nothing is known.
    """
    if not is_dtensor(weight):
        got = type(weight).__name__
        raise TypeError(f"weight must be a DTensor where hidden is one; got {got}: make it one, {LOCAL}")
    wide: DTensor = weight  # type: ignore[assignment]
    wanted = getattr(wide, "grad_dtype", None) if wide.is_leaf and wide.requires_grad else None
    if wanted not in (None, wide.dtype):
        raise ValueError(f"weight.grad_dtype is not supported for a DTensor: got {wanted}, its own is {wide.dtype}")
    at = _split_dim("weight", wide, 0, "")
    if fsdp_shards(wide):
        raise ValueError(
            f"weight is {describe(wide)}, FSDP2's shard of it: call this inside its module's forward, or after "
            "unshard() with the weight that the module then has"
        )
    reader = _Reader(hidden, wide, at)
    if at is None:
        _refuse_whole("weight", wide, split)
    else:
        part = _part("weight", wide, 0, at, vocab_size)
        split, vocab_size = _implied("weight", part, split), wide.shape[0] if vocab_size is None else vocab_size
    layout = reader.check_hidden(split)
    split = split._replace(hidden_layout=layout)
    if reader.hidden is not None:
        hidden = _local(reader.hidden, reader.hidden_gradient(split.grad_hidden))
    local = _local(wide, reader.gradient("weight", wide))
    bias = reader.parameter("bias", bias)
    if isinstance(lora, tuple) and len(lora) == 3:
        lora = reader.parameter("lora A", lora[0], whole=True), reader.parameter("lora B", lora[1]), lora[2]
    return hidden, local, bias, lora, vocab_size, split


@torch.compiler.disable
def read_logits_dtensor(logits: Tensor, vocab_size: int | None, split: Split) -> tuple[Tensor, int | None, Split]:
    """The local tensor of logits that are a DTensor, whose gradient is one as they are, and the split that it is."""
    wide: DTensor = logits  # type: ignore[assignment]
    at = _split_dim("logits", wide, -1, " or a Shard of the rows")
    if at is None:
        _refuse_whole("logits", wide, split)
    else:
        part = _part("logits", wide, -1, at, vocab_size)
        split, vocab_size = _implied("logits", part, split), wide.shape[-1] if vocab_size is None else vocab_size
    from torch.distributed.tensor import Replicate

    placements = tuple(Replicate() if p.is_partial() else p for p in wide.placements)
    return _local(wide, placements), vocab_size, split
