"""policy_loss: logits to loss, gradient and metrics of any objective. The one place that joins the stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..core.checks import as_rows, check_word, compute_dtype
from ..core.layout import token_layout
from ..core.operators import runs_plainly
from ..core.transform import Transform
from ..named_objectives import as_objective
from ..objectives import Objective
from ..ops.min_p import min_p_rows_of
from ..ops.one_launch import one_launch, prefers_one_launch, with_gradient
from ..ops.token_logprobs import TokenStats, check_no_overlap, read_logits_shard, token_statistics
from ..parallel.agreement import check_agreement
from ..parallel.vocabulary import Shard, Split
from ..schedules import Value
from .batch import TokenArguments, TokenBatch
from .shaping import current_rules, shape
from .stages import (
    PolicyLossOutput,
    loss_scale,
    policy_inputs,
    policy_output,
    surrogate_form,
    token_terms,
    why_not_beside,
)

ROUTES = ("auto", "one-launch", "two-stage")


def _why_two_stages(
    objective: Objective, batch: TokenBatch, logits: Tensor, columns: int, shard: Shard | None
) -> str | None:
    """Why a token's gradient cannot be formed beside its statistics; None where it can."""
    if shard is not None:
        return "a row's statistics are the ranks' together"
    if columns < logits.shape[-1]:
        return "vocab_size leaves columns of the logits out"
    obstacle = why_not_beside(objective)
    if obstacle is not None:
        return obstacle
    if current_rules(objective, batch):
        return "a rule selects by the current policy (old_logprobs or old_entropy would let it select before)"
    if logits.dtype == torch.float16:
        # Divided by the denominator and not yet multiplied by a loss scaler's factor, it would underflow.
        return "an fp16 gradient must wait for the factor of the loss scaler"
    if not runs_plainly(logits):
        return "what is compiled, traced or transformed forms the gradient in backward"
    return None


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    objective: Objective | str,
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
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    tp_group: Any = None,
    vocab_start: int | tuple[int, int] | None = None,
    vocab_size: int | None = None,
    validate: bool = False,
    backend: str = "auto",
    route: str = "auto",
) -> PolicyLossOutput:
    """The loss of an objective on logits, its gradient by backward, per-token statistics and metrics.

    A batch is padded, logits [B, T, V] with one rollout a row, or packed, logits [N, V] with cu_seqlens [S + 1]. "Per
    token" below is [B, T] or [N]. A row is a token where the mask is 1 and its target is not `ignore_index`; what other
    rows hold never matters. All statistics are fp32, or fp64 for fp64 logits.

    Args:
        logits: fp16, bf16, fp32 or fp64, any strides; or a DTensor: Shard(-1) over one dimension of its mesh gives
            tp_group, vocab_start and vocab_size, over others it is Replicate or a Shard of its rows, and all else is
            this rank's.
        targets: per token, int32 or int64, already shifted: row i of the logits predicts targets[i].
        advantages: per rollout [B] or [S], or per token; per rollout wins where both fit.
        objective: an Objective, from a preset (grpo(), dapo(), a3po(), ...) or composed; or a preset's name
            ("a3po", any key of `presets`), with its defaults.
        old_logprobs: per token, log-probs of the behaviour policy (nats); None is on-policy, with ratio exactly 1.
        ref_logprobs: per token, of the reference policy, for the KL term.
        mask: per token, bool or 0/1; every row if None.
        cu_seqlens: int32 or int64 offsets of packed rollouts, first 0, last N; empty rollouts are fine.
        polarity: +1, -1 or 0, per rollout or per token; the sign of the advantages if None.
        old_entropy: per token (nats), for rules on the old policy's entropy.
        min_p_logprobs: per token, min_p_token_logprobs of the old policy, for Lp-Reg; on-policy it is computed.
        importance_weights: per rollout or per token, constant factors of the surrogate (trainer/rollout mismatch).
        scores: per-token tensors by name, for rules whose metric is one of the names.
        group: a torch.distributed group of data-parallel ranks, each token on one of them, over which rules of scope
            "global" select and `reduce_metrics` reduces; None is the default group (without torch.distributed: this
            process). A group that nothing would be reduced over is a ValueError.
        reduce_metrics: whether metrics are those of the tokens of all ranks of `group`, the same bits on each: one
            gathering of 18 numbers, with no host read. Every rank must then make the same calls. Under cp_group they
            are of the ranks of both; a group that does not hold those of cp_group takes two gatherings.
        cp_group: the context-parallel ranks, each of which holds some tokens of every rollout, [B, T / ranks] or packed
            with the cu_seqlens of its own tokens: the same rollouts in the same order, any of them empty on a rank.
            What is per rollout is given alike on all ranks. Counts, ratios and selections of whole rollouts (and of
            the batch) then go over the ranks, as sums of [S] numbers and [S, 256] counts; no token is gathered. The
            loss is this rank's part: parts, and the gradients of parameters that the ranks share, are to be summed over
            cp_group. Metrics and the other outputs are of the tokens here. A rollout-wide ratio takes PyTorch on N
            numbers between the kernels.
        positions: under cp_group, per token, int32 or int64: its place in its rollout, from 0, in any order; it
            decides ties. None: the ranks hold consecutive blocks of T of each rollout in the order of their numbers;
            packed rollouts need positions where an order matters. Where they are given, T may differ between ranks.
        step: training step of the schedules, a number or a 0-d tensor.
        denominator: replaces what the aggregation divides by, a number or a 0-d tensor: e.g. the token (or rollout)
            count over all ranks and accumulation steps, see global_denominator. Nothing is reduced over ranks here.
        max_length: of seq-mean-token-sum-norm; T if padded and not given (times the ranks of cp_group).
        temperature: what the logits are divided by: a number, a 0-d tensor, or one per token.
        softcap: bound of a tanh softcap of the logits, before the temperature; None: none.
        logit_scale: multiplies the logits before the softcap.
        ignore_index: a row with this target is no token.
        inplace_backward: lets backward write the gradient over the logits, which are spoilt then; it saves a tensor of
            their size.
        tp_group: a torch.distributed group whose ranks share the vocabulary: logits are this rank's columns of it,
            targets are global numbers, and every rank gets the same statistics and the gradient of its own columns.
        vocab_start: the global number of the first column, or (first, stop) where the columns from stop on are padding;
            by default the ranks hold equal parts in rank order.
        vocab_size: the true vocabulary where logits have more columns (padding); those take no part in the softmax.
        validate: on a GPU also check values, not only shapes, which waits for it. The CPU always checks. Over the ranks
            of tp_group one small collective first finds out whether they make the same call.
        backend: "triton", "torch" or "auto" (Triton on a GPU it supports, else torch).
        route: "one-launch" takes a row's statistics, its coefficient and its gradient while the row is in the cache:
            one pass over memory less. It needs weights, divisor and ratio that are known from the token alone, and not
            fp16 logits. The gradient is then formed in forward (with `inplace_backward` over the
            logits), and backward, which runs once, multiplies it by the incoming gradient where that is not 1: one more
            pass, which scaling by `denominator` instead of by a factor on the loss saves. "two-stage" forms it in
            backward. "auto": one-launch where it is possible and measured to be faster.

    Returns:
        PolicyLossOutput(loss, logprobs, entropy, weights, metrics, route); route is "one-launch", "two-stage", or
        "statistics" where the logits require no gradient. metrics, each a 0-d device tensor: the means
        over tokens entropy, kl (to the reference; 0 without one), approx_kl (of old - current log-prob), ratio_mean;
        ratio_max; clip_fraction_low, clip_fraction_high, dual_clip_fraction, active_fraction (tokens with a non-zero
        gradient); selected_fraction_positive and _negative (of the tokens of that polarity, selected by a TokenRule);
        weight (the first TokenRule's scale at this step); kl_clamped_fraction (tokens at kl_clamp); token_count.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range, or one that the objective needs
            and did not get. Nothing is launched then.
        IndexError: a target outside the vocabulary, on the CPU or with `validate`.
    """
    if validate and tp_group is not None:
        check_agreement(tp_group, locals())
    objective = as_objective(objective)
    split = Split(tp_group, vocab_start)
    logits, columns, shard, vocabulary = read_logits_shard(
        logits, targets, temperature, softcap, logit_scale, split, vocab_size, backend, inplace_backward
    )
    expected = "[N, V] with cu_seqlens" if cu_seqlens is not None else "[B, T, V]"
    if logits.ndim != (3 if cu_seqlens is None else 2):
        hint = "; packed logits [N, V] need cu_seqlens" if cu_seqlens is None and logits.ndim == 2 else ""
        raise ValueError(f"logits must have shape {expected}; got {list(logits.shape)}{hint}")
    check_word("route", route, ROUTES)
    transform = Transform.of(temperature, softcap, logit_scale, ignore_index)
    layout = token_layout("targets", targets, cu_seqlens, validate=validate)
    wanted = torch.is_grad_enabled() and logits.requires_grad
    if inplace_backward and wanted:
        check_no_overlap(logits)
    given = TokenArguments(
        advantages, old_logprobs, ref_logprobs, mask, polarity, old_entropy, min_p_logprobs, importance_weights, step,
        denominator, max_length, scores, group, reduce_metrics, cp_group, positions,
        shard,
    )  # fmt: skip
    batch = TokenBatch.read(
        layout, objective, given, compute_dtype(logits.dtype), backend, targets=targets, vocabulary=vocabulary,
        ignore_index=ignore_index, temperature=temperature, validate=validate,
    )  # fmt: skip
    assert batch.targets is not None
    flat_targets = batch.targets
    rows = as_rows(logits)
    obstacle = _why_two_stages(objective, batch, logits, columns, shard)
    if route == "one-launch" and obstacle is not None:
        raise ValueError(f"route='one-launch' is not possible here: {obstacle}")
    together = route == "one-launch" or (route == "auto" and obstacle is None and prefers_one_launch(rows, backend))
    if wanted and together:
        with torch.no_grad():
            shaped = shape(objective, batch, None, backend)
            scale = loss_scale(objective, batch, shaped.weights, backend)
            inputs, form = policy_inputs(objective, batch, shaped, scale), surrogate_form(objective)
        found: list[Any] = []

        def compute() -> tuple[Tensor, Tensor]:
            (logp, entropy, *_), gradient = one_launch(
                rows, flat_targets, transform, inputs, form, inplace_backward, backend
            )
            stats = TokenStats(logp, entropy)
            terms = token_terms(objective, batch, stats, shaped, scale, backend)
            found.extend([stats, terms.metrics])
            return terms.loss, gradient

        loss = with_gradient(logits, compute, backend)
        stats, metrics = found
        return policy_output(batch, loss, stats, shaped.weights, metrics, "one-launch")

    stats = token_statistics(rows, flat_targets, transform, columns, inplace_backward, backend, shard)
    if objective.low_probability is not None and min_p_logprobs is None:
        kappa = objective.low_probability.min_p
        proxy = min_p_rows_of(rows[..., :columns], flat_targets, kappa, transform, backend, shard)
        batch = replace(batch, proxy=proxy)
    shaped = shape(objective, batch, stats, backend)
    scale = loss_scale(objective, batch, shaped.weights, backend)
    terms = token_terms(objective, batch, stats, shaped, scale, backend)
    taken = "two-stage" if wanted else "statistics"
    return policy_output(batch, terms.loss, stats, shaped.weights, terms.metrics, taken)


