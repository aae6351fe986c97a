"""Heads and logits that are DTensors: one case on a rank, and the same case on plain tensors in one process."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import a3po_kernels as ak
from tests.split_heads import same_bits

B, T, H, RANK = 4, 8, 5, 2


@dataclass(frozen=True)
class Case:
    """Placements of one letter or two a dimension of the mesh: R, P, S0, S1, S2; (): a plain tensor.

    weight: of the weight, as of bias and lora's B. hidden: of the hidden states, or of the logits. d_weight, d_hidden:
    what their gradients must have. a, d_a: of lora's A. extras: "bias", "lora", "frozen", "main_grad", "packed",
    "async" (the hidden states are on their way), "scaled" (the weight is no leaf), "compiled".
    """

    name: str
    hidden: tuple[str, ...]
    d_hidden: tuple[str, ...]
    weight: tuple[str, ...] = ("S0",)
    d_weight: tuple[str, ...] = ("S0",)
    a: tuple[str, ...] = ()
    d_a: tuple[str, ...] = ()
    call: str = "linear_token_logprobs"
    mesh: str = "tp"
    size: int = 11
    vocab_size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    extras: tuple[str, ...] = ()

    @property
    def on_logits(self) -> bool:
        return "linear" not in self.call


@functools.cache
def meshes() -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    ranks = dist.get_world_size()
    found = {"tp": init_device_mesh("cpu", (ranks,))}
    if ranks == 4:
        found["dp,tp"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        found["dp,tp[tp]"] = found["dp,tp"]["tp"]
    return found


def placements(letters: tuple[str, ...]) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    return [{"R": Replicate(), "P": Partial()}.get(x) or Shard(int(x[1:])) for x in letters]


def place(value: Tensor, mesh: Any, letters: tuple[str, ...]) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, mesh, placements(letters)) if letters else value.clone()


def rows_of(case: Case, values: Tensor) -> Tensor:
    """Per-token values of this rank: dimensions that shard the rows, and not the vocabulary, give each rank its own."""
    mesh = meshes()[case.mesh]
    for d, letters in enumerate(case.hidden):
        gathered = not case.on_logits and case.weight[d] == "S0"
        if letters[0] == "S" and not gathered and int(letters[1:]) < values.ndim:
            values = values.chunk(mesh.size(d), int(letters[1:]))[mesh.get_local_rank(d)]
    return values


def data(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    known = case.vocab_size or case.size
    found = {"weight": normal(case.size, H), "bias": normal(case.size), "a": normal(RANK, H),
             "b": normal(case.size, RANK), "hidden": normal(B, T, H), "logits": 2 * normal(B, T, case.size),
             "targets": torch.randint(0, known, (B, T), generator=generator), "advantages": normal(B, T),
             "old_logprobs": normal(B, T).clamp(max=1.5) - 2, "factors": normal(B, T),
             "loss_weights": normal(B, T)}  # fmt: skip
    if "packed" in case.extras:
        found = {name: x.flatten(0, 1) if x.shape[:2] == (B, T) else x for name, x in found.items()}
    return found


def _call(case: Case, leaves: dict[str, Tensor], rows: dict[str, Tensor], keywords: dict[str, Any]) -> dict[str, Any]:
    operation = getattr(ak, case.call)
    first = [leaves["logits"]] if case.on_logits else [leaves["hidden"], leaves["weight"]]
    if "min_p" in case.call:
        return {"logprobs": operation(*first, rows["targets"], 0.2, **keywords)}
    if "policy_loss" in case.call:
        if "packed" in case.extras:
            keywords["cu_seqlens"] = torch.arange(0, rows["targets"].numel() + 1, T)
        out = operation(
            *first, rows["targets"], rows["advantages"], old_logprobs=rows["old_logprobs"], denominator=float(B * T),
            **keywords,
        )  # fmt: skip
        return {"loss": out.loss, "logprobs": out.logprobs, "entropy": out.entropy, "route": out.route}
    if "compiled" in case.extras:
        operation = torch.compile(operation, backend="eager")
    stats = operation(*first, rows["targets"], **keywords)
    loss = (stats.logprobs * rows["factors"] + stats.entropy * rows["loss_weights"]).sum()
    return {"loss": loss, "logprobs": stats.logprobs, "entropy": stats.entropy}


def run_case(case: Case, split: bool = False) -> dict[str, Any]:
    """What the call gives, and gradients (of DTensors whole), with the placements of those."""
    values = data(case)
    rows = {name: rows_of(case, x) if split else x for name, x in values.items() if x.shape == values["targets"].shape}
    letters = {"weight": case.weight, "bias": case.weight, "b": case.weight, "a": case.a, "hidden": case.hidden,
               "logits": case.hidden}  # fmt: skip
    names = ["logits"] if case.on_logits else ["hidden", "weight"]
    names += ["bias"] * ("bias" in case.extras) + ["a", "b"] * ("lora" in case.extras)
    sharded = case.options.get("hidden_layout") == "sequence_sharded"
    leaves = {}
    for name in names:
        value = place(values[name], meshes()[case.mesh], letters[name]) if split else values[name].clone()
        if name == "hidden" and sharded and split:
            value = value.chunk(dist.get_world_size(), -2)[dist.get_rank()].clone()
        leaves[name] = value.requires_grad_(name != "weight" or "frozen" not in case.extras)
    used = dict(leaves)
    if "async" in case.extras and split:
        used["hidden"] = leaves["hidden"].redistribute(placements=placements(("R",)), async_op=True)
    if "scaled" in case.extras:
        used["weight"] = leaves["weight"] * 2.0
    keywords = {name: x for name, x in case.options.items() if split or name not in ("grad_hidden", "hidden_layout")}
    if case.vocab_size is not None:
        keywords["vocab_size"] = case.vocab_size
    if "bias" in case.extras:
        keywords["bias"] = used["bias"]
    if "lora" in case.extras:
        keywords["lora"] = (used["a"], used["b"], 0.7)
    main_grad = None
    if "main_grad" in case.extras:
        local = leaves["weight"].to_local() if split else leaves["weight"]
        main_grad = keywords["main_grad"] = torch.zeros(local.shape, dtype=torch.float32)
    out = _call(case, used, rows, keywords)
    found = {name: x.detach() if isinstance(x, Tensor) else x for name, x in out.items()}
    found["placements"] = {}
    numbers = torch.arange(values["targets"].numel()).view(values["targets"].shape)
    found["rows"] = rows_of(case, numbers) if split else numbers
    if main_grad is not None:
        found["main_grad"] = main_grad
    if "loss" not in out:
        return found
    out["loss"].backward()
    for name, leaf in leaves.items():
        gradient = leaf.grad
        if hasattr(gradient, "full_tensor"):
            assert gradient.device_mesh == leaf.device_mesh and gradient.shape == leaf.shape
            found["placements"][name] = tuple(gradient.placements)
            gradient = gradient.full_tensor()
        found[f"d_{name}"] = gradient
    return found


def run_cases(cases: list[Case]) -> list[Any]:
    """On a rank: each case's results, run twice; the bits must be the same."""
    results = []
    for case in cases:
        try:
            first, second = run_case(case, True), run_case(case, True)
            first["twice"] = same_bits(first, second)
            results.append(first)
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    return results
