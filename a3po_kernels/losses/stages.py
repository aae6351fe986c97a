"""The stages between the vocabulary's two: statistics -> weights -> loss and coefficients, N numbers each."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.forms import METRICS, PolicyInputs, RuleForm, SurrogateForm
from ..objectives import Cispo, Clip, CustomSurrogate, Objective, PolarityWeights, Sapo, TokenRule
from ..ops.select_tokens import select_flat
from ..ops.surrogate import PolicyTerms, policy_terms
from ..ops.token_logprobs import TokenStats
from ..ops.tokens import apply_rules, count_kept, normalizer, walks_batch
from ..schedules import Value
from .batch import TokenBatch, as_number, leading_weights
from .custom import custom_terms


class PolicyLossOutput(NamedTuple):
    """What policy_loss returns.

    loss: 0-d, call backward on it. logprobs, entropy, weights: per token, detached, spelled as the input (0 where a row
    is no token; a weight of 0 also marks a dropped token). metrics: 0-d device tensors, see policy_loss. route: which
    way the gradient takes.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    weights: Tensor
    metrics: dict[str, Tensor]
    route: str


class ShapedTokens(NamedTuple):
    """weights [N] (0: dropped or no token), selected [N] bool by any TokenRule (None without one), and beta."""

    weights: Tensor
    selected: Tensor | None
    beta: Value


def surrogate_form(objective: Objective) -> SurrogateForm:
    """The objective's surrogate as the code words and run-time numbers of ops.surrogate."""
    surrogate = objective.surrogate
    form = SurrogateForm(
        kind="reinforce", sequence=objective.ratio_level == "sequence", kl_estimator=objective.kl_estimator,
        low=0.0, high=math.inf, dual_clip=math.inf, delta=math.inf, tau_positive=1.0, tau_negative=1.0,
        kl_coef=objective.kl_coef, entropy_coef=objective.entropy_coef,
        beta=0.0 if objective.low_probability is None else objective.low_probability.beta,
        kl_clamp=math.inf if objective.kl_clamp is None else objective.kl_clamp,
    )  # fmt: skip
    if isinstance(surrogate, Clip):
        return form._replace(
            kind="clip", low=1.0 - surrogate.epsilon_low, high=1.0 + surrogate.epsilon_high,
            dual_clip=math.inf if surrogate.dual_clip is None else surrogate.dual_clip,
            delta=math.inf if surrogate.delta is None else surrogate.delta,
        )  # fmt: skip
    if isinstance(surrogate, Cispo):
        low = 0.0 if surrogate.epsilon_low is None else 1.0 - surrogate.epsilon_low
        return form._replace(kind="cispo", low=low, high=surrogate.epsilon_high)
    if isinstance(surrogate, Sapo):
        return form._replace(kind="sapo", tau_positive=surrogate.tau_positive, tau_negative=surrogate.tau_negative)
    if isinstance(surrogate, CustomSurrogate):
        return form._replace(kind="none")
    return form


def reads_current(rule: TokenRule, batch: TokenBatch) -> bool:
    """Whether a rule selects by the current policy; without a behaviour policy the current one is it."""
    given = batch.old if rule.metric == "probability" else batch.old_entropy
    return rule.source == "current" or given is None


def current_rules(objective: Objective, batch: TokenBatch) -> list[TokenRule]:
    """The rules that select by the current policy."""
    return [rule for rule in objective.shaping if isinstance(rule, TokenRule) and reads_current(rule, batch)]


def shape(objective: Objective, batch: TokenBatch, stats: TokenStats | None, backend: str) -> ShapedTokens:
    """The tokens' weights, the rules' factors multiplied in the order listed.

    stats, flat [N], may be None where no rule reads the current policy.
    """

    def metric(rule: TokenRule) -> Tensor:
        if not reads_current(rule, batch):
            given = batch.old if rule.metric == "probability" else batch.old_entropy
        else:
            assert stats is not None
            given = stats.logprobs if rule.metric == "probability" else stats.entropy
        assert given is not None
        return given.detach()

    weights = batch.weights
    selected: Tensor | None = None
    first_scale: Value | None = None
    waiting: list[RuleForm] = []

    def join(chosen: Tensor) -> None:
        nonlocal selected
        selected = chosen if selected is None else selected | chosen

    def apply_waiting(weights: Tensor) -> Tensor:
        if waiting:
            weights, chosen = apply_rules(weights, batch.polarity, batch.offsets, waiting, backend)
            join(chosen)
            waiting.clear()
        return weights

    for rule in objective.shaping[leading_weights(objective) :]:
        if isinstance(rule, PolarityWeights):
            weights = apply_waiting(weights)
            factor = torch.full_like(weights, rule.zero)
            factor = factor.masked_fill(batch.polarity > 0, rule.positive)
            weights = weights * factor.masked_fill(batch.polarity < 0, rule.negative)
            continue
        scale = rule.selected_scale(batch.step) if callable(rule.selected_scale) else rule.selected_scale
        scale = as_number(scale, weights.device)
        if isinstance(scale, Tensor):
            scale = scale.to(weights.dtype)
        first_scale = scale if first_scale is None else first_scale
        form = RuleForm(
            metric(rule), rule.polarity or 0, rule.side == "high", rule.rounding == "ceil", rule.ratio, scale,
            rule.rest_scale,
        )  # fmt: skip
        count = weights.numel()
        if rule.scope == "rollout":
            waiting.append(form)
            continue
        weights = apply_waiting(weights)
        if rule.scope == "batch" and walks_batch(count, weights.device, backend) and count:
            offsets = torch.arange(0, count + 1, count, device=weights.device)
            weights, chosen = apply_rules(weights, batch.polarity, offsets, [form], backend)
        else:
            weights, chosen = _apply_widely(rule, form, weights, batch, backend)
        join(chosen)
    weights = apply_waiting(weights)
    return ShapedTokens(weights, selected, 1.0 if first_scale is None else first_scale)


