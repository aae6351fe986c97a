"""linear_policy_loss: hidden states and the head's weight to loss and gradient; the logits never exist whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..core.checks import check_word, compute_dtype
from ..core.layout import token_layout
from ..core.operators import reads_values, runs_plainly, without_autocast
from ..core.tiles import default_chunk_bytes
from ..core.transform import Transform
from ..named_objectives import as_objective
from ..objectives import Objective
from ..ops.head_arguments import EVERY, EXACT, GIVEN, Lora, check_head_rows, read_compaction, read_head
from ..ops.linear_min_p import linear_min_p_unchecked
from ..ops.linear_token_logprobs import head_statistics_unchecked
from ..parallel.agreement import check_agreement
from ..parallel.vocabulary import Split
from ..schedules import Value
from .batch import TokenArguments, TokenBatch
from .one_pass import attach, one_pass, plan_chunks
from .rows import RowPlan, check_plan, dependence, find_rows, may_move, spread, spread_over_ranks
from .shaping import current_rules, shape
from .stages import PolicyLossOutput, loss_scale, policy_output, token_terms

ROUTES = ("auto", "one-pass", "recompute")
STATISTICS = ("all", "active")


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    objective: Objective | str,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    lora: Lora | None = None,
    main_grad: Tensor | None = None,
    max_chunk_bytes: int | None = None,
    route: str = "auto",
    compaction: str | int = "auto",
    statistics: str = "all",
    head_dtype: torch.dtype | None = None,
    plan: RowPlan | None = None,
    tp_group: Any = None,
    vocab_start: int | tuple[int, int] | None = None,
    hidden_layout: str = "replicated",
    grad_hidden: str | None = None,
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
    validate: bool = False,
    backend: str = "auto",
) -> PolicyLossOutput:
    """The loss of an objective on the logits hidden @ weight.T + bias, which never exist as a whole, and its gradient.

    A batch is padded, hidden [B, T, H] with one rollout a row, or packed, hidden [N, H] with cu_seqlens [S + 1]. "Per
    token" below is [B, T] or [N]. A row is a token where the mask is 1 and its target is not `ignore_index`; what other
    rows hold never matters. All statistics are fp32, or fp64 for an fp64 head.

    Args:
        hidden: [B, T, H], or [N, H] with cu_seqlens, fp16, bf16, fp32 or fp64; row i predicts targets[i]. It and weight
            may be DTensors, the rest may not; what the loss is then of is this rank's rows.
        weight: [V, H]; frozen or tied weights need nothing special. Its gradient is in its own dtype, or in fp32 where
            `weight.grad_dtype` says so. A DTensor that is Shard(0) over one dimension of its mesh gives tp_group,
            vocab_start and vocab_size.
        targets: per token, int32 or int64, already shifted.
        advantages: per rollout [B] or [S], or per token; per rollout wins where both fit.
        objective: an Objective, from a preset (grpo(), dapo(), a3po(), ...) or composed; or a preset's name, with its
            defaults.
        bias: [V].
        vocab_size: the true vocabulary where weight has more rows (padding); those take no part in the softmax.
        lora: (A [r, H], B [V, r], scale) of an adapter: the logits of weight + scale * B @ A, which is not formed.
        main_grad: fp32 [V, H], to which backward adds the weight's gradient; weight.grad then stays as it is.
        max_chunk_bytes: budget of the tile of logits that exists at a time; in one pass by default 1/32 of a GPU's
            memory, halved while that is more than half of what is free (not of a split head, whose ranks must cut the
            rows alike: on unequal cards give it); else 1/128, between 64 MiB and 1 GiB; 64 MiB on the CPU. More chunks
            are slower, hold less, and sum the weight's gradient in another order.
        route: "one-pass" forms the logits of a chunk of rows once, with their gradient in place; it needs all that a
            token's coefficients depend on in one chunk: nothing but the token, or whole rollouts (a rollout-wide ratio,
            a selection by the current policy), or the batch. Its gradient is scaled by the incoming one in backward,
            which therefore runs once. "recompute" takes the statistics first and forms the logits of the rows that
            have a gradient again in backward. "auto": one-pass where it is possible, else recompute; a number of
            rows as compaction takes recompute, and so does what needs whole rollouts under cp_group.
        compaction: "exact" leaves out rows without a gradient (and masked ones), for which a GPU waits unless a plan is
            given; "none" computes every row; "auto" is "exact", but "none" under torch.compile and while a CUDA graph
            is captured. A number n lets backward multiply n rows on a GPU, without waiting; if more have a gradient,
            every gradient is NaN rather than wrong. On the CPU a number is "exact".
        statistics: "all" tokens, or "active": only those that may have a gradient, or that one with a gradient
            depends on; the others never meet the weight. Their log-probs and entropy are 0, and the metrics are means
            over the computed tokens (token_count and active_fraction are of all of them). With a number of rows as
            compaction these must fit as well, else everything is NaN.
        head_dtype: of the products and of the logits; by default autocast's, else the wider of hidden's and weight's.
        plan: plan_rows' of this batch. On a GPU the number of rows to multiply is then known ahead; without one (and
            with compaction "auto" or "exact") the call waits for it once, before its first product.
        tp_group: a torch.distributed group whose ranks share the vocabulary: weight, bias and lora's B are this rank's
            rows of it, targets are global numbers, and all else is equal on all ranks. In one pass every chunk's
            statistics are gathered while the next one's logits are formed.
        vocab_start: the global number of weight's first row, or (first, stop) where the rows from stop on are padding;
            by default the ranks hold equal parts in rank order.
        hidden_layout: "replicated", or "sequence_sharded": hidden has this rank's part of the rows, in rank order.
        grad_hidden: what becomes of each rank's part of dHidden: "all_reduce", summed on every rank (the default);
            "reduce_scatter", at the rows that "sequence_sharded" gives this rank (the default there); "partial", left
            for the caller to sum.
        old_logprobs: per token, log-probs of the behaviour policy (nats); None is on-policy, with ratio exactly 1.
        ref_logprobs: per token, of the reference policy (nats), for the KL term.
        mask: per token, bool or 0/1; every row if None.
        cu_seqlens: int32 or int64 [S + 1] offsets of packed rollouts, first 0, last N; empty rollouts are fine.
        polarity: +1, -1 or 0, per rollout or per token; the sign of the advantages if None.
        old_entropy: per token (nats), for rules on the old policy's entropy.
        min_p_logprobs: per token, of the old policy, for Lp-Reg, by min_p_token_logprobs; on-policy it is computed.
        importance_weights: per rollout or per token, constant factors of the surrogate (trainer/rollout mismatch).
        scores: per-token tensors by name, for rules whose metric is one of the names.
        group: a torch.distributed group of data-parallel ranks, each token on one of them, over which rules of scope
            "global" select and `reduce_metrics` reduces; None is the default group (without torch.distributed: this
            process). A group that nothing would be reduced over is a ValueError.
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
        temperature: what the logits are divided by: a number, a 0-d tensor, or one per token.
        softcap: bound of a tanh softcap of the logits, before the temperature; None: none.
        logit_scale: multiplies the logits before the softcap.
        ignore_index: a row with this target is no token.
        validate: on a GPU also check values, not only shapes, which waits for it. The CPU always checks. Over the ranks
            of tp_group one small collective first finds out whether they make the same call.
        backend: "triton", "torch" or "auto" (Triton on a GPU it supports, else torch).

    Returns:
        PolicyLossOutput(loss, logprobs, entropy, weights, metrics, route); route is "one-pass", "recompute", or
        "statistics" where nothing requires a gradient. metrics, 0-d device tensors: the means over tokens entropy, kl
        (to the reference), approx_kl (of old - current log-prob), ratio_mean; ratio_max; clip_fraction_low and _high,
        dual_clip_fraction, active_fraction (tokens with a gradient); selected_fraction_positive and _negative (of that
        polarity's tokens, by a TokenRule); weight (the first TokenRule's scale); kl_clamped_fraction; token_count.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range, or one that the objective needs
            and did not get. Nothing is launched then.
        ValueError: route="one-pass" where a chunk cannot hold what it must.
        IndexError: a target outside the vocabulary, on the CPU or with `validate`.
        RuntimeError: on a double backward; on a second backward of the one-pass route.
    """
    if validate and tp_group is not None:
        check_agreement(tp_group, locals())
    objective = as_objective(objective)
    split = Split(tp_group, vocab_start, hidden_layout, grad_hidden)
    head, shape_of_rows = read_head(hidden, weight, bias, lora, vocab_size, main_grad, head_dtype, split)
    if len(shape_of_rows) != (2 if cu_seqlens is None else 1):
        expected = "[N, H] with cu_seqlens" if cu_seqlens is not None else "[B, T, H]"
        hint = "; packed hidden states [N, H] need cu_seqlens" if cu_seqlens is None and hidden.ndim == 2 else ""
        raise ValueError(f"hidden must have shape {expected}; got {list(hidden.shape)}{hint}")
    check_head_rows(
        head, targets, shape_of_rows, temperature, softcap, logit_scale, max_chunk_bytes, compaction, backend
    )
    check_word("route", route, ROUTES)
    check_word("statistics", statistics, STATISTICS)
    transform = Transform.of(temperature, softcap, logit_scale, ignore_index)
    layout = token_layout("targets", targets, cu_seqlens, validate=validate)
    given = TokenArguments(
        advantages, old_logprobs, ref_logprobs, mask, polarity, old_entropy, min_p_logprobs, importance_weights, step,
        denominator, max_length, scores, group, reduce_metrics, cp_group, positions,
        head.shard,
    )  # fmt: skip
    batch = TokenBatch.read(
        layout, objective, given, compute_dtype(head.dtype), backend, targets=targets, vocabulary=head.total,
        ignore_index=ignore_index, temperature=temperature, validate=validate,
    )  # fmt: skip
    assert batch.targets is not None
    flat_targets = batch.targets
    chosen = read_compaction(compaction, head.hidden, backend)
    if chosen > 0 and route == "one-pass":
        raise ValueError("route='one-pass' takes compaction 'exact' or 'none'; a number of rows needs 'recompute'")
    plain = runs_plainly(head.hidden)
    if route == "one-pass" and not plain:
        raise ValueError("route='one-pass' is not possible in what is compiled or traced; 'auto' takes 'recompute'")
    if plan is not None and (chosen > 0 or compaction == "none"):
        raise ValueError(f"plan says which rows are multiplied, and so does compaction = {compaction!r}; give one")

    tokens = batch.tokens
    current = current_rules(objective, batch)
    unit = dependence(objective, current)
    context = batch.ranks.context
    whole = context is None or unit == "token"
    if route == "one-pass" and not whole:
        raise ValueError(
            f"route='one-pass' is not possible here: a token's gradient needs its whole {unit}, which cp_group spreads "
            "over ranks, so all statistics come first"
        )
    if plan is not None:
        check_plan(plan, layout, hidden.device, objective, unit)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in head.parameters)
    shaped = None if current else shape(objective, batch, None, backend)
    possible = may_move(objective, tokens, batch.advantages, batch.polarity)
    if shaped is not None:
        possible = possible & (shaped.weights != 0)
    if context is None:
        mine = spread(possible, tokens, batch.offsets, unit)
    else:
        mine = spread_over_ranks(possible, tokens, batch.offsets, unit, context)
    computed = tokens if statistics == "all" else mine
    left_out: Tensor | None = None
    if plan is None and plain and chosen <= 0:
        if chosen == EXACT and any(wanted):
            plan = find_rows(mine, computed & ~mine, layout, objective, unit, True)
        elif chosen == EVERY:
            plan = _every_row(batch, unit, objective)
    elif plan is not None:
        left_out = _left_out(plan, batch, mine, computed, validate)
        if statistics == "active":
            plan = replace(plan, rest=None)
            computed = mine & plan.planned
    max_bytes = max_chunk_bytes or default_chunk_bytes(hidden.device)
    if objective.low_probability is not None and min_p_logprobs is None:
        candidates = torch.where(batch.advantages < 0, flat_targets, ignore_index)
        kappa = objective.low_probability.min_p
        mode = EXACT if chosen == EXACT and hidden.device.type == "cpu" else EVERY
        proxy = linear_min_p_unchecked(head, candidates, kappa, transform, max_bytes, mode, backend)
        batch = replace(batch, proxy=proxy)
    counted = None if shaped is None else shaped.weights  # also a token whose statistics nobody needs is divided by
    if statistics == "active":
        flat_targets = torch.where(computed, flat_targets, ignore_index)
        # What is not computed leaves the objective, as a token that shaping drops.
        batch = replace(batch, targets=flat_targets, weights=batch.weights * computed)
        shaped = None if shaped is None else shaped._replace(weights=shaped.weights * computed)

    def scale_of(weights: Tensor) -> Tensor:
        scale = loss_scale(objective, batch, weights, backend)
        # Rows without which the gradient would be wrong: NaN instead.
        return scale if left_out is None else scale.masked_fill(left_out, torch.nan)

    tiles = None
    if any(wanted) and route != "recompute" and plan is not None and plain and whole:
        agreed = head.shard is not None
        chunk_bytes = max_chunk_bytes or default_chunk_bytes(hidden.device, one_pass=True, agreed=agreed)
        tiles = plan_chunks(head, plan, unit, chunk_bytes)
        if tiles is None and route == "one-pass":
            raise ValueError(
                f"route='one-pass' needs a chunk that holds a whole {unit}; max_chunk_bytes = {chunk_bytes} does not"
            )
    if tiles is not None and plan is not None and tiles.total_rows:
        # A selection of the current policy drops no token from the divisor, or the batch is one chunk.
        known = batch.weights if counted is None else counted
        scale = scale_of if unit == "batch" and counted is None else scale_of(known)
        batch = replace(batch, tokens=computed)
        with torch.no_grad(), without_autocast(hidden.device):
            found = one_pass(
                head, objective, batch, transform, plan, tiles, unit, shaped, scale, wanted,
                max_bytes, main_grad is not None, backend,
            )  # fmt: skip
        loss = attach(found, plan.rows, main_grad, head, backend)
        return policy_output(batch, loss, found.stats, found.weights, found.metrics, "one-pass")

    forward_rows, backward_rows, given_rows = _recomputed_rows(plan, chosen, statistics, computed)
    stats = head_statistics_unchecked(
        head, flat_targets, transform, main_grad, max_bytes, forward_rows, backward_rows, given_rows, backend
    )
    batch = replace(batch, tokens=computed)
    shaped = shape(objective, batch, stats, backend) if shaped is None else shaped
    scale = scale_of(shaped.weights if counted is None else counted)
    terms = token_terms(objective, batch, stats, shaped, scale, backend)
    taken = "recompute" if any(wanted) else "statistics"
    return policy_output(batch, terms.loss, stats, shaped.weights, terms.metrics, taken)


def _every_row(batch: TokenBatch, unit: str, objective: Objective) -> RowPlan:
    """All rows, which takes no counting."""
    count, layout = batch.tokens.numel(), batch.layout
    if layout.padded:
        boundaries = tuple(layout.shape[1] * i for i in range(layout.shape[0] + 1))
    elif batch.offsets.device.type == "cpu":
        boundaries = tuple(batch.offsets.tolist())
    else:
        boundaries = (0, count)  # where they end is on the device: they stay together
    every = torch.ones_like(batch.tokens)
    return RowPlan(None, None, every, every, boundaries, layout, objective, unit, False)


def _left_out(plan: RowPlan, batch: TokenBatch, mine: Tensor, computed: Tensor, validate: bool) -> Tensor:
    """0-d bool: whether the plan leaves out a row that it must not; a ValueError where values may be read."""
    left_out = ((mine & ~plan.planned) | (computed & ~plan.read)).any()
    others = plan.other_rollouts(batch.layout)
    left_out = left_out if others is None else left_out | others
    if reads_values(left_out, validate) and bool(left_out):
        raise ValueError("plan leaves out tokens, or rows that may have a gradient: it was made of another batch")
    return left_out


def _recomputed_rows(
    plan: RowPlan | None, chosen: int, statistics: str, computed: Tensor
) -> tuple[int, int, tuple[Tensor | None, Tensor | None]]:
    """How the statistics and their backward leave rows out: modes of each, and the rows where they are GIVEN."""
    if chosen > 0:
        # Few rows are computed of "active" ones alone.
        return (chosen if statistics == "active" else EVERY), chosen, (None, None)
    on_cpu = computed.device.type == "cpu"
    if plan is None or on_cpu:
        mode = EXACT if chosen == EXACT else EVERY
        return mode, mode, (None, None)
    rows = plan.rows
    if rows is None:
        return EVERY, EVERY, (None, None)
    both = rows if plan.rest is None else torch.cat([rows, plan.rest])
    return GIVEN, GIVEN, (both, rows)


class LinearPolicyLoss(nn.Module):
    """linear_policy_loss as a module: the objective and the keywords given here are fixed, the batch comes by call.

    Call it as linear_policy_loss(hidden, weight, targets, advantages, **the rest); a call may override the keywords.

    Args:
        objective: an Objective, from a preset (grpo(), dapo(), a3po(), ...) or composed; or a preset's name.
        options: keywords of linear_policy_loss: temperature, route, compaction, max_chunk_bytes, ...

    Raises:
        TypeError, ValueError: objective is none, or a keyword that linear_policy_loss does not take. What else is wrong
            is found by the call.
    """

    def __init__(self, objective: Objective | str, **options):
        super().__init__()
        known = set(linear_policy_loss.__kwdefaults__ or ())
        unknown = sorted(set(options) - known)
        if unknown:
            raise TypeError(f"unexpected keyword {unknown[0]!r}; linear_policy_loss takes {', '.join(sorted(known))}")
        check_word("route", options.get("route", "auto"), ROUTES)
        check_word("statistics", options.get("statistics", "all"), STATISTICS)
        self.objective = as_objective(objective)
        self.options = options

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, **batch) -> PolicyLossOutput:
        return linear_policy_loss(
            hidden, weight, targets, advantages, **{"objective": self.objective, **self.options, **batch}
        )

    def extra_repr(self) -> str:
        return f"{self.objective}"
