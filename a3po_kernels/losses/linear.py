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
    """policy_loss of the logits hidden @ weight.T + bias, which never exist as a whole.

    Args:
        hidden: [B, T, H], or [N, H] with cu_seqlens; row i predicts targets[i]. It and weight may be DTensors, the rest
            may not; what the loss is then of is this rank's rows.
        weight, bias, vocab_size, lora, main_grad, compaction, head_dtype, tp_group, vocab_start, hidden_layout,
            grad_hidden: as in linear_token_logprobs. Of a split head in one pass every chunk's statistics are gathered
            while the next one's logits are formed, and dHidden is summed while the weight's gradient is.
        max_chunk_bytes: as there; in one pass by default 1/32 of a GPU's memory, halved while that is more than half of
            what is free (not of a split head, whose ranks must cut the rows alike: on unequal cards give it). More
            chunks are slower, hold less, and sum the weight's gradient in another order.
        route: "one-pass" forms the logits of a chunk of rows once, with their gradient in place; it needs all that a
            token's coefficients depend on in one chunk: nothing but the token, or whole rollouts (a rollout-wide ratio,
            a selection by the current policy), or the batch. Its gradient is scaled by the incoming one in backward,
            which therefore runs once. "recompute" takes the statistics first and forms the logits of the rows that
            have a gradient again in backward. "auto": one-pass where it is possible, else recompute; a number of
            rows as compaction takes recompute, and so does what needs whole rollouts under cp_group.
        statistics: "all" tokens, or "active": only those that may have a gradient, or that one with a gradient
            depends on; the others never meet the weight. Their log-probs and entropy are 0, and the metrics are means
            over the computed tokens (token_count and active_fraction are of all of them). With a number of rows as
            compaction these must fit as well, else everything is NaN.
        plan: plan_rows' of this batch. On a GPU the number of rows to multiply is then known ahead; without one (and
            with compaction "auto" or "exact") the call waits for it once, before its first product.
        The rest: as in policy_loss.

    Returns:
        PolicyLossOutput as policy_loss gives; route is "one-pass", "recompute", or "statistics" where nothing requires
        a gradient.

    Raises:
        ValueError, TypeError, IndexError: as policy_loss does, and for route="one-pass" where a chunk cannot hold what
            it must.
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
