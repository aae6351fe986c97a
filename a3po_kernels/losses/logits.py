"""policy_loss: logits to loss, gradient and metrics of any objective. The one place that joins the stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backends import check_backend
from ..core.checks import check_rows
from ..core.layout import token_layout
from ..objectives import Objective
from ..ops.min_p import min_p_token_logprobs
from ..ops.token_logprobs import TokenStats, check_no_overlap, check_targets, token_logprobs_unchecked
from ..schedules import Value
from .stages import (
    PolicyLossOutput,
    check_objective,
    check_token_arguments,
    loss_scale,
    policy_output,
    shape,
    token_batch,
    token_terms,
)


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    objective: Objective,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    polarity: Tensor | None = None,
    old_entropy: Tensor | None = None,
    min_p_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    step: Value = 0,
    denominator: Tensor | float | None = None,
    max_length: float | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    validate: bool = False,
    backend: str = "auto",
) -> PolicyLossOutput:
    """The loss of an objective on logits, its gradient by backward, per-token statistics and metrics.

    A batch is padded, logits [B, T, V] with one rollout a row, or packed, logits [N, V] with cu_seqlens [S + 1]. "Per
    token" below is [B, T] or [N]. A row is a token where the mask is 1 and its target is not `ignore_index`; what other
    rows hold never matters. All statistics are fp32, or fp64 for fp64 logits.

    Args:
        logits: fp16, bf16, fp32 or fp64, any strides.
        targets: per token, int32 or int64, already shifted: row i of the logits predicts targets[i].
        advantages: per rollout [B] or [S], or per token; per rollout wins where both fit.
        objective: an Objective, from a preset (grpo(), dapo(), a3po(), ...) or composed.
        old_logprobs: per token, log-probs of the behaviour policy (nats); None is on-policy, with ratio exactly 1.
        ref_logprobs: per token, of the reference policy, for the KL term.
        mask: per token, bool or 0/1; every row if None.
        cu_seqlens: int32 or int64 offsets of packed rollouts, first 0, last N; empty rollouts are fine.
        polarity: +1, -1 or 0, per rollout or per token; the sign of the advantages if None.
        old_entropy: per token (nats), for rules on the old policy's entropy.
        min_p_logprobs: per token, min_p_token_logprobs of the old policy, for Lp-Reg; on-policy it is computed.
        importance_weights: per rollout or per token, constant factors of the surrogate (trainer/rollout mismatch).
        step: training step of the schedules, a number or a 0-d tensor.
        denominator: replaces what the aggregation divides by, a number or a 0-d tensor: e.g. the token (or rollout)
            count over all ranks and accumulation steps. Nothing is reduced over ranks here.
        max_length: of seq-mean-token-sum-norm; T if padded and not given.
        temperature, softcap, logit_scale, ignore_index, inplace_backward, validate, backend: as in token_logprobs.

    Returns:
        PolicyLossOutput(loss, logprobs, entropy, weights, metrics, route). metrics, each a 0-d device tensor: the means
        over tokens entropy, kl (to the reference; 0 without one), approx_kl (of old - current log-prob), ratio_mean;
        ratio_max; clip_fraction_low, clip_fraction_high, dual_clip_fraction, active_fraction (tokens with a non-zero
        gradient); selected_fraction_positive and _negative (of the tokens of that polarity, selected by a TokenRule);
        weight (the first TokenRule's scale at this step); token_count.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range, or one that the objective needs
            and did not get. Nothing is launched then.
        IndexError: a target outside the vocabulary, on the CPU or with `validate`.
    """
    check_objective(objective)
    check_rows(logits, targets, temperature, softcap, logit_scale)
    check_backend(backend, logits.device)
    expected = "[N, V] with cu_seqlens" if cu_seqlens is not None else "[B, T, V]"
    if logits.ndim != (3 if cu_seqlens is None else 2):
        hint = "; packed logits [N, V] need cu_seqlens" if cu_seqlens is None and logits.ndim == 2 else ""
        raise ValueError(f"logits must have shape {expected}; got {list(logits.shape)}{hint}")
    layout = token_layout("targets", targets, cu_seqlens, validate=validate)
    check_token_arguments(
        layout, objective, advantages, old_logprobs, ref_logprobs, polarity, old_entropy, min_p_logprobs,
        importance_weights, step, denominator, max_length,
    )  # fmt: skip
    if inplace_backward and logits.requires_grad:
        check_no_overlap(logits)

    keep = layout.flat_mask(mask)
    if keep is not None:
        targets = torch.where(keep.view(layout.shape), targets, ignore_index)
    check_targets(targets, logits.shape[-1], ignore_index, validate)
    tokens = (targets != ignore_index).reshape(-1)
    stats = token_logprobs_unchecked(
        logits, targets, temperature, softcap, logit_scale, ignore_index, inplace_backward, backend
    )
    if objective.low_probability is not None and min_p_logprobs is None:
        min_p_logprobs = min_p_token_logprobs(
            logits, targets, objective.low_probability.min_p, softcap=softcap, logit_scale=logit_scale,
            ignore_index=ignore_index, backend=backend,
        )  # fmt: skip
    flat = TokenStats(stats.logprobs.reshape(-1), stats.entropy.reshape(-1))
    batch = token_batch(
        layout, tokens, flat.logprobs.dtype, advantages, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        polarity=polarity, old_entropy=old_entropy, min_p_logprobs=min_p_logprobs,
        importance_weights=importance_weights,
    )  # fmt: skip
    shaped = shape(objective, batch, flat, step, backend)
    scale = loss_scale(objective, layout, tokens, shaped.weights, denominator, max_length)
    terms = token_terms(objective, batch, flat, shaped, scale, backend)
    route = "logits-inplace" if inplace_backward else "logits"
    return policy_output(layout, terms.loss, flat, shaped, terms.sums, tokens, route)


class PolicyLoss(nn.Module):
    """policy_loss as a module: the objective and the logit transform are fixed, the batch comes by call.

    Args: objective and the keywords temperature, softcap, logit_scale, ignore_index, inplace_backward, validate and
    backend of policy_loss. Call it as policy_loss(logits, targets, advantages, **the rest); a call may override them.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ignore_index: int = -100,
        inplace_backward: bool = False,
        validate: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        check_objective(objective)
        self.objective = objective
        self.options = {
            "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index,
            "inplace_backward": inplace_backward, "validate": validate, "backend": backend,
        }  # fmt: skip

    def forward(self, logits: Tensor, targets: Tensor, advantages: Tensor, **batch) -> PolicyLossOutput:
        return policy_loss(logits, targets, advantages, **{"objective": self.objective, **self.options, **batch})

    def extra_repr(self) -> str:
        return f"{self.objective}"
