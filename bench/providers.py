"""Who is measured: this package by each of its routes, plain PyTorch, torch.compile, and the peers as published.

Every provider of "logits" and "linear" computes DAPO (clip 0.2 / 0.28, mean over the tokens) with the entropy as a
metric unless its note says what it leaves out. A batch is a dictionary: logits, or hidden and weight (leaves that want
a gradient), targets [B, T], advantages [B], old [B, T].
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import a3po_kernels
from bench.harness import Problem, Provider

ROLLOUTS = 10  # the GPU sizes are multiples of 10 and of 64: quack wants N a multiple of 8


def dapo_loss(logp: Tensor, batch: dict) -> Tensor:
    advantages = batch["advantages"].unsqueeze(-1)
    ratio = (logp - batch["old"]).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28)).mean()


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
        return a3po_kernels.linear_policy_loss(batch["hidden"], batch["weight"], *rest, **common).loss

    return forward


def trl_logits(batch: dict) -> Tensor:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    logp, _ = selective_log_softmax_and_entropy(batch["logits"], batch["targets"])
    return dapo_loss(logp, batch)


def trl_head(columns: int):
    def forward(batch: dict) -> Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        flat, targets = batch["hidden"].flatten(0, 1), batch["targets"].flatten()
        logp, *_ = ChunkedLogProbFunction.apply(
            flat, batch["weight"], None, targets, 1.0, columns, None, 1.0, ("entropy",)
        )
        return dapo_loss(logp.view(batch["targets"].shape), batch)

    return forward


def one_position_more(batch: dict) -> dict:
    """Liger takes logits [B, T + 1, V] for T tokens."""
    return {**batch, "logits": torch.nn.functional.pad(batch["logits"], (0, 0, 0, 1))}


def liger_logits(batch: dict) -> Tensor:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    return triton_grpo_loss(
        batch["logits"], batch["old"], None, batch["targets"], batch["advantages"], temperature=1.0, beta=0.0,
        eps_low=0.2, eps_high=0.28, loss_type="dapo", reduce=True,
    )[0]  # fmt: skip


@functools.cache
def _liger_loss():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss(
        beta=0.0, epsilon_low=0.2, epsilon_high=0.28, loss_type="dapo", use_ref_model=False, compiled=True
    )


def liger_head(batch: dict) -> Tensor:
    mask = torch.ones_like(batch["targets"])
    return _liger_loss()(
        batch["hidden"], batch["weight"], batch["targets"], mask, batch["advantages"], old_per_token_logps=batch["old"]
    )[0]


def verl_head(batch: dict) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logp, _ = linear_cross_entropy(batch["hidden"], batch["weight"], batch["targets"], 1.0, "none", None)
    return dapo_loss(logp.view(batch["targets"].shape), batch)


def cce_head(batch: dict) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(batch["hidden"], batch["weight"], batch["targets"], reduction="none")
    return dapo_loss(-loss, batch)


def quack_logits(batch: dict) -> Tensor:
    from quack.cross_entropy import cross_entropy

    loss = cross_entropy(batch["logits"].flatten(0, 1), batch["targets"].flatten(), reduction="none")
    return dapo_loss(-loss.view(batch["targets"].shape), batch)


def quack_head(batch: dict) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(batch["hidden"].flatten(0, 1), batch["weight"], batch["targets"].flatten())


BASELINE = "eager"
_a3po = a3po_kernels.a3po()
_bonus = a3po_kernels.dapo(entropy_coef=0.01)
_NO_ENTROPY = "no entropy"


def _sparse(problem: Problem) -> bool:
    return problem.active_fraction < 1


def _half(problem: Problem) -> bool:
    return problem.dtype in (torch.bfloat16, torch.float16)


LOGITS = (
    Provider("eager", eager),
    Provider("torch.compile", compiled),
    Provider("ours", ours()),
    Provider("ours, a3po", ours(_a3po)),
    Provider("ours, in place", ours(inplace_backward=True), inplace=True),
    Provider("ours, entropy bonus", ours(_bonus), note="a gradient of the entropy as well"),
    Provider("TRL logits kernel", trl_logits, ("trl",), cuda=True),
    Provider(
        "Liger Triton GRPO", liger_logits, ("liger-kernel",), cuda=True, inplace=True, prepare=one_position_more,
        note=_NO_ENTROPY,
    ),
    Provider("quack cross entropy", quack_logits, ("quack-kernels",), cuda=True, note=_NO_ENTROPY),
)
LINEAR = (
    Provider("eager", eager),
    Provider("torch.compile", compiled),
    Provider("ours, one pass", ours(route="one-pass"), note="the gradient is formed in forward"),
    Provider("ours, one pass, a3po", ours(_a3po, route="one-pass"), note="the gradient is formed in forward"),
    Provider("ours, recompute", ours(route="recompute")),
    Provider(
        "ours, one pass, active statistics", ours(route="one-pass", statistics="active"), only=_sparse,
        note="no statistics of rows without a gradient, which the limit counts",
    ),
    Provider(
        "ours, one pass, exact compaction", ours(route="one-pass", compaction="exact"), only=_sparse,
        note="waits for the number of active rows; the default on a CPU",
    ),
    Provider("TRL head", trl_head(32768), ("trl",), note="its trainer's tile, 32768 columns"),
    Provider("TRL head, 8192 columns", trl_head(8192), ("trl",)),
    Provider(
        "Liger chunked GRPO", liger_head, ("liger-kernel",),
        note="no entropy; the gradient is formed in forward; GEMMs in fp32",
    ),
    Provider("verl linear_cross_entropy", verl_head, ("verl",), cuda=True),
    Provider("CCE", cce_head, ("cut-cross-entropy",), cuda=True, only=_half, note="no entropy; drops small gradients"),
    Provider(
        "quack chunked linear", quack_head, ("quack-kernels",), cuda=True, only=_half,
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


def inputs(problem: Problem, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Random logits (or hidden states and weight), old log-probs near the present ones, advantages of both signs.

    ROLLOUTS rollouts of equal length; a share active_fraction of them has an advantage.
    """
    generator = torch.Generator(device).manual_seed(seed)
    rollouts, length = ROLLOUTS, problem.rows // ROLLOUTS

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    targets = torch.randint(0, problem.vocabulary, (rollouts, length), generator=generator, device=device)
    if problem.operation == "logits":
        batch = {"logits": normal(rollouts, length, problem.vocabulary).mul_(2).to(problem.dtype)}
        current = a3po_kernels.token_logprobs(batch["logits"], targets).logprobs
    else:
        scale = 2 / problem.hidden**0.5
        batch = {
            "hidden": normal(rollouts, length, problem.hidden).to(problem.dtype),
            "weight": normal(problem.vocabulary, problem.hidden).mul_(scale).to(problem.dtype),
        }
        current = a3po_kernels.linear_token_logprobs(batch["hidden"], batch["weight"], targets).logprobs
    advantages = torch.where(torch.arange(rollouts, device=device) % 2 == 0, 1.0, -1.0)
    active = torch.arange(rollouts, device=device) < round(problem.active_fraction * rollouts)
    return {
        **batch, "targets": targets, "advantages": advantages * active, "old": current + 0.1 * normal(rollouts, length),
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