class PolicyLoss(nn.Module):
    """policy_loss as a module: the objective and the logit transform are fixed, the batch comes by call.

    Call it as policy_loss(logits, targets, advantages, **the rest); a call may override the keywords given here.

    Args:
        objective: an Objective, from a preset (grpo(), dapo(), a3po(), ...) or composed; or a preset's name.
        temperature: what the logits are divided by: a number, a 0-d tensor, or one per token.
        softcap: bound of a tanh softcap of the logits, before the temperature; None: none.
        logit_scale: multiplies the logits before the softcap.
        ignore_index: a row with this target is no token.
        inplace_backward: lets backward write the gradient over the logits.
        tp_group, vocab_start, vocab_size: the ranks that share the vocabulary, the global number of this one's first
            column, and the true vocabulary where logits have more columns.
        validate: on a GPU also check values, which waits for it.
        backend: "triton", "torch" or "auto".
        route: "auto", "one-launch" or "two-stage".

    Raises:
        TypeError, ValueError: objective or route is none. What else is wrong is found by the call.
    """

    def __init__(
        self,
        objective: Objective | str,
        *,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ignore_index: int = -100,
        inplace_backward: bool = False,
        tp_group: Any = None,
        vocab_start: int | tuple[int, int] | None = None,
        vocab_size: int | None = None,
        validate: bool = False,
        backend: str = "auto",
        route: str = "auto",
    ):
        super().__init__()
        check_word("route", route, ROUTES)
        self.objective = as_objective(objective)
        self.options = {
            "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index,
            "inplace_backward": inplace_backward, "tp_group": tp_group, "vocab_start": vocab_start,
            "vocab_size": vocab_size, "validate": validate, "backend": backend, "route": route,
        }  # fmt: skip

    def forward(self, logits: Tensor, targets: Tensor, advantages: Tensor, **batch) -> PolicyLossOutput:
        return policy_loss(logits, targets, advantages, **{"objective": self.objective, **self.options, **batch})

    def extra_repr(self) -> str:
        return f"{self.objective}"
