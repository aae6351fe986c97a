"""Who is measured: this package by each of its routes, plain PyTorch, torch.compile, and the peers as published.

Every provider of "logits" and "linear" computes DAPO (clip 0.2 / 0.28, mean over the tokens) with the entropy as a
metric unless its note says what it leaves out or does otherwise. A batch is a dictionary: logits, or hidden and weight
(leaves that want a gradient), targets [B, T], advantages [B], old [B, T].
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import a3po_kernels
from bench import peers
from bench.harness import Problem, Provider
from bench.peers import dapo_loss

ROLLOUTS = 10  # the GPU sizes are multiples of 10 and of 64: quack wants N a multiple of 8
MOST_ROLLOUTS = 16  # of rows that ROLLOUTS does not divide


def _formula(log_p: Tensor, targets: Tensor, advantages: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """DAPO as one would write it, with the entropy as a metric."""
    logp = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
    return dapo_loss(logp, {"advantages": advantages, "old": old}), entropy


def _logits_formula(logits: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return _formula(torch.log_softmax(logits.float(), -1), *rest)


def _linear_formula(hidden: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    # No name holds the logits, so that they are gone once their log-softmax is there.
    return _formula(torch.log_softmax((hidden @ weight.t()).float(), -1), *rest)


@functools.cache
def _compiled(formula):
    return torch.compile(formula)


def _arguments(batch: dict) -> list[Tensor]:
    head = [batch["logits"]] if "logits" in batch else [batch["hidden"], batch["weight"]]
    return [*head, batch["targets"], batch["advantages"], batch["old"]]


def eager(batch: dict) -> Tensor:
    return (_logits_formula if "logits" in batch else _linear_formula)(*_arguments(batch))[0]


def compiled(batch: dict) -> Tensor:
    return _compiled(_logits_formula if "logits" in batch else _linear_formula)(*_arguments(batch))[0]


def ours(objective=None, **options):
    objective = objective or a3po_kernels.dapo()

    def forward(batch: dict) -> Tensor:
        rest = (batch["targets"], batch["advantages"])
        common = {"objective": objective, "old_logprobs": batch["old"], **options}
        if "logits" in batch:
            return a3po_kernels.policy_loss(batch["logits"], *rest, **common).loss
        if "plan" in batch:
            common["plan"] = batch["plan"]
        return a3po_kernels.linear_policy_loss(batch["hidden"], batch["weight"], *rest, **common).loss

    return forward


def planned(batch: dict) -> dict:
    """The batch with the plan of its rows, as a trainer makes it when it has the advantages."""
    every, device = torch.ones_like(batch["targets"], dtype=torch.bool), batch["targets"].device
    plan = a3po_kernels.plan_rows(every, batch["advantages"], objective=a3po_kernels.dapo(), device=device)
    return {**batch, "plan": plan}


class _Products(torch.autograd.Function):
    """hidden [N, H] @ weight [V, H], and both gradients of as many rows as are active, from the logits themselves."""

    @staticmethod
    def forward(ctx, hidden, weight, active):
        logits = hidden @ weight.t()
        ctx.save_for_backward(hidden[:active], weight, logits[:active])
        ctx.rows = hidden.shape[0]
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, logits = ctx.saved_tensors
        d_hidden = hidden.new_zeros(ctx.rows, hidden.shape[1])
        torch.mm(logits, weight, out=d_hidden[: len(hidden)])
        return d_hidden, logits.t() @ hidden, None


def with_active_rows(batch: dict) -> dict:
    rollouts = int((batch["advantages"] != 0).sum())  # the first ones, by inputs()
    return {**batch, "active": rollouts * batch["targets"].shape[1]}


def products(batch: dict) -> Tensor:
    return _Products.apply(batch["hidden"].flatten(0, 1), batch["weight"], batch["active"])


BASELINE = "eager"
_a3po = a3po_kernels.a3po()
_bonus = a3po_kernels.dapo(entropy_coef=0.01)
_NO_ENTROPY = "no entropy"
_FORMED = "the gradient is formed in forward"


def _sparse(problem: Problem) -> bool:
    return problem.active_fraction < 1


def _half(problem: Problem) -> bool:
    return problem.dtype in (torch.bfloat16, torch.float16)


def _bf16(problem: Problem) -> bool:
    return problem.dtype == torch.bfloat16


LOGITS = (
    Provider("eager", eager),
    Provider("torch.compile", compiled),
    Provider("ours", ours()),
    Provider("ours, a3po", ours(_a3po), dapo=False),
    Provider("ours, in place", ours(inplace_backward=True), inplace=True),
    Provider("ours, one-launch", ours(route="one-launch"), note="the gradient is formed in forward"),
    Provider("ours, two-stage", ours(route="two-stage")),
    Provider("ours, entropy bonus", ours(_bonus), note="a gradient of the entropy as well", dapo=False),
    Provider("TRL logits kernel", peers.trl_logits, ("trl",), cuda=True),
    Provider(
        "Liger Triton GRPO", peers.liger_logits, ("liger-kernel",), cuda=True, inplace=True,
        prepare=peers.one_position_more, note=_NO_ENTROPY,
    ),
    Provider("quack cross entropy", peers.quack_logits, ("quack-kernels",), cuda=True, note=_NO_ENTROPY),
)  # fmt: skip
LINEAR = (
    Provider("eager", eager),
    Provider("torch.compile", compiled),
    Provider("ours, one pass", ours(route="one-pass"), note=_FORMED),
    Provider("ours, one pass, a3po", ours(_a3po, route="one-pass"), note=_FORMED, dapo=False),
    Provider("ours, recompute", ours(route="recompute")),
    Provider(
        "ours, with a plan", ours(route="one-pass"), only=_sparse, prepare=planned,
        note="waits for nothing: the rows with a gradient were planned with the batch",
    ),
    Provider(
        "ours, every row", ours(route="one-pass", compaction="none"), only=_sparse,
        note="rows without a gradient go through the products",
    ),
    Provider(
        "ours, one pass, active statistics", ours(route="one-pass", statistics="active"), only=_sparse,
        note="no statistics of rows without a gradient, which the limit counts",
    ),
    Provider(
        "three GEMMs alone", products, prepare=with_active_rows, dapo=False,
        note="logits, dHidden, dWeight of the rows with a gradient, nothing else: the limit as cuBLAS gives it",
    ),
    Provider("TRL head", peers.trl_head(32768), ("trl",), note="its trainer's tile, 32768 columns"),
    Provider("TRL head, 8192 columns", peers.trl_head(8192), ("trl",)),
    Provider(
        "Liger chunked GRPO", peers.liger_head, ("liger-kernel",),
        note="no entropy; the gradient is formed in forward; GEMMs in fp32",
    ),
    Provider(
        "Liger scaled cross entropy, CuTe", peers.liger_scaled_cute, ("liger-kernel", "nvidia-cutlass-dsl"), cuda=True,
        only=_bf16, note="log-probs and entropy; the loss in PyTorch",
    ),
    Provider(
        "Liger scaled cross entropy, fallback", peers.liger_scaled_fallback, ("liger-kernel",),
        note="its PyTorch loop over 512 tokens, where it has no CuTe kernels",
    ),
    Provider("verl linear_cross_entropy", peers.verl_head, ("verl",), cuda=True),
    Provider(
        "CCE", peers.cce_head, ("cut-cross-entropy",), cuda=True, only=_half, note="no entropy; drops small gradients"
    ),
    Provider(
        "quack chunked linear", peers.quack_head, ("quack-kernels",), cuda=True, only=_half, dapo=False,
        note="mean cross entropy alone: no log-probs, entropy or policy loss",
    ),
)  # fmt: skip


def named(name: str) -> Provider:
    """The provider of this name that the table of its operation holds: "linear:TRL head"."""
    operation, _, rest = name.partition(":")
    return next(p for p in {"logits": LOGITS, "linear": LINEAR}[operation] if p.name == rest)


def table(problem: Problem) -> list[Provider]:
    """Those that have something to say about a problem."""
    return [p for p in {"logits": LOGITS, "linear": LINEAR}[problem.operation] if p.only(problem)]


def rollouts(rows: int) -> int:
    """How many rollouts of equal length so many rows are."""
    if rows % ROLLOUTS == 0:
        return ROLLOUTS
    return next(n for n in range(MOST_ROLLOUTS, 0, -1) if rows % n == 0)


def inputs(problem: Problem, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Random logits (or hidden states and weight), old log-probs near the present ones, advantages of both signs.

    Rollouts of equal length; a share active_fraction of them, the first ones, has an advantage.
    """
    generator = torch.Generator(device).manual_seed(seed)
    count = rollouts(problem.rows)
    length = problem.rows // count

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    targets = torch.randint(0, problem.vocabulary, (count, length), generator=generator, device=device)
    if problem.operation == "logits":
        batch = {"logits": normal(count, length, problem.vocabulary).mul_(2).to(problem.dtype)}
        current = a3po_kernels.token_logprobs(batch["logits"], targets).logprobs
    else:
        scale = 2 / problem.hidden**0.5
        batch = {
            "hidden": normal(count, length, problem.hidden).to(problem.dtype),
            "weight": normal(problem.vocabulary, problem.hidden).mul_(scale).to(problem.dtype),
        }
        current = a3po_kernels.linear_token_logprobs(batch["hidden"], batch["weight"], targets).logprobs
    advantages = torch.where(torch.arange(count, device=device) % 2 == 0, 1.0, -1.0)
    active = torch.arange(count, device=device) < round(problem.active_fraction * count)
    return {
        **batch, "targets": targets, "advantages": advantages * active,
        "old": (current + 0.1 * normal(count, length)).clamp(max=0.0),
    }  # fmt: skip


class _Model(torch.autograd.Function):
    """Stands for the model below the head: gives a tensor, and takes its gradient without keeping it."""

    @staticmethod
    def forward(ctx, parameter, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros((), device=gradient.device), None


def below(tensor: Tensor) -> Tensor:
    """The tensor as an inner node of the graph, as a model would give it."""
    return _Model.apply(torch.zeros((), device=tensor.device, requires_grad=True), tensor)


def leaves(batch: dict[str, Tensor], copy: bool = False) -> dict[str, Tensor]:
    """The batch with logits that belong to a graph, or with fresh leaves; copy=True for who spoils its logits."""
    if "logits" in batch:
        return {**batch, "logits": below(batch["logits"].clone() if copy else batch["logits"])}
    return {**batch, **{name: batch[name].detach().requires_grad_() for name in ("hidden", "weight")}}
