"""The published methods as Objectives (the table of SPEC section 3).

Every preset takes the keyword overrides that its parts have: epsilon_low, epsilon_high, dual_clip, delta (Clip),
kl_coef, kl_estimator, kl_clamp, entropy_coef, log_ratio_coef, ratio_level, ratio_weights, aggregation. A keyword that
its surrogate does not have is a TypeError. ratio_weights come after those that the method has itself.
"""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from .objectives import (
    Cispo,
    Clip,
    Dppo,
    Gmpo,
    LinearDecay,
    MinPRegularizer,
    Nothing,
    Objective,
    PolarityWeights,
    Ratio,
    Reinforce,
    Sapo,
    TokenRule,
    Topr,
    Vespo,
)
from .selection import one_of

OBJECTIVE_OVERRIDES = (
    "kl_coef", "kl_estimator", "kl_clamp", "entropy_coef", "log_ratio_coef", "ratio_level", "ratio_weights",
    "aggregation",
)  # fmt: skip


def build(surrogate_class: type, surrogate_defaults: dict, overrides: dict, **objective_fields) -> Objective:
    """An Objective from a preset's defaults, with each override put where it belongs."""
    surrogate_fields = dict(surrogate_defaults)
    for name, value in overrides.items():
        if name == "ratio_weights":
            objective_fields[name] = (*objective_fields.get(name, ()), *value)
        elif name in OBJECTIVE_OVERRIDES:
            objective_fields[name] = value
        elif name in [field.name for field in fields(surrogate_class)]:
            surrogate_fields[name] = value
        else:
            raise TypeError(f"unexpected keyword argument {name!r} for a preset with {surrogate_class.__name__}")
    return Objective(surrogate=surrogate_class(**surrogate_fields), **objective_fields)


DAPO_CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28}


def grpo(**overrides) -> Objective:
    """GRPO, DeepSeekMath (arXiv 2402.03300)."""
    return build(Clip, {}, overrides, aggregation="seq-mean-token-mean")


def dr_grpo(**overrides) -> Objective:
    """Dr.GRPO (arXiv 2503.20783): no length normalisation; use group_advantages(..., normalize="none") with it."""
    return build(Clip, {}, overrides, aggregation="seq-mean-token-sum-norm")


def dapo(**overrides) -> Objective:
    """DAPO (arXiv 2503.14476): clip higher, token-level mean."""
    return build(Clip, DAPO_CLIP, overrides)


def psr(**overrides) -> Objective:
    """Positive sample reinforcement (arXiv 2506.01347): only rollouts of polarity +1, normalised over their tokens."""
    return build(Clip, {}, overrides, shaping=(PolarityWeights(1.0, 0.0, 0.0),), normalize_over="selected")


def nsr(**overrides) -> Objective:
    """Negative sample reinforcement (arXiv 2506.01347): only rollouts of polarity -1, normalised over their tokens."""
    return build(Clip, {}, overrides, shaping=(PolarityWeights(0.0, 1.0, 0.0),), normalize_over="selected")


def w_reinforce(positive_weight: float = 0.1, negative_weight: float = 1.0, **overrides) -> Objective:
    """W-REINFORCE (arXiv 2506.01347): positive rollouts weighted by lambda = 0.1."""
    return build(Clip, {}, overrides, shaping=(PolarityWeights(positive_weight, negative_weight, 1.0),))


def fork_tokens(
    ratio: float = 0.2, rounding: str = "floor", normalize_over: str = "selected", **overrides
) -> Objective:
    """Fork tokens (arXiv 2506.01939): the `ratio` of the batch's tokens with the highest current entropy, DAPO's loss.

    rounding="ceil" reproduces the released code.
    """
    rule = TokenRule(
        metric="entropy",
        source="current",
        side="high",
        ratio=ratio,
        selected_scale=1.0,
        rest_scale=0.0,
        scope="batch",
        rounding=rounding,
    )
    return build(Clip, DAPO_CLIP, overrides, shaping=(rule,), normalize_over=normalize_over)


def lp_reg(quantile: float = 0.01, min_p: float = 0.02, beta: float = 1.0, **overrides) -> Objective:
    """Lp-Reg (arXiv 2510.03222), the base loss of its released code: the clip with epsilons 1 and 9."""
    regularizer = MinPRegularizer(quantile, min_p, beta)
    return build(Clip, {"epsilon_low": 1.0, "epsilon_high": 9.0}, overrides, low_probability=regularizer)


