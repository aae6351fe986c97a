"""What a whole step's loss is divided by, over ranks and micro-batches, before any of it is computed."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..core.checks import check_positive, check_tensor
from ..core.layout import TokenLayout, token_layout
from ..core.segments import segment_sum
from ..named_objectives import as_objective
from ..objectives import Objective, PolarityWeights, TokenRule
from ..parallel.groups import check_all_or_one, check_group, group_rank, group_size, holds, total, total_over
from .batch import check_polarity


def global_denominator(
    objective: Objective | str,
    mask: Tensor | None = None,
    advantages: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    polarity: Tensor | None = None,
    max_length: float | None = None,
    group: ProcessGroup | None = None,
    cp_group: ProcessGroup | None = None,
    accumulation: int = 1,
    average_over_ranks: bool = False,
) -> Tensor:
    """What to give as `denominator` so that losses summed over ranks and micro-batches are that of the whole batch.

    A loss divides by its own micro-batch's tokens or rollouts, and the mean of such means is not the mean over the
    batch: a token of a short micro-batch counts for more. One count for all of a step's micro-batches, before them:

        count = global_denominator(objective, step_mask, step_advantages, accumulation=1, average_over_ranks=True)
        for i, micro in enumerate(micro_batches):       # step_mask: of all of them, padded to one length or packed
            with contextlib.nullcontext() if i + 1 == len(micro_batches) else model.no_sync():
                out = policy_loss(model(micro.ids), ..., mask=micro.mask, objective=objective, denominator=count)
                out.loss.backward()                     # DistributedDataParallel averages the gradients over its ranks

    Args:
        objective: the losses' Objective, or a preset's name; its aggregation says what is counted: tokens (token-mean),
            rollouts with a token (seq-mean-token-sum, seq-mean-token-mean), or rollouts times max_length
            (seq-mean-token-sum-norm).
            With normalize_over "selected", of the tokens that PolarityWeights keep.
        mask: the tokens of all of this rank's micro-batches, [B, T], or [N] with cu_seqlens; bool or 0/1, and 0 where
            a target is ignore_index. None: every row of the advantages [B, T], or of cu_seqlens, is a token.
        advantages, polarity: of the same rollouts, per rollout [B] or [S] or per token; read for normalize_over
            "selected" alone, by the polarity's sign, or the advantages' if there is none.
        cu_seqlens: int32 or int64 [S + 1] offsets of packed rollouts, first 0, last N.
        max_length: of seq-mean-token-sum-norm, always; the same as the losses'.
        group: the ranks that the losses are summed over, each token of the step on one of them; None is the default
            group (without torch.distributed: this process). With tensor parallelism it must be the data-parallel ranks:
            the default group counts each token once per tensor-parallel rank, which is not seen from here.
        cp_group: the ranks that hold the tokens of the same rollouts, in the same order, as in the losses.
        accumulation: the number of micro-batches, where the trainer divides each one's loss by it.
        average_over_ranks: whether the gradients are averaged over the ranks of `group`, as DistributedDataParallel and
            FSDP do, rather than summed. Where they average over those of a cp_group too, a group that holds both is it.

    Returns:
        0-d fp64 on the arguments' device: the count / accumulation (/ the ranks of group). One all_reduce over `group`,
        one before it over a cp_group that lies outside of group, or for rollouts; none of a group of one. No host read.
        0 where no rank has a token: the losses are then 0.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range; a divisor that is known only from the
            statistics: tokens that a TokenRule or a schedule may drop under normalize_over "selected".
    """
    objective = as_objective(objective)
    check_group("group", group)
    check_group("cp_group", cp_group)
    if isinstance(accumulation, bool) or not isinstance(accumulation, numbers.Integral):
        raise TypeError(f"accumulation must be an int; got {type(accumulation).__name__}")
    if accumulation < 1:
        raise ValueError(f"accumulation must be at least 1; got {accumulation}")
    lengths = objective.aggregation == "seq-mean-token-sum-norm"
    if max_length is not None:
        check_positive("max_length", max_length)
        if not lengths:
            raise ValueError(f"max_length is of seq-mean-token-sum-norm; got it with {objective.aggregation!r}")
    if lengths:
        if max_length is None:
            raise ValueError("aggregation 'seq-mean-token-sum-norm' needs max_length, which all ranks divide by")
        layout = _layout(mask, advantages, polarity, cu_seqlens)[0]
        count = torch.full((), layout.rollouts * float(max_length), dtype=torch.float64, device=layout.offsets.device)
        found = _over_ranks(count, True, group, cp_group)
    else:
        layout, tokens = _layout(mask, advantages, polarity, cu_seqlens)
        counts = _counts(objective, layout, tokens, advantages, polarity)
        if objective.aggregation == "token-mean":
            found = _over_ranks(counts.sum(), False, group, cp_group)
        else:
            everywhere = counts if cp_group is None else total(counts, cp_group)
            found = _over_ranks((everywhere > 0).sum().double(), True, group, cp_group)
    return found / (accumulation * (group_size(group) if average_over_ranks else 1))


def _layout(mask: Any, advantages: Any, polarity: Any, cu_seqlens: Any) -> tuple[TokenLayout, Tensor | None]:
    """The layout of the step's tokens, and which rows are tokens, [N] bool; None: all of them."""
    layout, tokens = _read_layout(mask, advantages, cu_seqlens)
    for name, values in (("advantages", advantages), ("polarity", polarity)):
        if values is None:
            continue
        if layout.shape == (-1,):
            check_tensor(name, values, (layout.rollouts,), device=layout.offsets.device)
        else:
            layout.check_per_rollout(name, values)
    if polarity is not None:
        check_polarity(polarity)
    return layout, tokens


