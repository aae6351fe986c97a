"""policy_loss: logits to loss, gradient and metrics of any objective. The one place that joins the stages."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .objectives import Cispo, Clip, Objective, Sapo
from .ops._dispatch import check_floating, check_rows
from .ops._layout import TokenLayout, token_layout
from .ops.min_p import min_p_token_logprobs
from .ops.select_tokens import select_flat
from .ops.surrogate import SurrogateForm, policy_terms
from .ops.token_logprobs import TokenStats, check_no_overlap, check_targets, token_logprobs_unchecked
from .schedules import Value
from .shaping import shape_tokens


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


def policy_loss_from_statistics(
    stats: TokenStats,
    layout: TokenLayout,
    tokens: Tensor,
    advantages: Tensor,
    *,
    objective: Objective,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    polarity: Tensor | None,
    old_entropy: Tensor | None,
    min_p_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    step: Value,
    denominator: Tensor | float | None,
    max_length: float | None,
    backend: str,
    route: str,
) -> PolicyLossOutput:
    """The stages between the vocabulary's two: statistics [N] -> weights -> loss, whose backward gives coefficients."""
    dtype = stats.logprobs.dtype
    logp, entropy = stats.logprobs.reshape(-1), stats.entropy.reshape(-1)
    now = TokenStats(logp.detach(), entropy.detach())
    old, before = layout.flat(old_logprobs, dtype), layout.flat(old_entropy, dtype)
    advantage = layout.per_token(advantages, dtype)
    sign = advantage if polarity is None else layout.per_token(polarity, dtype)

    def metric(name: str, source: str) -> Tensor:
        given = old if name == "probability" else before
        current = now.logprobs if name == "probability" else now.entropy
        # Without a behaviour policy the current one is it; that nothing else is missing was checked.
        return current if source == "current" or given is None else given

    shaped = shape_tokens(objective.shaping, tokens, sign, layout.offsets, metric, step, dtype, backend)
    proxy, replaced = None, None
    if objective.low_probability is not None:
        proxy = layout.flat(min_p_logprobs, dtype)
        replaced = _regularised(
            objective, now.logprobs, proxy, (advantage < 0) & (shaped.weights != 0), layout, backend
        )
    loss, sums = policy_terms(
        logp, entropy, tokens=tokens, weights=shaped.weights, advantages=advantage, polarity=sign,
        offsets=layout.offsets, form=_surrogate_form(objective), aggregation=objective.aggregation,
        normalize_selected=objective.normalize_over == "selected",
        max_length=_max_length(objective, layout, max_length, denominator), old=old,
        reference=layout.flat(ref_logprobs, dtype),
        importance=None if importance_weights is None else layout.per_token(importance_weights, dtype),
        proxy=proxy, replaced=replaced, selected=shaped.selected, denominator=denominator, backend=backend,
    )  # fmt: skip
    shape = layout.shape
    return PolicyLossOutput(
        loss, now.logprobs.view(shape), now.entropy.view(shape), shaped.weights.view(shape),
        _metrics(sums, shaped.beta), route,
    )  # fmt: skip


def _regularised(objective, logp, proxy, candidates, layout, backend) -> Tensor:
    """Lp-Reg: which of the least likely candidates of the batch have logp below the proxy's."""
    lowest = select_flat(
        logp, candidates, layout.offsets, ratio=objective.low_probability.quantile, side="low", scope="batch",
        rounding="floor", at_least=0, required=2, backend=backend,
    )  # fmt: skip
    return lowest & (logp < proxy)


