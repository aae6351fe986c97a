"""The stages between the vocabulary's two: statistics -> weights -> loss and coefficients, N numbers each."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_floating
from ..core.layout import TokenLayout
from ..core.surrogate_form import SUMS, SurrogateForm
from ..objectives import Cispo, Clip, Objective, Sapo, TokenRule
from ..ops.select_tokens import select_flat
from ..ops.surrogate import PolicyTerms, normalizer, policy_terms, token_counts
from ..ops.token_logprobs import TokenStats
from ..schedules import Value
from .shaping import ShapedTokens, shape_tokens


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


def _surrogate_form(objective: Objective) -> SurrogateForm:
    """The objective's surrogate as the code words and run-time numbers of ops.surrogate."""
    surrogate = objective.surrogate
    form = SurrogateForm(
        kind="reinforce", sequence=objective.ratio_level == "sequence", kl_estimator=objective.kl_estimator,
        low=0.0, high=math.inf, dual_clip=math.inf, delta=math.inf, tau_positive=1.0, tau_negative=1.0,
        kl_coef=objective.kl_coef, entropy_coef=objective.entropy_coef,
        beta=0.0 if objective.low_probability is None else objective.low_probability.beta,
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
    return form


def _check_scalar(name: str, value: object, device: torch.device) -> None:
    """Raises TypeError or ValueError unless value is a number or a 0-d tensor on the device."""
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"{name} must be a number or a 0-d tensor; got shape {list(value.shape)}")
        if value.device != device and value.device.type != "cpu":
            raise ValueError(f"{name} must be on {device}; got {value.device}")
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a 0-d tensor; got {type(value).__name__}")


def _max_length(objective: Objective, layout: TokenLayout, max_length: float | None, denominator: object) -> float:
    """The length that seq-mean-token-sum-norm divides by."""
    if max_length is not None:
        _check_scalar("max_length", max_length, layout.offsets.device)
        if not isinstance(max_length, numbers.Real) or not 0 < max_length < math.inf:
            raise ValueError(f"max_length must be a positive number; got {max_length}")
        return float(max_length)
    if objective.aggregation != "seq-mean-token-sum-norm" or denominator is not None:
        return 0.0
    if not layout.padded:
        raise ValueError("aggregation 'seq-mean-token-sum-norm' needs max_length or denominator for packed rollouts")
    return float(layout.shape[1])


@dataclass(frozen=True)
class TokenBatch:
    """What the loss reads of N tokens besides their statistics: flat [N] tensors, in the statistics' dtype.

    offsets: int64 [S + 1] of the rollouts. advantages and what follows hold anything where tokens is False.
    """

    offsets: Tensor
    tokens: Tensor
    advantages: Tensor
    polarity: Tensor
    old: Tensor | None
    old_entropy: Tensor | None
    reference: Tensor | None
    importance: Tensor | None
    proxy: Tensor | None

    def at(self, rows: slice | Tensor, offsets: Tensor) -> TokenBatch:
        """Some rows, in the rollouts that `offsets` cut them into."""
        per_token = ("tokens", "advantages", "polarity", "old", "old_entropy", "reference", "importance", "proxy")
        given: dict[str, Any] = {name: getattr(self, name) for name in per_token}
        given = {name: None if values is None else values[rows] for name, values in given.items()}
        return replace(self, offsets=offsets, **given)


def token_batch(
    layout: TokenLayout, tokens: Tensor, dtype: torch.dtype, advantages: Tensor, *, old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None, polarity: Tensor | None, old_entropy: Tensor | None, min_p_logprobs: Tensor | None,
    importance_weights: Tensor | None,
) -> TokenBatch:  # fmt: skip
    """Reads the per-token and per-rollout arguments of a policy loss, which were checked."""
    advantage = layout.per_token(advantages, dtype)
    return TokenBatch(
        layout.offsets, tokens, advantage, advantage if polarity is None else layout.per_token(polarity, dtype),
        layout.flat(old_logprobs, dtype), layout.flat(old_entropy, dtype), layout.flat(ref_logprobs, dtype),
        None if importance_weights is None else layout.per_token(importance_weights, dtype),
        layout.flat(min_p_logprobs, dtype),
    )  # fmt: skip


def reads_current(rule: TokenRule, batch: TokenBatch) -> bool:
    """Whether a rule selects by the current policy; without a behaviour policy the current one is it."""
    given = batch.old if rule.metric == "probability" else batch.old_entropy
    return rule.source == "current" or given is None


def reads_old_entropy(objective: Objective) -> bool:
    """Whether a rule selects by the behaviour policy's entropy."""
    rules = (rule for rule in objective.shaping if isinstance(rule, TokenRule))
    return any(rule.metric == "entropy" and rule.source == "old" for rule in rules)


def shape(objective: Objective, batch: TokenBatch, stats: TokenStats | None, step: Value, backend: str) -> ShapedTokens:
    """The tokens' weights; stats, flat [N], may be None where no rule reads the current policy."""

    def metric(rule: TokenRule) -> Tensor:
        if not reads_current(rule, batch):
            given = batch.old if rule.metric == "probability" else batch.old_entropy
        else:
            assert stats is not None
            given = stats.logprobs if rule.metric == "probability" else stats.entropy
        assert given is not None
        return given.detach()

    return shape_tokens(objective.shaping, batch.tokens, batch.polarity, batch.offsets, metric, step,
                        batch.advantages.dtype, backend)  # fmt: skip


