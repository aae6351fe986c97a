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
    """The loss of an objective on the current policy's log-probs, for trainers that hand out nothing else.

    A batch is padded, [B, T] with one rollout a row, or packed, [N] with cu_seqlens [S + 1]. "Per token" below is that
    shape. A row is a token where the mask is 1; what other rows hold never matters.

    Args:
        logprobs: [B, T], or [N] with cu_seqlens, of the tokens under the current policy (nats), floating point; the
            gradient goes here.
        advantages: per rollout [B] or [S], or per token; per rollout wins where both fit.
        objective: an Objective, from a preset (grpo(), dapo(), a3po(), ...) or composed; or a preset's name, with its
            defaults.
        entropy: per token (nats), of the current policy, differentiable; entropy_coef and rules on the current entropy
            want it. Without it metrics["entropy"] is NaN and the entropies of the output are 0.
        old_logprobs: per token, log-probs of the behaviour policy (nats); None is on-policy, with ratio exactly 1.
        ref_logprobs: per token, of the reference policy (nats), for the KL term.
        mask: per token, bool or 0/1; every row if None.
        cu_seqlens: int32 or int64 [S + 1] offsets of packed rollouts, first 0, last N; empty rollouts are fine.
        polarity: +1, -1 or 0, per rollout or per token; the sign of the advantages if None.
        old_entropy: per token (nats), for rules on the old policy's entropy.
        min_p_logprobs: per token (nats), for Lp-Reg, always: min_p_token_logprobs of the old policy.
        importance_weights: per rollout or per token, constant factors of the surrogate (trainer/rollout mismatch).
        scores: per-token tensors by name, for rules whose metric is one of the names.
        group: a torch.distributed group of data-parallel ranks, each token on one of them, over which rules of scope
            "global" select and `reduce_metrics` reduces; None is the default group (without torch.distributed: this
            process). With tensor parallelism it must be given where anything goes over it: the default group counts
            each token once per tensor-parallel rank, which is not seen from here. A group that nothing would be reduced
            over is a ValueError.
        reduce_metrics: whether metrics are those of the tokens of all ranks of `group` (and of cp_group), the same bits
            on each, without a host read; every rank must then make the same calls.
        cp_group: the context-parallel ranks, each of which holds some tokens of every rollout, [B, T / ranks] or packed
            with the cu_seqlens of its own tokens: the same rollouts in the same order, any of them empty on a rank.
            What is per rollout is given alike on all ranks; no token is gathered. The loss is this rank's part: parts,
            and the gradients of parameters that the ranks share, are to be summed over cp_group.
        positions: under cp_group, per token, int32 or int64: its place in its rollout, from 0; it decides ties. None:
            the ranks hold consecutive blocks of T of each rollout in the order of their numbers.
        step: training step of the schedules, a number or a 0-d tensor.
        denominator: replaces what the aggregation divides by, a number or a 0-d tensor, such as global_denominator's
            count over all ranks and accumulation steps. Nothing is reduced over ranks here.
        max_length: of seq-mean-token-sum-norm; T if padded and not given (times the ranks of cp_group).
        validate: on a GPU also check values, not only shapes, which waits for it. The CPU always checks.
        backend: "triton", "torch" or "auto" (Triton on a GPU it supports, else torch).

    Returns:
        PolicyLossOutput(loss, logprobs, entropy, weights, metrics, route), all per token but loss and metrics; route is
        "logprobs". metrics, 0-d device tensors: the means over tokens entropy, kl (to the reference), approx_kl (of old
        - current log-prob), ratio_mean; ratio_max; clip_fraction_low and _high, dual_clip_fraction, active_fraction
        (tokens with a gradient); selected_fraction_positive and _negative (of that polarity's tokens, by a TokenRule);
        weight (the first TokenRule's scale); kl_clamped_fraction; token_count.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range, or one that the objective needs
            and did not get.
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