def a3po(
    rho: float = 2.0,
    alpha: float = 0.005,
    ratio: float = 0.2,
    schedule: Callable | float | None = None,
    metric: str = "probability",
    source: str = "old",
    positive_metric: str | None = None,
    negative_metric: str | None = None,
    polarity: str = "both",
    positive_weight: float | Callable = 1.0,
    negative_weight: float | Callable = 1.0,
    **overrides,
) -> Objective:
    """A3PO (arXiv 2512.21625): in positive rollouts the lowest, in negative rollouts the highest `ratio` of the tokens
    by old probability get weight beta(step) = max(1, rho - alpha step), all other tokens weight 1.

    `schedule` replaces beta. SPEC is silent on the sides of metric="entropy"; this project's reading: high entropy
    takes the place of low probability, and low entropy that of high probability.

    Its ablations: another metric of either polarity, one polarity's rule alone, and weights of all tokens of a polarity
    before its rule.
    """
    one_of("polarity", polarity, ("both", "positive", "negative"))
    beta = LinearDecay(rho, alpha, 1.0) if schedule is None else schedule
    shared = {"source": source, "ratio": ratio, "selected_scale": beta}
    weighs = positive_weight != 1.0 or negative_weight != 1.0
    shaping: list = [PolarityWeights(positive_weight, negative_weight, 1.0)] if weighs else []
    if polarity != "negative":
        mine = metric if positive_metric is None else positive_metric
        one_of("metric", mine, ("probability", "entropy"))
        shaping.append(TokenRule(1, mine, side="high" if mine == "entropy" else "low", **shared))
    if polarity != "positive":
        mine = metric if negative_metric is None else negative_metric
        one_of("metric", mine, ("probability", "entropy"))
        shaping.append(TokenRule(-1, mine, side="low" if mine == "entropy" else "high", **shared))
    return build(Clip, DAPO_CLIP, overrides, shaping=tuple(shaping))


def gspo(**overrides) -> Objective:
    """GSPO (arXiv 2507.18071): one ratio per rollout."""
    return build(Clip, {}, overrides, ratio_level="sequence", aggregation="seq-mean-token-mean")


def cispo(**overrides) -> Objective:
    """CISPO (arXiv 2506.13585)."""
    return build(Cispo, {}, overrides)


def sapo(**overrides) -> Objective:
    """SAPO (arXiv 2511.20347); takes tau_positive and tau_negative."""
    return build(Sapo, {}, overrides, aggregation="seq-mean-token-mean")


def gspo_token(**overrides) -> Objective:
    """GSPO-token (arXiv 2507.18071), verl's gspo: the rollout's ratio, each token's own derivative."""
    return build(Clip, {}, overrides, ratio_level="sequence-token", aggregation="seq-mean-token-mean")


def luspo(**overrides) -> Objective:
    """LUSPO (arXiv 2602.05261): GSPO's loss of a rollout times its length."""
    return build(Clip, {}, overrides, ratio_level="sequence", aggregation="seq-mean-token-sum")


def gmpo(epsilon_low: float = 0.4, epsilon_high: float = 0.4, **overrides) -> Objective:
    """GMPO (arXiv 2507.20673): the geometric mean of the rollout's clipped ratios."""
    own = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high}
    return build(Gmpo, own, overrides, ratio_level="sequence", aggregation="seq-mean-token-mean")


def dppo(
    divergence: str = "tv",
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    ratio_cap: float | None = None,
    **overrides,
) -> Objective:
    """DPPO (arXiv 2602.04879), with verl's deltas."""
    own = {"divergence": divergence, "delta_low": delta_low, "delta_high": delta_high, "ratio_cap": ratio_cap}
    return build(Dppo, own, overrides)


def vespo(
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
    **overrides,
) -> Objective:
    """VESPO (arXiv 2602.10693), with the constants of its released scripts and of TRL."""
    weight = Vespo(k_positive, lambda_positive, k_negative, lambda_negative)
    return build(Reinforce, {}, overrides, ratio_weights=(weight,))


def topr(level: str = "sequence", **overrides) -> Objective:
    """TOPR (arXiv 2503.14286): the log-probability of a rollout is the sum over its tokens."""
    return build(Reinforce, {}, overrides, ratio_weights=(Topr(level),), aggregation="seq-mean-token-sum")


def covariance(t) -> Tensor:
    """(A - mean A)(l - mean l) of the batch's tokens (arXiv 2505.22617)."""
    return (t.advantages - t.batch_mean(t.advantages)) * (t.logprobs - t.batch_mean(t.logprobs))


def kl_cov(ratio: float = 0.0002, penalty: float = 0.1, **overrides) -> Objective:
    """KL-Cov (arXiv 2505.22617): no clip, and a penalty on the tokens of the highest covariance.

    ratio and penalty are verl's defaults; at least one token is penalised.
    """
    rule = TokenRule(
        metric=covariance, source="current", side="high", ratio=ratio, scope="batch", replacement=Ratio(penalty)
    )
    return build(Ratio, {}, overrides, shaping=(rule,))


def clip_cov(
    ratio: float = 0.0002, low: float = 1.0, high: float = 5.0, score: str | None = None, **overrides
) -> Objective:
    """Clip-Cov (arXiv 2505.22617): floor(ratio N), at least 1, of the tokens whose covariance lies in (low, high) and
    that the clip does not cut add nothing.

    Which of more candidates are taken is drawn without a seed in the released code and by a hash in a3po_kernels; here
    it is the first ones, or those of the highest scores[score].
    """
    objective = build(Clip, {}, overrides)
    clip = objective.surrogate

    def candidates(t) -> Tensor:
        cov, r, a = covariance(t), t.ratio, t.advantages
        cut = -a * r.clamp(1 - clip.epsilon_low, 1 + clip.epsilon_high) > -a * r
        rank = torch.ones_like(cov) if score is None else t.scores[score]
        return torch.where((cov > low) & (cov < high) & ~cut, rank, -torch.inf)

    rule = TokenRule(
        metric=candidates,
        source="current",
        side="high",
        ratio=ratio,
        scope="batch",
        threshold=-1e300,
        replacement=Nothing(),
    )
    return build(Clip, {}, overrides, shaping=(rule,))
