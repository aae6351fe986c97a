"""logprob_policy_loss: log-probs that something else computed to loss, gradient and metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import check_backend
from ..core.checks import check_floating, check_tensor, compute_dtype
from ..core.layout import token_layout
from ..objectives import Objective, TokenRule
from ..ops.token_logprobs import TokenStats
from ..schedules import Value
from .stages import (
    PolicyLossOutput,
    check_objective,
    check_token_arguments,
    loss_scale,
    policy_output,
    reads_current,
    shape,
    token_batch,
    token_terms,
)


def logprob_policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    objective: Objective,
    entropy: Tensor | None = None,
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
    validate: bool = False,
    backend: str = "auto",
) -> PolicyLossOutput:
    """policy_loss from the current policy's log-probs on, for trainers that hand out nothing else.

    Args:
        logprobs: per token, [B, T], or [N] with cu_seqlens, of the tokens under the current policy (nats); the gradient
            goes here.
        entropy: per token (nats), of the current policy, differentiable; entropy_coef and rules on the current entropy
            want it. Without it metrics["entropy"] is NaN and the entropies of the output are 0.
        min_p_logprobs: for Lp-Reg, always.
        The rest: as in policy_loss.

    Returns:
        PolicyLossOutput as policy_loss gives; route is "logprobs".

    Raises:
        ValueError, TypeError: as policy_loss does, and where the objective wants an entropy that was not given.
    """
    check_objective(objective)
    check_tensor("logprobs", logprobs)
    check_floating("logprobs", logprobs)
    check_backend(backend, logprobs.device)
    layout = token_layout("logprobs", logprobs, cu_seqlens, validate=validate)
    check_token_arguments(
        layout, objective, advantages, old_logprobs, ref_logprobs, polarity, old_entropy, min_p_logprobs,
        importance_weights, step, denominator, max_length,
    )  # fmt: skip
    if entropy is not None:
        layout.check_per_token("entropy", entropy)
    if objective.low_probability is not None and min_p_logprobs is None:
        raise ValueError("Lp-Reg needs min_p_logprobs of the old policy, which log-probs alone do not give; got None")
    dtype = compute_dtype(logprobs.dtype)
    keep = layout.flat_mask(mask)
    tokens = torch.ones(layout.count, dtype=torch.bool, device=logprobs.device) if keep is None else keep

    def flat(values: Tensor) -> Tensor:
        # What rows without a token hold never matters, NaN included.
        return torch.where(tokens, values.reshape(-1).to(dtype), 0.0)

    known = flat(logprobs) if entropy is None else flat(entropy)
    stats = TokenStats(flat(logprobs), torch.zeros_like(known) if entropy is None else known)
    batch = token_batch(
        layout, tokens, dtype, advantages, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, polarity=polarity,
        old_entropy=old_entropy, min_p_logprobs=min_p_logprobs, importance_weights=importance_weights,
    )  # fmt: skip
    rules = [rule for rule in objective.shaping if isinstance(rule, TokenRule) and rule.metric == "entropy"]
    if entropy is None and (objective.entropy_coef or any(reads_current(rule, batch) for rule in rules)):
        raise ValueError("the objective reads the current policy's entropy, which was not given; got entropy = None")
    shaped = shape(objective, batch, stats, step, backend)
    scale = loss_scale(objective, layout, tokens, shaped.weights, denominator, max_length)
    terms = token_terms(objective, batch, stats, shaped, scale, backend)
    out = policy_output(layout, terms.loss, stats, shaped, terms.sums, tokens, "logprobs")
    if entropy is None:
        out.metrics["entropy"] = torch.full_like(out.metrics["entropy"], float("nan"))
    return out
