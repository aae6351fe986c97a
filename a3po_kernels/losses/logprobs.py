"""logprob_policy_loss: log-probs that something else computed to loss, gradient and metrics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..backends import check_backend
from ..core.autograd import refuse_tangents
from ..core.checks import check_floating, check_logprobs, check_tensor, compute_dtype
from ..core.layout import token_layout
from ..named_objectives import as_objective
from ..objectives import Objective
from ..ops.token_logprobs import TokenStats
from ..schedules import Value
from .batch import TokenArguments, TokenBatch
from .shaping import current_rules, shape
from .stages import PolicyLossOutput, loss_scale, policy_output, token_terms


def logprob_policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    objective: Objective | str,
    entropy: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    polarity: Tensor | None = None,
    old_entropy: Tensor | None = None,
    min_p_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    scores: Mapping[str, Tensor] | None = None,
    group: ProcessGroup | None = None,
    reduce_metrics: bool = False,
    cp_group: ProcessGroup | None = None,
    positions: Tensor | None = None,
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
        group: as in policy_loss, the data-parallel ranks. With tensor parallelism it must be given where anything goes
            over it: the default group counts each token once per tensor-parallel rank, which is not seen from here.
        The rest: as in policy_loss.

    Returns:
        PolicyLossOutput as policy_loss gives; route is "logprobs".

    Raises:
        ValueError, TypeError: as policy_loss does, and where the objective wants an entropy that was not given.
    """
    objective = as_objective(objective)
    check_tensor("logprobs", logprobs)
    check_floating("logprobs", logprobs)
    refuse_tangents(logprobs=logprobs, entropy=entropy)
    check_backend(backend, logprobs.device)
    layout = token_layout("logprobs", logprobs, cu_seqlens, validate=validate)
    if entropy is not None:
        layout.check_per_token("entropy", entropy)
    if objective.low_probability is not None and min_p_logprobs is None:
        raise ValueError("Lp-Reg needs min_p_logprobs of the old policy, which log-probs alone do not give; got None")
    given = TokenArguments(
        advantages, old_logprobs, ref_logprobs, mask, polarity, old_entropy, min_p_logprobs, importance_weights, step,
        denominator, max_length, scores, group, reduce_metrics, cp_group, positions,
    )  # fmt: skip
    dtype = compute_dtype(logprobs.dtype)
    layout.check_mask(mask, validate)
    check_logprobs("logprobs", logprobs, None if mask is None else mask != 0, validate)
    batch = TokenBatch.read(layout, objective, given, dtype, backend, validate=validate)
    current = current_rules(objective, batch)
    if entropy is None and (objective.entropy_coef or any(rule.metric == "entropy" for rule in current)):
        raise ValueError("the objective reads the current policy's entropy, which was not given; got entropy = None")

    def flat(values: Tensor) -> Tensor:
        # What rows without a token hold never matters, NaN included.
        return torch.where(batch.tokens, values.reshape(-1).to(dtype), 0.0)

    logp = flat(logprobs)
    stats = TokenStats(logp, torch.zeros_like(logp) if entropy is None else flat(entropy))
    shaped = shape(objective, batch, stats, backend, has_entropy=entropy is not None)
    scale = loss_scale(objective, batch, shaped.weights, backend)
    terms = token_terms(objective, batch, stats, shaped, scale, backend, has_entropy=entropy is not None)
    out = policy_output(batch, terms.loss, stats, shaped.weights, terms.metrics, "logprobs")
    if entropy is None:
        out.metrics["entropy"] = torch.full_like(out.metrics["entropy"], float("nan"))
    return out
