"""The peers as published, each from a batch of bench/providers.py to DAPO's loss (or to what its note says)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bench import trl_kernels


def dapo_loss(logp: Tensor, batch: dict) -> Tensor:
    advantages = batch["advantages"].unsqueeze(-1)
    ratio = (logp - batch["old"]).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28)).mean()


def trl_logits(batch: dict) -> Tensor:
    kernels = trl_kernels.load("logprob_entropy")
    logp, _ = kernels.selective_log_softmax_and_entropy(batch["logits"], batch["targets"])
    return dapo_loss(logp, batch)


def trl_head(columns: int):
    def forward(batch: dict) -> Tensor:
        kernels = trl_kernels.load("chunked_logprob")
        flat, targets = batch["hidden"].flatten(0, 1), batch["targets"].flatten()
        logp, *_ = kernels.ChunkedLogProbFunction.apply(
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


def _scaled_cross_entropy(batch: dict, nll_of) -> Tensor:
    nll, _ = nll_of(batch["hidden"].flatten(0, 1), batch["weight"], batch["targets"].flatten())
    return dapo_loss(-nll.view(batch["targets"].shape), batch)


def liger_scaled_cute(batch: dict) -> Tensor:
    """Liger's choice for this GPU, which must be its CuTe kernels: its fallback is another provider."""
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as liger

    if liger._resolve_implementation(batch["hidden"].device) is liger._FusedLinearPPOFallbackFunction:
        raise RuntimeError("its CuTe kernels are for compute capability 9.0")
    apply = liger.LigerFusedLinearScaledCrossEntropyFunction.apply
    return _scaled_cross_entropy(batch, functools.partial(apply, return_entropy=True))


def liger_scaled_fallback(batch: dict) -> Tensor:
    """The loop over 512 tokens in PyTorch that it takes everywhere else."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import _FusedLinearPPOFallbackFunction

    def nll_of(hidden: Tensor, weight: Tensor, targets: Tensor):
        # temperature, ignore_index, return_entropy
        return _FusedLinearPPOFallbackFunction.apply(hidden, weight, targets, 1.0, -100, True)

    return _scaled_cross_entropy(batch, nll_of)


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
