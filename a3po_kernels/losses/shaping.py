"""The weights of the tokens: polarity weights and token rules, multiplied in the order listed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.forms import RuleForm
from ..objectives import Objective, PolarityWeights, Surrogate, TokenRule
from ..ops.select_tokens import select_flat
from ..ops.token_logprobs import TokenStats
from ..ops.tokens import apply_rules, walks_batch
from ..parallel.selection import order_statistics
from ..schedules import Value
from .batch import TokenBatch, leading_weights
from .token_values import TokenValues, check_result


class ShapedTokens(NamedTuple):
    """weights [N] (0: dropped or no token), selected [N] bool by any TokenRule (None without one), beta, and the tokens
    [N] bool whose surrogate is another one, a later one's before an earlier one's."""

    weights: Tensor
    selected: Tensor | None
    beta: Value
    replaced: tuple[tuple[Tensor, Surrogate], ...] = ()


def reads_current(rule: TokenRule, batch: TokenBatch) -> bool:
    """Whether a rule selects by the current policy; without a behaviour policy the current one is it."""
    if not rule.reads_policy:
        return False
    if callable(rule.metric):
        return rule.source == "current"
    given = batch.old if rule.metric == "probability" else batch.old_entropy
    return rule.source == "current" or given is None


def current_rules(objective: Objective, batch: TokenBatch) -> list[TokenRule]:
    """The rules that select by the current policy."""
    return [rule for rule in objective.shaping if isinstance(rule, TokenRule) and reads_current(rule, batch)]


def _metric(
    rule: TokenRule, batch: TokenBatch, stats: TokenStats | None, weights: Tensor, selected: Tensor | None,
    has_entropy: bool,
) -> Tensor:  # fmt: skip
    """What a rule selects by, [N], without a gradient."""
    if callable(rule.metric):
        current = stats if rule.source == "current" else None
        logprobs, entropy = (None, None) if current is None else (x.detach() for x in current)
        entropy = entropy if has_entropy else None
        with torch.no_grad():
            found = rule.metric(TokenValues.of(batch, weights, selected, logprobs, entropy))
        return check_result("a rule's metric", found, weights.shape).detach()
    if not rule.reads_policy:
        return batch.scores[rule.metric]
    if reads_current(rule, batch):
        assert stats is not None
        return (stats.logprobs if rule.metric == "probability" else stats.entropy).detach()
    given = batch.old if rule.metric == "probability" else batch.old_entropy
    assert given is not None
    return given.detach()


def _as_weight(value: Value, batch: TokenBatch) -> Value:
    return value.to(batch.weights.dtype) if isinstance(value, Tensor) else value


def shape(
    objective: Objective, batch: TokenBatch, stats: TokenStats | None, backend: str, has_entropy: bool = True
) -> ShapedTokens:
    """The tokens' weights, the rules' factors multiplied in the order listed.

    stats, flat [N], may be None where no rule reads the current policy; has_entropy: whether theirs is one.
    """
    weights = batch.weights
    selected: Tensor | None = None
    first_scale: Value | None = None
    waiting: list[RuleForm] = []
    replaced: list[tuple[Tensor, Surrogate]] = []

    def join(chosen: Tensor) -> None:
        nonlocal selected
        selected = chosen if selected is None else selected | chosen

    def apply_waiting(weights: Tensor) -> Tensor:
        if waiting:
            weights, chosen = apply_rules(weights, batch.polarity, batch.offsets, waiting, backend)
            join(chosen)
            waiting.clear()
        return weights

    first = leading_weights(objective)
    for rule, scales in zip(objective.shaping[first:], batch.scales[first:], strict=True):
        if isinstance(rule, PolarityWeights):
            weights = apply_waiting(weights)
            positive, negative, neutral = (_as_weight(x, batch) for x in scales)
            weights = torch.where(
                batch.polarity > 0, weights * positive,
                torch.where(batch.polarity < 0, weights * negative, weights * neutral),
            )  # fmt: skip
            continue
        scale = _as_weight(scales[0], batch)
        first_scale = scale if first_scale is None else first_scale
        if callable(rule.metric):
            weights = apply_waiting(weights)  # which it may read
        form = RuleForm(
            _metric(rule, batch, stats, weights, selected, has_entropy), rule.polarity or 0, rule.side == "high",
            rule.rounding == "ceil", rule.ratio, scale, rule.rest_scale,
        )  # fmt: skip
        count = weights.numel()
        simple = rule.threshold is None and rule.quantile is None and rule.replacement is None
        whole = batch.ranks.context is None  # what lies on several ranks no launch can walk
        if rule.scope == "rollout" and simple and whole:
            waiting.append(form)
            continue
        weights = apply_waiting(weights)
        if rule.scope == "batch" and simple and whole and walks_batch(count, weights.device, backend) and count:
            offsets = torch.arange(0, count + 1, count, device=weights.device)
            weights, chosen = apply_rules(weights, batch.polarity, offsets, [form], backend)
        else:
            weights, chosen = _apply_widely(rule, form, weights, batch, backend)
        if rule.replacement is not None:
            replaced.append((chosen, rule.replacement))
        join(chosen)
    weights = apply_waiting(weights)
    return ShapedTokens(weights, selected, 1.0 if first_scale is None else first_scale, tuple(replaced))


def _quantile(values: Tensor, eligible: Tensor, share: float, batch: TokenBatch) -> Tensor:
    """[]: the quantile of the eligible values, interpolated linearly as torch.quantile does; it waits for nothing.

    Between an infinite value and another it is the infinite one, -inf before inf. No value may be NaN.
    """
    context = batch.ranks.context
    if context is None and not values.numel():
        return values.new_zeros(())
    last = (batch.join(eligible.sum()) - 1).clamp(min=0)
    place = last.to(torch.float64) * share
    below = place.floor().long()
    above = torch.minimum(below + 1, last)
    places = torch.stack([below, above])
    if context is None:
        found = torch.where(eligible, values, torch.inf).sort().values.gather(0, places)
    else:
        found = order_statistics(values, eligible, places, context.cp_group)
    low, high = found.unbind()
    share_above = (place - below).to(low.dtype)
    between = torch.where(high == torch.inf, high, torch.lerp(low, high, share_above))
    return torch.where((share_above == 0) | (low == -torch.inf), low, between)


def _apply_widely(
    rule: TokenRule, form: RuleForm, weights: Tensor, batch: TokenBatch, backend: str
) -> tuple[Tensor, Tensor]:
    """Any rule, also over more tokens than one program should walk, or over other ranks: (weights, selected)."""
    eligible = weights != 0
    if form.polarity:
        eligible = eligible & (batch.polarity * form.polarity > 0)
    if rule.quantile is not None:
        rank = torch.where(form.metric.isnan(), torch.inf, form.metric)  # as select_tokens ranks NaN
        bound = _quantile(rank, eligible, rule.quantile, batch)
        chosen = eligible & (rank >= bound if form.high else rank <= bound)
    else:
        chosen = select_flat(
            form.metric, eligible, batch.offsets, ratio=rule.ratio, side=rule.side, scope=rule.scope,
            rounding=rule.rounding, backend=backend, group=batch.ranks.group, places=batch.places,
        )  # fmt: skip
    if rule.threshold is not None:
        limit = rule.threshold
        if rule.metric == "probability":  # by its logarithm
            limit = math.log(limit) if limit > 0 else -math.inf
        chosen = chosen & (form.metric > limit if form.high else form.metric < limit)
    if form.rest != 1.0:
        weights = torch.where(eligible & ~chosen, weights * form.rest, weights)
    return torch.where(chosen, weights * form.scale, weights), chosen