def loss_scale(
    objective: Objective, layout: TokenLayout, tokens: Tensor, weights: Tensor, denominator: Tensor | float | None,
    max_length: float | None,
) -> Tensor:  # fmt: skip
    """What the loss of a token is multiplied by, per rollout [S]."""
    counts = token_counts(tokens, weights, layout.offsets)
    tensor = denominator if isinstance(denominator, Tensor) else None
    value = None if tensor is not None or denominator is None else float(denominator)
    return normalizer(
        counts, objective.aggregation, objective.normalize_over == "selected",
        _max_length(objective, layout, max_length, denominator), tensor, value,
    )  # fmt: skip


def token_terms(
    objective: Objective, batch: TokenBatch, stats: TokenStats, shaped: ShapedTokens, scale: Tensor, backend: str
) -> PolicyTerms:
    """The loss of a batch, its coefficients dL/dlogp and dL/dH per token, and the sums that the metrics need."""
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
    return policy_terms(
        stats.logprobs, stats.entropy, tokens=batch.tokens, weights=shaped.weights, advantages=batch.advantages,
        polarity=batch.polarity, offsets=batch.offsets, scale=scale, form=_surrogate_form(objective), old=batch.old,
        reference=batch.reference, importance=batch.importance,
        proxy=None if replaced is None else batch.proxy, replaced=replaced, selected=shaped.selected, backend=backend,
    )  # fmt: skip


def policy_output(
    layout: TokenLayout, loss: Tensor, stats: TokenStats, shaped: ShapedTokens, sums: Tensor, tokens: Tensor, route: str
) -> PolicyLossOutput:
    """Puts the results, flat [N], into the caller's spelling. tokens: bool [N], all of the batch's."""
    logprobs, entropy, weights = (x.detach().view(layout.shape) for x in (*stats, shaped.weights))
    return PolicyLossOutput(loss, logprobs, entropy, weights, _metrics(sums, shaped.beta, tokens), route)


def _metrics(totals: Tensor, beta: Value, every: Tensor) -> dict[str, Tensor]:
    """Means over the tokens whose statistics are known (0 without any); active_fraction over `every` token."""
    sums = dict(zip(SUMS, totals.unbind(), strict=True))
    per_token = sums["tokens"].clamp(min=1.0)
    tokens = every.sum().to(totals.dtype)
    metrics = {
        "entropy": sums["entropy"] / per_token,
        "kl": sums["kl"] / per_token,
        "approx_kl": sums["approx_kl"] / per_token,
        "ratio_mean": sums["ratio"] / per_token,
        "ratio_max": sums["ratio_max"],
        "clip_fraction_low": sums["clip_low"] / per_token,
        "clip_fraction_high": sums["clip_high"] / per_token,
        "dual_clip_fraction": sums["dual_clip"] / per_token,
        "selected_fraction_positive": sums["selected_positive"] / sums["positive"].clamp(min=1.0),
        "selected_fraction_negative": sums["selected_negative"] / sums["negative"].clamp(min=1.0),
        "active_fraction": sums["active"] / tokens.clamp(min=1.0),
        "token_count": tokens,
    }
    metrics["weight"] = beta.to(tokens.dtype) if isinstance(beta, Tensor) else torch.full_like(tokens, beta)
    return metrics


def check_objective(objective: object) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective, such as a3po(); got {type(objective).__name__}")


def check_token_arguments(
    layout, objective, advantages, old_logprobs, ref_logprobs, polarity, old_entropy, min_p_logprobs,
    importance_weights, step, denominator, max_length,
) -> None:  # fmt: skip
    """Everything that can be wrong with the [N]-sized arguments, before anything is launched."""
    device = layout.offsets.device
    for name, values in (
        ("advantages", advantages),
        ("polarity", polarity),
        ("importance_weights", importance_weights),
    ):
        if values is None and name != "advantages":
            continue
        layout.check_per_rollout(name, values)
        if name != "polarity":
            check_floating(name, values)
    for name, values in (
        ("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs), ("old_entropy", old_entropy),
        ("min_p_logprobs", min_p_logprobs),
    ):  # fmt: skip
        if values is not None:
            layout.check_per_token(name, values)
    _check_scalar("step", step, device)
    if denominator is not None:
        _check_scalar("denominator", denominator, device)
        if not isinstance(denominator, Tensor) and not 0 <= denominator < math.inf:
            raise ValueError(f"denominator must be finite and at least 0; got {denominator}")
    _max_length(objective, layout, max_length, denominator)
    if objective.kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef = {objective.kl_coef} needs ref_logprobs; got None")
    if objective.low_probability is not None and min_p_logprobs is None and old_logprobs is not None:
        raise ValueError("Lp-Reg needs min_p_logprobs of the old policy when old_logprobs are given; got None")
    if reads_old_entropy(objective) and old_entropy is None and old_logprobs is not None:
        raise ValueError("a rule on the old policy's entropy needs old_entropy when old_logprobs are given; got None")
