"""The stages between the vocabulary's two: statistics -> weights -> loss and coefficients, N numbers each."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ..core.forms import METRICS, PolicyInputs, SurrogateForm
from ..objectives import (
    Cispo,
    Clip,
    CustomSurrogate,
    Dppo,
    Gmpo,
    Nothing,
    Objective,
    Ratio,
    Reinforce,
    Sapo,
    Surrogate,
    TokenRule,
)
from ..ops.select_tokens import select_flat
from ..ops.surrogate import PolicyTerms, joined_policy_terms, policy_terms
from ..ops.token_logprobs import TokenStats
from ..ops.tokens import count_kept, normalizer
from .batch import TokenBatch
from .custom import custom_terms, join_terms
from .ratio_weights import importance_of
from .shaping import ShapedTokens


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


def why_not_beside(objective: Objective) -> str | None:
    """Why a token's coefficient is not known beside its own statistics, whatever its weight; None where it is."""
    if objective.ratio_level != "token":
        return "the ratio is the rollout's"
    if objective.ratio_weights:
        return "a factor of the surrogate reads the current ratio"
    if any(isinstance(rule, TokenRule) and rule.replacement is not None for rule in objective.shaping):
        return "a rule replaces the surrogate of some tokens"
    if isinstance(objective.surrogate, CustomSurrogate):
        return "autograd finds the coefficients of a CustomSurrogate"
    if objective.low_probability is not None:
        return "Lp-Reg selects by the current log-probs"
    return None