def _metrics(sums: dict[str, Tensor], beta: Value) -> dict[str, Tensor]:
    """Means over tokens (0 without any) of the sums of ops.surrogate."""
    tokens = sums["tokens"]
    per_token = tokens.clamp(min=1.0)
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
        "active_fraction": sums["active"] / per_token,
        "token_count": tokens,
    }
    metrics["weight"] = beta.to(tokens.dtype) if isinstance(beta, Tensor) else torch.full_like(tokens, beta)
    return metrics


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    objective: Objective,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    polarity: Tensor | None = None,
    old_entropy: Tensor | None = None,
    min_p_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    step: Value = 0,
    denominator: Tensor | float | None = None,
    max_length: float | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    validate: bool = False,
    backend: str = "auto",
) -> PolicyLossOutput:
    """The loss of an objective on logits, its gradient by backward, per-token statistics and metrics.

    A batch is padded, logits [B, T, V] with one rollout a row, or packed, logits [N, V] with cu_seqlens [S + 1]. "Per
    token" below is [B, T] or [N]. A row is a token where the mask is 1 and its target is not `ignore_index`; what other
    rows hold never matters. All statistics are fp32, or fp64 for fp64 logits.

    Args:
        logits: fp16, bf16, fp32 or fp64, any strides.
        targets: per token, int32 or int64, already shifted: row i of the logits predicts targets[i].
        advantages: per rollout [B] or [S], or per token; per rollout wins where both fit.
        objective: an Objective, from a preset (grpo(), dapo(), a3po(), ...) or composed.
        old_logprobs: per token, log-probs of the behaviour policy (nats); None is on-policy, with ratio exactly 1.
        ref_logprobs: per token, of the reference policy, for the KL term.
        mask: per token, bool or 0/1; every row if None.
        cu_seqlens: int32 or int64 offsets of packed rollouts, first 0, last N; empty rollouts are fine.
        polarity: +1, -1 or 0, per rollout or per token; the sign of the advantages if None.
        old_entropy: per token (nats), for rules on the old policy's entropy.
        min_p_logprobs: per token, min_p_token_logprobs of the old policy, for Lp-Reg; on-policy it is computed.
        importance_weights: per rollout or per token, constant factors of the surrogate (trainer/rollout mismatch).
        step: training step of the schedules, a number or a 0-d tensor.
        denominator: replaces what the aggregation divides by, a number or a 0-d tensor: e.g. the token (or rollout)
            count over all ranks and accumulation steps. Nothing is reduced over ranks here.
        max_length: of seq-mean-token-sum-norm; T if padded and not given.
        temperature, softcap, logit_scale, ignore_index, inplace_backward, validate, backend: as in token_logprobs.

    Returns:
        PolicyLossOutput(loss, logprobs, entropy, weights, metrics, route). metrics, each a 0-d device tensor: the means
        over tokens entropy, kl (to the reference; 0 without one), approx_kl (of old - current log-prob), ratio_mean;
        ratio_max; clip_fraction_low, clip_fraction_high, dual_clip_fraction, active_fraction (tokens with a non-zero
        gradient); selected_fraction_positive and _negative (of the tokens of that polarity, selected by a TokenRule);
        weight (the first TokenRule's scale at this step); token_count.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range, or one that the objective needs
            and did not get. Nothing is launched then.
        IndexError: a target outside the vocabulary, on the CPU or with `validate`.
    """
    _check_objective(objective)
    check_rows(logits, targets, temperature, softcap, logit_scale, backend)
    expected = "[N, V] with cu_seqlens" if cu_seqlens is not None else "[B, T, V]"
    if logits.ndim != (3 if cu_seqlens is None else 2):
        hint = "; packed logits [N, V] need cu_seqlens" if cu_seqlens is None and logits.ndim == 2 else ""
        raise ValueError(f"logits must have shape {expected}; got {list(logits.shape)}{hint}")
    layout = token_layout("targets", targets, cu_seqlens, validate=validate)
    _check_token_arguments(
        layout, objective, advantages, old_logprobs, ref_logprobs, polarity, old_entropy, min_p_logprobs,
        importance_weights, step, denominator, max_length,
    )  # fmt: skip
    if inplace_backward and logits.requires_grad:
        check_no_overlap(logits)

    keep = layout.flat_mask(mask)
    if keep is not None:
        targets = torch.where(keep.view(layout.shape), targets, ignore_index)
    check_targets(targets, logits.shape[-1], ignore_index, validate)
    tokens = (targets != ignore_index).reshape(-1)
    stats = token_logprobs_unchecked(
        logits, targets, temperature, softcap, logit_scale, ignore_index, inplace_backward, backend
    )
    if objective.low_probability is not None and min_p_logprobs is None:
        min_p_logprobs = min_p_token_logprobs(
            logits, targets, objective.low_probability.min_p, softcap=softcap, logit_scale=logit_scale,
            ignore_index=ignore_index, backend=backend,
        )  # fmt: skip
    return policy_loss_from_statistics(
        stats, layout, tokens, advantages, objective=objective, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        polarity=polarity, old_entropy=old_entropy, min_p_logprobs=min_p_logprobs,
        importance_weights=importance_weights, step=step, denominator=denominator, max_length=max_length,
        backend=backend, route="logits-inplace" if inplace_backward else "logits",
    )  # fmt: skip


def _check_objective(objective: object) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective, such as a3po(); got {type(objective).__name__}")


def _check_token_arguments(
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
    wants_entropy = any(getattr(rule, "metric", "") == "entropy" and rule.source == "old" for rule in objective.shaping)
    if wants_entropy and old_entropy is None and old_logprobs is not None:
        raise ValueError("a rule on the old policy's entropy needs old_entropy when old_logprobs are given; got None")


class PolicyLoss(nn.Module):
    """policy_loss as a module: the objective and the logit transform are fixed, the batch comes by call.

    Args: objective and the keywords temperature, softcap, logit_scale, ignore_index, inplace_backward, validate and
    backend of policy_loss. Call it as policy_loss(logits, targets, advantages, **the rest); a call may override them.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ignore_index: int = -100,
        inplace_backward: bool = False,
        validate: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        _check_objective(objective)
        self.objective = objective
        self.options = {
            "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index,
            "inplace_backward": inplace_backward, "validate": validate, "backend": backend,
        }  # fmt: skip

    def forward(self, logits: Tensor, targets: Tensor, advantages: Tensor, **batch) -> PolicyLossOutput:
        return policy_loss(logits, targets, advantages, **{"objective": self.objective, **self.options, **batch})

    def extra_repr(self) -> str:
        return f"{self.objective}"