def _apply_widely(
    rule: TokenRule, form: RuleForm, weights: Tensor, batch: TokenBatch, backend: str
) -> tuple[Tensor, Tensor]:
    """A rule over more tokens than one program should walk, or over other ranks too: (weights, selected)."""
    eligible = weights != 0
    if form.polarity:
        eligible = eligible & (batch.polarity * form.polarity > 0)
    chosen = select_flat(
        form.metric, eligible, batch.offsets, ratio=rule.ratio, side=rule.side, scope=rule.scope,
        rounding=rule.rounding, backend=backend,
    )  # fmt: skip
    if form.rest != 1.0:
        weights = torch.where(eligible & ~chosen, weights * form.rest, weights)
    return torch.where(chosen, weights * form.scale, weights), chosen


def loss_scale(objective: Objective, batch: TokenBatch, weights: Tensor, backend: str) -> Tensor:
    """What the loss of a token is multiplied by, per rollout [S]."""
    reads_counts = batch.denominator is None or objective.aggregation == "seq-mean-token-mean"
    selected = objective.normalize_over == "selected" and reads_counts
    counts = count_kept(weights, batch.offsets, backend) if selected else batch.counts
    return normalizer(counts, objective.aggregation, batch.denominator, batch.max_length, backend)


def policy_inputs(
    objective: Objective, batch: TokenBatch, shaped: ShapedTokens, scale: Tensor, replaced: Tensor | None = None
) -> PolicyInputs:
    """What the loss reads besides the statistics."""
    return PolicyInputs(
        batch.tokens, batch.rollout, shaped.weights, batch.advantages, batch.polarity, batch.old, batch.reference,
        batch.importance, None if replaced is None else batch.proxy, replaced, shaped.selected, batch.offsets,
        batch.counts, scale,
    )  # fmt: skip


def token_terms(
    objective: Objective, batch: TokenBatch, stats: TokenStats, shaped: ShapedTokens, scale: Tensor, backend: str,
    has_entropy: bool = True,
) -> PolicyTerms:  # fmt: skip
    """The loss of a batch, its coefficients dL/dlogp and dL/dH per token, and the metrics.

    has_entropy: whether that of the statistics is one.
    """
    replaced = None
    if objective.low_probability is not None and batch.proxy is not None:
        logp = stats.logprobs.detach()
        # The least likely candidates of the batch, where they are below the proxy.
        lowest = select_flat(
            logp, (batch.advantages < 0) & (shaped.weights != 0), batch.offsets,
            ratio=objective.low_probability.quantile, side="low", scope="batch", rounding="floor", at_least=0,
            required=2, backend=backend,
        )  # fmt: skip
        replaced = lowest & (logp < batch.proxy)
    inputs = policy_inputs(objective, batch, shaped, scale, replaced)
    form = surrogate_form(objective)
    if not isinstance(objective.surrogate, CustomSurrogate):
        return policy_terms(stats.logprobs, stats.entropy, inputs, form, shaped.beta, backend)
    others = policy_terms(stats.logprobs.detach(), stats.entropy.detach(), inputs, form, shaped.beta, backend)
    return custom_terms(objective.surrogate, batch, stats, shaped.weights, shaped.selected, scale, others, has_entropy)


def policy_output(
    batch: TokenBatch, loss: Tensor, stats: TokenStats, weights: Tensor, metrics: Tensor, route: str
) -> PolicyLossOutput:
    """Puts the results, flat [N], into the caller's spelling. metrics: METRICS."""
    shape = batch.layout.shape
    logprobs, entropy, weights = (x.detach().view(shape) for x in (*stats, weights))
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    return PolicyLossOutput(loss, logprobs, entropy, weights, named, route)
