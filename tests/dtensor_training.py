"""A small model whose head is split over tensor-parallel ranks and sharded by FSDP2, and one step of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import a3po_kernels as ak
from tests.dtensor_heads import meshes

B, T, WIDTH, VOCABULARY = 4, 8, 6, 11
# How the hidden states come to the head: plain, or as a DTensor whose rows are all there or split.
INPUTS = ("plain", "replicated", "sharded")


class Model(nn.Module):
    """Its forward gives the loss, so that the head's weight is gathered over the data-parallel ranks there."""

    def __init__(self, options: dict[str, Any]):
        super().__init__()
        self.options = options
        generator = torch.Generator().manual_seed(5)
        self.up, self.down, self.head = (nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False),
                                         nn.Linear(WIDTH, VOCABULARY))  # fmt: skip
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
        self.seen: tuple = ()

    def forward(self, x: Tensor, batch: dict[str, Tensor], denominator: float) -> Tensor:
        hidden, weight = self.down(torch.tanh(self.up(x))), self.head.weight
        self.seen = tuple(getattr(value, "placements", ()) for value in (hidden, weight))
        out = ak.linear_policy_loss(
            hidden, weight, bias=self.head.bias, denominator=denominator, **batch, **self.options
        )
        return out.loss


def batch() -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(0, VOCABULARY, (B, T), generator=generator)
    return normal(B, T, WIDTH), {"targets": targets, "advantages": normal(B), "old_logprobs": normal(B, T) / 3 - 2}


def options(route: str) -> dict[str, Any]:
    return {"objective": ak.dapo(entropy_coef=0.01), "route": route, "max_chunk_bytes": 8 * VOCABULARY * 9}


def split(model: Model, inputs: str) -> Model:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = meshes()["dp,tp"]
    layout = {"plain": Replicate(), "replicated": Replicate(), "sharded": Shard(1)}[inputs]
    plan = {"up": ColwiseParallel(), "head": ColwiseParallel(),
            "down": RowwiseParallel(output_layouts=layout, use_local_output=inputs == "plain")}  # fmt: skip
    parallelize_module(model, mesh["tp"], plan)
    return fully_shard(model, mesh=mesh["dp"])


def train(inputs: str | None, route: str) -> dict[str, Any]:
    """Two steps of AdamW; inputs: None for one process."""
    model = Model(options(route))
    x, given = batch()
    denominator = float(B * T)
    if inputs is not None:
        model, dp = split(model, inputs), meshes()["dp,tp"]["dp"]
        x, given = (x.chunk(2)[dp.get_local_rank()], {k: v.chunk(2)[dp.get_local_rank()] for k, v in given.items()})
        denominator /= dp.size()  # FSDP2 averages over its ranks
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses, norms = [], []
    for _ in range(2):
        loss = model(x, given, denominator)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append(whole(norm))
        optimizer.step()
        losses.append(loss.detach())
    found = {name: whole(parameter) for name, parameter in model.named_parameters()}
    return {"losses": losses, "norms": norms, "parameters": found, "seen": model.seen}


def whole(value: Tensor) -> Tensor:
    value = value.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
