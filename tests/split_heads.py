"""Heads whose vocabulary is split over ranks: one case on a rank, and the same case whole on one process."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from batches import keywords_for, preset, random_batch
from torch import Tensor

import a3po_kernels

V, H, RANK = 37, 6, 3


@dataclass(frozen=True)
class Case:
    """sizes: the ranks' parts; (): equal ones, padded at the end of the vocabulary. padding: rows behind each part.

    options: of the call. extras: "bias", "lora", "temperature", "frozen" (the weight), "main_grad", "plan".
    """

    name: str
    preset: str = "a3po"
    call: str = "linear_policy_loss"
    sizes: tuple[int, ...] = ()
    padding: int = 0
    packed: bool = False
    layout: str = "replicated"
    options: dict[str, Any] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    told: bool = True  # the size of the vocabulary

    @property
    def reduction(self) -> str:
        default = "all_reduce" if self.layout == "replicated" else "reduce_scatter"
        return self.options.get("grad_hidden", default)


def bounds(case: Case, ranks: int) -> list[tuple[int, int]]:
    """First and last column of each rank's part."""
    if case.sizes:
        ends = list(itertools.accumulate(case.sizes))
        assert ends[-1] == V and len(ends) == ranks
        return list(zip([0, *ends], ends, strict=False))
    each = -(-V // ranks)
    return [(min(rank * each, V), min((rank + 1) * each, V)) for rank in range(ranks)]


def _part(values: Tensor, case: Case, rank: int, ranks: int) -> Tensor:
    """A rank's rows of [V, ...], and padding that must take no part."""
    first, stop = bounds(case, ranks)[rank]
    pad = case.padding if case.sizes else -(-V // ranks) - (stop - first)
    return torch.cat([values[first:stop], values.new_full((pad, *values.shape[1:]), 7.0)])


def _split_keywords(case: Case, rank: int, ranks: int) -> dict[str, Any]:
    keywords: dict[str, Any] = {"tp_group": dist.group.WORLD}
    first, stop = bounds(case, ranks)[rank]
    if case.sizes:
        keywords["vocab_start"] = (first, stop) if case.padding else first
    if case.told or not case.sizes:
        keywords["vocab_size"] = V
    return keywords


def rows_of(case: Case, length: int, rank: int, ranks: int) -> slice:
    """A rank's rows in "sequence_sharded"."""
    each = length // ranks
    return slice(rank * each, (rank + 1) * each)


def run_case(case: Case, rank: int = 0, ranks: int = 1, device: str = "cpu") -> dict[str, Any]:
    """What the call gives and its gradients, of one rank's part or of the whole."""
    split = ranks > 1
    batch = random_batch(3, rollouts=4, length=12, vocabulary=V)
    batch = batch.packed() if case.packed else batch
    if case.packed:  # as many rows for every rank
        count = batch.targets.numel() // 4 * 4
        cut = {name: x[:count] if x.shape[:1] == batch.targets.shape else x.clamp(max=count)
               for name, x in batch.keywords.items()}  # fmt: skip
        batch.targets, batch.keywords = batch.targets[:count], cut
    batch.targets, batch.advantages = batch.targets.to(device), batch.advantages.to(device)
    batch.keywords = {name: x.to(device) for name, x in batch.keywords.items()}
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    parameters = {"weight": normal(V, H), "bias": normal(V), "a": normal(RANK, H), "b": normal(V, RANK)}
    hidden = normal(*batch.targets.shape, H)
    temperature = 0.5 + torch.rand(batch.targets.shape, generator=generator, dtype=torch.float64).to(device)
    parameters = {name: value.to(case.dtype) for name, value in parameters.items()}
    hidden = hidden.to(case.dtype)
    if split:
        parameters = {name: value if name == "a" else _part(value, case, rank, ranks)
                      for name, value in parameters.items()}  # fmt: skip
        if case.layout == "sequence_sharded":
            hidden = hidden[..., rows_of(case, hidden.shape[-2], rank, ranks), :].contiguous()
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    leaves["hidden"] = hidden.clone().requires_grad_()
    if "frozen" in case.extras:
        leaves["weight"].requires_grad_(False)
    keywords = dict(case.options)
    if split:
        keywords |= _split_keywords(case, rank, ranks)
        if "linear" in case.call:
            keywords["hidden_layout"] = case.layout
    else:
        keywords.pop("grad_hidden", None)
    if "temperature" in case.extras:
        keywords["temperature"] = temperature
    used = ["hidden", "weight"]
    if "bias" in case.extras:
        keywords["bias"] = leaves["bias"]
        used.append("bias")
    if "lora" in case.extras:
        keywords["lora"] = (leaves["a"], leaves["b"], 0.7)
        used += ["a", "b"]
    main_grad = None
    if "main_grad" in case.extras:
        main_grad = keywords["main_grad"] = torch.ones_like(parameters["weight"], dtype=torch.float32)
    out = _call(case, batch, leaves, keywords, split, rank, ranks)
    found = {name: value for name, value in out.items() if name != "loss"}
    if "loss" in out:
        found["loss"] = out["loss"].detach()
        out["loss"].backward()
        names = ["logits"] if "logits" in out else used
        source = {"logits": out["logits"]} if "logits" in out else leaves
        found |= {f"d_{name}": source[name].grad for name in names}
        found.pop("logits", None)
        if main_grad is not None:
            found["main_grad"] = main_grad
    return found


def _call(case, batch, leaves, keywords, split, rank, ranks) -> dict[str, Any]:
    if "policy_loss" in case.call:
        objective, _ = preset(case.preset)
        given = keywords_for(case.preset, batch.keywords)
        if "on_policy" in case.extras:
            given = {name: x for name, x in given.items() if name in ("mask", "cu_seqlens", "ref_logprobs")}
        keywords |= {"objective": objective, **given}
        if case.preset == "dr_grpo":
            keywords["max_length"] = 12
        if "plan" in case.extras:
            keywords["plan"] = a3po_kernels.plan_rows(
                given["mask"] & (batch.targets != -100), batch.advantages, objective=objective,
                cu_seqlens=given.get("cu_seqlens"),
            )  # fmt: skip
    if case.call == "linear_policy_loss":
        out = a3po_kernels.linear_policy_loss(
            leaves["hidden"], leaves["weight"], batch.targets, batch.advantages, **keywords
        )
        return out._asdict()
    if case.call == "linear_token_logprobs":
        stats = a3po_kernels.linear_token_logprobs(leaves["hidden"], leaves["weight"], batch.targets, **keywords)
        # Not the same factor for each row: gradients of both outputs.
        factors = torch.linspace(-1, 2, stats.logprobs.numel()).to(stats.logprobs).view(stats.logprobs.shape)
        loss = (stats.logprobs * factors + stats.entropy * factors.flip(0)).sum()
        return {"loss": loss, "logprobs": stats.logprobs.detach(), "entropy": stats.entropy.detach()}
    if case.call == "linear_min_p_token_logprobs":
        out = a3po_kernels.linear_min_p_token_logprobs(
            leaves["hidden"], leaves["weight"], batch.targets, 0.1, **keywords
        )
        return {"logprobs": out}
    # On logits: [.., V], of which a rank has its columns.
    every = torch.randn(*batch.targets.shape, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 3
    if split:
        every = _part(every.movedim(-1, 0), case, rank, ranks).movedim(0, -1)
    logits = every.contiguous().to(batch.targets.device, case.dtype).requires_grad_()
    if case.call == "min_p_token_logprobs":
        return {"logprobs": a3po_kernels.min_p_token_logprobs(logits, batch.targets, 0.1, **keywords)}
    if case.call == "token_logprobs":
        stats = a3po_kernels.token_logprobs(logits, batch.targets, **keywords)
        loss = (stats.logprobs * 0.3 - 1.7 * stats.entropy).sum()
        return {"loss": loss, "logprobs": stats.logprobs.detach(), "entropy": stats.entropy.detach(), "logits": logits}
    out = a3po_kernels.policy_loss(logits, batch.targets, batch.advantages, **keywords)
    return {**out._asdict(), "logits": logits}


def run_cases(cases: list[Case], on: str = "cpu") -> list[Any]:
    """On a rank: each case's results, run twice; the bits must be the same."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = f"cuda:{rank}" if on == "cuda" else on
    results = []
    for case in cases:
        try:
            first, second = (run_case(case, rank, ranks, device) for _ in range(2))
            first["twice"] = same_bits(first, second)
            results.append(first)
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    return results


def same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(same_bits(a[name], b[name]) for name in a if name != "twice")
    if not isinstance(a, Tensor):
        return a == b
    a, b = a.detach(), b.detach()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