def _read_layout(mask: Any, advantages: Any, cu_seqlens: Any) -> tuple[TokenLayout, Tensor | None]:
    if mask is not None:
        check_tensor("mask", mask)
        layout = token_layout("mask", mask, cu_seqlens, validate=False)
        return layout, layout.flat_mask(mask, False)
    if advantages is not None:
        check_tensor("advantages", advantages)
        if cu_seqlens is None and advantages.ndim == 2:
            return token_layout("advantages", advantages, None, validate=False), None
    if cu_seqlens is None:
        raise ValueError("mask must be given, unless cu_seqlens or advantages of shape [B, T] say where tokens are")
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape [S + 1]; got {list(cu_seqlens.shape)}")
    if advantages is not None and tuple(advantages.shape) != (cu_seqlens.shape[0] - 1,):
        return token_layout("advantages", advantages, cu_seqlens, validate=False), None
    # How many rows there are is on the device: the offsets say it.
    return TokenLayout((-1,), cu_seqlens.long(), padded=False), None


def _counts(
    objective: Objective, layout: TokenLayout, tokens: Tensor | None, advantages: Any, polarity: Any
) -> Tensor:
    """[S] fp64: the tokens of each rollout that the aggregation counts."""
    each = layout.offsets.diff().double() if tokens is None else segment_sum(tokens.double(), layout.offsets)
    if objective.normalize_over != "selected":
        return each
    kept = _kept(objective, advantages, polarity)
    if kept is None:
        return each
    if layout.is_per_rollout(kept):
        return torch.where(kept, each, 0.0)
    flat = kept.reshape(-1)
    return segment_sum((flat if tokens is None else flat & tokens).double(), layout.offsets)


def _kept(objective: Objective, advantages: Any, polarity: Any) -> Tensor | None:
    """Bool, per rollout or per token: which PolarityWeights keep; None: all. A ValueError where that is not known."""
    kept = None
    for rule in objective.shaping:
        if isinstance(rule, TokenRule):
            if rule.rest_scale == 0 or rule.selected_scale == 0 or callable(rule.selected_scale):
                what = "a TokenRule of scale 0" if not callable(rule.selected_scale) else "a TokenRule's schedule"
                raise ValueError(
                    f"normalize_over='selected' with {what}: how many tokens each call keeps is known from its own "
                    "batch and statistics alone; count out.weights != 0 of a first pass, or normalize_over='all'"
                )
            continue
        kept = _kept_by(rule, advantages, polarity, kept)
    return kept


def _kept_by(rule: PolarityWeights, advantages: Any, polarity: Any, kept: Tensor | None) -> Tensor | None:
    if rule.scheduled:
        raise ValueError(
            "normalize_over='selected' with PolarityWeights of a schedule, which may drop tokens at some steps: give "
            "the numbers of this step"
        )
    if 0 not in (rule.positive, rule.negative, rule.zero):
        return kept
    values = advantages if polarity is None else polarity
    if values is None:
        raise ValueError("normalize_over='selected' and weights by polarity need advantages or polarity; got neither")
    values = values.detach()
    for factor, where in ((rule.positive, values > 0), (rule.negative, values < 0), (rule.zero, values == 0)):
        if factor == 0:
            kept = ~where if kept is None else kept & ~where
    return kept


def _over_ranks(count: Tensor, shared: bool, group: Any, cp_group: Any) -> Tensor:
    """A count of this rank's, over the ranks of both groups; shared: each rank of the cp_group has counted the same."""
    if cp_group is None or group_size(cp_group) == 1:
        return total(count, group)
    check_all_or_one(group, cp_group)
    if not shared:
        return total_over(count, group, cp_group)
    if not holds(group, cp_group):
        return total(count, group)
    # Of the ranks that have counted the same, one gives it.
    return total(torch.zeros_like(count) if group_rank(cp_group) else count, group)
