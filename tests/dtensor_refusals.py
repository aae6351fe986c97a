"""Calls with DTensors that must raise, and what the message must say; on every rank at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import a3po_kernels as ak
from tests.dtensor_heads import B, H, T, meshes, place

V = 11
Refusal = tuple[Callable[[], Any], type[Exception], str]


def _head(weight: Any, hidden: Any, **keywords: Any) -> Any:
    return ak.linear_token_logprobs(hidden, weight, torch.zeros(hidden.shape[:-1], dtype=torch.int64), **keywords)


def refusals() -> dict[str, Refusal]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    wrong, kind = ValueError, TypeError
    ranks, mesh = dist.get_world_size(), meshes()["tp"]
    other = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("one", "tp"))
    alone = [dist.new_group([rank]) for rank in range(ranks)][dist.get_rank()]

    def values(*shape: Any, at: Any = mesh) -> Any:
        """Ones of a shape, and how they are placed; by default whole."""
        whole = not isinstance(shape[-1], tuple)
        return place(torch.ones(shape if whole else shape[:-1]), at, ("R",) if whole else shape[-1])

    s0, s1, s2 = ("S0",), ("S1",), ("S2",)
    w, h, plain = values(V, H, s0), values(B, T, H), torch.ones(B, T, H)
    part = DTensor.from_local(torch.ones(V, H), mesh, [Partial()])
    odd = DTensor.from_local(torch.ones(3 + dist.get_rank(), H), mesh, [Shard(0)], shape=torch.Size((90, H)),
                             stride=(H, 1))  # fmt: skip
    wide = nn.Parameter(values(V, H, s0).bfloat16())
    sharded = fully_shard(nn.Linear(H, 4 * V, bias=False))
    found: dict[str, Refusal] = {
        "columns of the weight": (lambda: _head(values(V, H, s1), h), wrong, r"weight takes Shard\(0\)"),
        "a part of the weight": (lambda: _head(part, h), wrong, r"weight takes Shard\(0\).*Partial"),
        "other pieces": (lambda: _head(odd, plain), wrong, "as torch.chunk cuts 90"),
        "FSDP2's shard": (lambda: _head(sharded.weight, plain), wrong, "FSDP2's shard.*unshard"),
        "a view of it": (lambda: _head(sharded.weight.detach(), plain), wrong, "FSDP2's shard"),
        "own rollouts": (
            lambda: _head(w, values(B, T, H, s0)), wrong, r"hidden takes Replicate or Shard\(1\)"),
        "columns of hidden": (
            lambda: _head(w, values(B, T, H, s2)), wrong, "hidden takes Replicate or"),
        "columns of hidden, a whole weight": (
            lambda: _head(values(V, H), values(B, T, H, s2)), wrong, "or a Shard of its rows"),
        "rows that do not divide": (
            lambda: _head(w, values(B, 7, H, s1)), wrong, "hidden's rows, 7, must be split evenly"),
        "another mesh": (
            lambda: _head(w, values(B, T, H, ("R", "R"), at=other)), wrong, "hidden must be on the mesh"),
        "a plain weight": (lambda: _head(torch.ones(V, H), h), kind, "weight must be a DTensor where hidden is"),
        "a plain bias": (lambda: _head(w, h, bias=torch.ones(V)), kind, "bias must be a DTensor"),
        "a whole bias": (lambda: _head(w, h, bias=values(V)), wrong, r"bias takes Shard\(0\)"),
        "a bias elsewhere": (
            lambda: _head(w, h, bias=values(V, ("R", "S0"), at=other)), wrong, "bias must be on the mesh"),
        "a DTensor for a plain weight": (
            lambda: _head(torch.ones(V, H), plain, bias=values(V)), kind, "bias must be a plain tensor; got a DT"),
        "a whole B": (
            lambda: _head(w, h, lora=(torch.ones(2, H), values(V, 2), 1.0)), wrong, r"lora B takes Shard\(0\)"),
        "a split A": (
            lambda: _head(w, h, lora=(values(2, H, s0), values(V, 2, s0), 1.0)),
            wrong, "lora A takes Replicate"),
        "main_grad": (
            lambda: _head(w.requires_grad_(), h, main_grad=values(V, H, s0)), kind,
            "main_grad must be a plain tensor"),
        "another group": (lambda: _head(w, h, tp_group=alone), wrong, "tp_group must be that of the mesh's"),
        "no group": (lambda: _head(w, h, tp_group="tp"), kind, "tp_group must be a torch.distributed ProcessGroup"),
        "a group for a whole weight": (
            lambda: _head(values(V, H), h, tp_group=dist.group.WORLD), wrong, "tp_group says that weight is a part"),
        "another start": (lambda: _head(w, h, vocab_start=3 * V), wrong, "vocab_start must be"),
        "a larger vocabulary": (lambda: _head(w, h, vocab_size=V + 1), wrong, r"vocab_size must lie in \[1, 11\]"),
        "all rows are here": (
            lambda: _head(w, h, hidden_layout="sequence_sharded"), wrong, "hidden_layout is 'sequence_sharded'"),
        "a reduction for split rows": (
            lambda: _head(w, values(B, T, H, s1), grad_hidden="partial"), wrong, "'sequence_sharded' needs"),
        "a whole weight and plain rows": (
            lambda: _head(values(V, H).requires_grad_(), plain), wrong, "a plain hidden does not say"),
        "targets": (
            lambda: ak.linear_token_logprobs(h, w, place(torch.zeros(B, T, dtype=torch.int64), mesh, ("R",))), kind,
            "targets must be a plain tensor; got a DTensor"),
        "temperature": (lambda: _head(w, h, temperature=values(B, T)), kind, "temperature must be a plain tensor"),
        "logits, a part": (
            lambda: ak.token_logprobs(part, torch.zeros(V, dtype=torch.int64)), wrong, "logits takes Shard"),
        "logits, a group": (
            lambda: ak.token_logprobs(values(B, V), torch.zeros(B, dtype=torch.int64), tp_group=dist.group.WORLD),
            wrong, "tp_group says that logits is a part"),
        "logits in place": (
            lambda: ak.token_logprobs(
                values(B, V, s1).requires_grad_(), torch.zeros(B, dtype=torch.int64), inplace_backward=True),
            wrong, "inplace_backward takes no DTensor"),
    }  # fmt: skip
    if hasattr(wide, "grad_dtype"):
        wide.grad_dtype = torch.float32
        found["another dtype of the gradient"] = (lambda: _head(wide, h.bfloat16()), wrong, "weight.grad_dtype")
    tokens = {"targets": torch.zeros(B, T, dtype=torch.int64), "advantages": torch.ones(B), "mask": torch.ones(B, T),
              "old_logprobs": torch.zeros(B, T), "denominator": torch.tensor(5.0),
              "step": torch.tensor(1.0)}  # fmt: skip
    for name, value in tokens.items():
        given = {**tokens, name: place(value, mesh, ("R",))}
        found[f"{name} of a loss"] = (
            lambda given=given: ak.linear_policy_loss(h, w, objective=ak.dapo(), **given), kind,
            f"{name} must be a plain tensor; got a DTensor",
        )  # fmt: skip
    if ranks == 4:
        both = meshes()["dp,tp"]
        head = parallelize_module(nn.Sequential(nn.Linear(H, V, bias=False)), both["tp"], {"0": ColwiseParallel()})
        fully_shard(head, mesh=both["dp"])
        found |= {
            "FSDP2 and tensor parallel": (lambda: _head(head[0].weight, plain), wrong, "FSDP2 shards further"),
            "both dimensions": (
                lambda: _head(values(V, H, ("S0", "S0"), at=both), plain), wrong, "weight takes Shard"),
            "plain rows": (
                lambda: _head(values(V, H, ("R", "S0"), at=both).requires_grad_(), plain), wrong,
                "weight is replicated over the mesh's dimension dp"),
            "plain rows of an adapter": (
                lambda: _head(
                    values(V, H, ("R", "S0"), at=both), plain, lora=(
                        values(2, H, ("R", "R"), at=both).requires_grad_(),
                        values(V, 2, ("R", "S0"), at=both), 1.0)),
                wrong, "lora A is replicated over the mesh's dimension dp"),
            "rows split twice": (
                lambda: _head(values(V, H, ("R", "S0"), at=both), values(B, T, H, ("S1", "S1"), at=both)),
                wrong, "over no others"),
        }  # fmt: skip
    return found


def refused() -> dict[str, tuple[str, str]]:
    """What each call raised and said, and the pattern of what it should."""
    messages = {}
    for name, (call, error_type, words) in refusals().items():
        try:
            call()
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
        else:
            got = "nothing was raised"
        messages[name] = (got, f"^{error_type.__name__}: .*{words}")
    return messages