def surrogate_form(objective: Objective, surrogate: Surrogate | None = None) -> SurrogateForm:
    """The objective, with another surrogate where one is given, as the code words and run-time numbers of a backend."""
    surrogate = objective.surrogate if surrogate is None else surrogate
    form = SurrogateForm(
        kind="reinforce", sequence=objective.ratio_level != "token",
        own_gradient=objective.ratio_level == "sequence-token", kl_estimator=objective.kl_estimator,
        low=0.0, high=math.inf, dual_clip=math.inf, delta=math.inf, tau_positive=1.0, tau_negative=1.0,
        kl_coef=objective.kl_coef, entropy_coef=objective.entropy_coef,
        beta=0.0 if objective.low_probability is None else objective.low_probability.beta,
        kl_clamp=math.inf if objective.kl_clamp is None else objective.kl_clamp,
        log_ratio_coef=objective.log_ratio_coef, penalty=0.0,
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
    if isinstance(surrogate, Dppo):
        cap = math.inf if surrogate.ratio_cap is None else surrogate.ratio_cap
        kind = f"dppo-{surrogate.divergence}"
        return form._replace(kind=kind, low=surrogate.delta_low, high=surrogate.delta_high, dual_clip=cap)
    if isinstance(surrogate, Gmpo):
        return form._replace(kind="gmpo", low=surrogate.epsilon_low, high=surrogate.epsilon_high)
    if isinstance(surrogate, Ratio):
        return form._replace(kind="ratio", penalty=surrogate.penalty)
    if isinstance(surrogate, (Nothing, CustomSurrogate)):
        return form._replace(kind="none")
    if not isinstance(surrogate, Reinforce):
        raise TypeError(f"the surrogate {type(surrogate).__name__} has no code word")
    return form


def loss_scale(objective: Objective, batch: TokenBatch, weights: Tensor, backend: str) -> Tensor:
    """What the loss of a token is multiplied by, per rollout [S]."""
    reads_counts = batch.denominator is None or objective.aggregation == "seq-mean-token-mean"
    selected = objective.normalize_over == "selected" and reads_counts
    counts = batch.join(count_kept(weights, batch.offsets, backend)) if selected else batch.counts
    scale = normalizer(counts, objective.aggregation, batch.denominator, batch.max_length, backend)
    return scale if batch.uneven is None else scale.masked_fill(batch.uneven, math.nan)


def policy_inputs(
    objective: Objective, batch: TokenBatch, shaped: ShapedTokens, scale: Tensor, replaced: Tensor | None = None
) -> PolicyInputs:
    """What the loss reads besides the statistics."""
    return PolicyInputs(
        batch.tokens, batch.rollout, shaped.weights, batch.advantages, batch.polarity, batch.old, batch.reference,
        batch.importance, None if replaced is None else batch.proxy, replaced, shaped.selected, batch.offsets,
        batch.own_counts, scale,
    )  # fmt: skip


def token_terms(
    objective: Objective, batch: TokenBatch, stats: TokenStats, shaped: ShapedTokens, scale: Tensor, backend: str,
    has_entropy: bool = True,
) -> PolicyTerms:  # fmt: skip
    """The loss of a batch, its coefficients dL/dlogp and dL/dH per token, and the metrics.

    has_entropy: whether that of the statistics is one.
    """
    if objective.ratio_weights:
        batch = replace(batch, importance=importance_of(objective, batch, stats.logprobs))
    if not shaped.replaced:
        return _terms(objective, objective.surrogate, batch, stats, shaped, None, scale, backend, has_entropy)
    # Each surrogate on its own tokens: a weight of 0 leaves the others out.
    detached = TokenStats(stats.logprobs.detach(), stats.entropy.detach())
    left = shaped.weights != 0
    parts: list[tuple[Surrogate, Tensor]] = []
    for chosen, surrogate in reversed(shaped.replaced):
        parts.append((surrogate, left & chosen))
        left = left & ~chosen
    parts.append((objective.surrogate, left))

    found = [_terms(objective, s, batch, detached, shaped, mine, scale, backend, has_entropy) for s, mine in parts]
    return join_terms(stats, found, batch.own_counts)


def _terms(
    objective: Objective, surrogate: Surrogate, batch: TokenBatch, stats: TokenStats, shaped: ShapedTokens,
    mine: Tensor | None, scale: Tensor, backend: str, has_entropy: bool,
) -> PolicyTerms:  # fmt: skip
    """The terms of one surrogate, at the tokens that are its own; None: all."""
    replaced = None
    if objective.low_probability is not None and batch.proxy is not None:
        logp = stats.logprobs.detach()
        # The least likely candidates of the batch, where they are below the proxy.
        lowest = select_flat(
            logp, (batch.advantages < 0) & (shaped.weights != 0), batch.offsets,
            ratio=objective.low_probability.quantile, side="low", scope="batch", rounding="floor", at_least=0,
            required=2, backend=backend, places=batch.places,
        )  # fmt: skip
        replaced = lowest & (logp < batch.proxy)
    own_tokens = shaped if mine is None else shaped._replace(weights=shaped.weights * mine)
    inputs = policy_inputs(objective, batch, own_tokens, scale, replaced)
    form = surrogate_form(objective, surrogate)
    if form.sequence and batch.ranks.context is not None:
        return joined_policy_terms(
            stats.logprobs, stats.entropy, inputs, form, shaped.beta, batch.counts, batch.join, backend
        )  # fmt: skip
    if not isinstance(surrogate, CustomSurrogate):
        return policy_terms(stats.logprobs, stats.entropy, inputs, form, shaped.beta, backend)
    others = policy_terms(stats.logprobs.detach(), stats.entropy.detach(), inputs, form, shaped.beta, backend)
    own = custom_terms(surrogate, batch, stats, shaped.weights, shaped.selected, mine, scale, has_entropy)
    return join_terms(stats, [own, others], batch.own_counts)


def policy_output(
    batch: TokenBatch, loss: Tensor, stats: TokenStats, weights: Tensor, metrics: Tensor, route: str
) -> PolicyLossOutput:
    """Puts the results, flat [N], into the caller's spelling. metrics: METRICS."""
    shape = batch.layout.shape
    logprobs, entropy, weights = (x.detach().view(shape) for x in (*stats, weights))
    metrics = batch.ranks.reduced(metrics, batch.tokens, batch.polarity)
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    return PolicyLossOutput(loss, logprobs, entropy, weights, named, route)
