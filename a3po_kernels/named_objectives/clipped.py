"""The presets whose surrogate is the clip, on all tokens or by the sign of their rollout."""

from __future__ import annotations

from ..objectives import Clip, MinPRegularizer, Objective, PolarityWeights, RatioWeight
from ..schedules import Schedule
from .keywords import check_weights, preset


@preset
def grpo(
    *,
    epsilon_low: float = 0.2, epsilon_high: float = 0.2, dual_clip: float | None = None, delta: float | None = None,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "seq-mean-token-mean",
    ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """GRPO (DeepSeekMath, arXiv 2402.03300): clip .2/.2, no KL term unless kl_coef is given, mean of rollout means."""
    return Objective(
        surrogate=Clip(epsilon_low, epsilon_high, dual_clip, delta), kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_clamp=kl_clamp, entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights,
        aggregation=aggregation, ratio_level=ratio_level,
    )  # fmt: skip


@preset
def dr_grpo(
    *,
    epsilon_low: float = 0.2, epsilon_high: float = 0.2, dual_clip: float | None = None, delta: float | None = None,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (),
    aggregation: str = "seq-mean-token-sum-norm", ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """Dr. GRPO (arXiv 2503.20783): clip .2/.2, token sums over rollouts x max_length.

    Its advantages are without the standard deviation: group_advantages(..., normalize="none").
    """
    return Objective(
        surrogate=Clip(epsilon_low, epsilon_high, dual_clip, delta), kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_clamp=kl_clamp, entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights,
        aggregation=aggregation, ratio_level=ratio_level,
    )  # fmt: skip


@preset
def dapo(
    *,
    epsilon_low: float = 0.2, epsilon_high: float = 0.28, dual_clip: float | None = None, delta: float | None = None,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "token-mean",
    ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """DAPO (arXiv 2503.14476): clip .2/.28, mean over tokens; dual clip off unless given."""
    return Objective(
        surrogate=Clip(epsilon_low, epsilon_high, dual_clip, delta), kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_clamp=kl_clamp, entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights,
        aggregation=aggregation, ratio_level=ratio_level,
    )  # fmt: skip


@preset
def psr(
    *,
    epsilon_low: float = 0.2, epsilon_high: float = 0.2, dual_clip: float | None = None, delta: float | None = None,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "token-mean",
    ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """Positive-sample reinforcement (arXiv 2506.01347): rollouts of positive polarity alone, mean over their tokens."""
    return Objective(
        shaping=(PolarityWeights(1.0, 0.0, 0.0),), surrogate=Clip(epsilon_low, epsilon_high, dual_clip, delta),
        normalize_over="selected", kl_coef=kl_coef, kl_estimator=kl_estimator, kl_clamp=kl_clamp,
        entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights, aggregation=aggregation,
        ratio_level=ratio_level,
    )  # fmt: skip


@preset
def nsr(
    *,
    epsilon_low: float = 0.2, epsilon_high: float = 0.2, dual_clip: float | None = None, delta: float | None = None,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "token-mean",
    ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """Negative-sample reinforcement (arXiv 2506.01347): rollouts of negative polarity alone, mean over their tokens."""
    return Objective(
        shaping=(PolarityWeights(0.0, 1.0, 0.0),), surrogate=Clip(epsilon_low, epsilon_high, dual_clip, delta),
        normalize_over="selected", kl_coef=kl_coef, kl_estimator=kl_estimator, kl_clamp=kl_clamp,
        entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights, aggregation=aggregation,
        ratio_level=ratio_level,
    )  # fmt: skip


@preset
def w_reinforce(
    positive_weight: float | Schedule = 0.1,
    negative_weight: float | Schedule = 1.0,
    *,
    epsilon_low: float = 0.2, epsilon_high: float = 0.2, dual_clip: float | None = None, delta: float | None = None,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "token-mean",
    ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """W-REINFORCE (arXiv 2506.01347): clip .2/.2, positive rollouts weighed by lambda = 0.1, negative ones by 1.

    Args:
        positive_weight, negative_weight: of the tokens of positive and of negative rollouts, at least 0: numbers, or
            schedules step -> value.
    """
    check_weights(positive_weight=positive_weight, negative_weight=negative_weight)
    return Objective(
        shaping=(PolarityWeights(positive_weight, negative_weight),),
        surrogate=Clip(epsilon_low, epsilon_high, dual_clip, delta), kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_clamp=kl_clamp, entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights,
        aggregation=aggregation, ratio_level=ratio_level,
    )  # fmt: skip


@preset
def lp_reg(
    quantile: float = 0.01,
    min_p: float = 0.02,
    beta: float = 1.0,
    *,
    epsilon_low: float = 1.0, epsilon_high: float = 9.0, dual_clip: float | None = None, delta: float | None = None,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "token-mean",
    ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """Lp-Reg (arXiv 2510.03222, released code): plain clip 1.0/9.0 and the MinPRegularizer.

    The regulariser replaces the surrogate of the `quantile` of tokens of lowest current log-prob among those with
    A < 0, where their log-prob is below that of the old policy's min-p distribution.

    Args:
        quantile: share of the tokens with A < 0 that are candidates, in (0, 1].
        min_p: kappa of the min-p distribution, the tokens with p >= min_p * max p, in (0, 1].
        beta: coefficient of the regulariser, at least 0.
    """
    return Objective(
        surrogate=Clip(epsilon_low, epsilon_high, dual_clip, delta),
        low_probability=MinPRegularizer(quantile, min_p, beta), kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_clamp=kl_clamp, entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights,
        aggregation=aggregation, ratio_level=ratio_level,
    )  # fmt: skip


@preset
def gspo(
    *,
    epsilon_low: float = 0.2, epsilon_high: float = 0.2, dual_clip: float | None = None, delta: float | None = None,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "seq-mean-token-mean",
    ratio_level: str = "sequence",
) -> Objective:  # fmt: skip
    """GSPO (arXiv 2507.18071): clip .2/.2 on the rollout's ratio exp(mean(logp - old)), mean of rollout means."""
    return Objective(
        surrogate=Clip(epsilon_low, epsilon_high, dual_clip, delta), kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_clamp=kl_clamp, entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights,
        aggregation=aggregation, ratio_level=ratio_level,
    )  # fmt: skip


@preset
def gspo_token(
    *,
    epsilon_low: float = 0.2, epsilon_high: float = 0.2, dual_clip: float | None = None, delta: float | None = None,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "seq-mean-token-mean",
    ratio_level: str = "sequence-token",
) -> Objective:  # fmt: skip
    """GSPO-token (arXiv 2507.18071, and what verl calls gspo): the rollout's ratio, each token's own derivative."""
    return Objective(
        surrogate=Clip(epsilon_low, epsilon_high, dual_clip, delta), kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_clamp=kl_clamp, entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights,
        aggregation=aggregation, ratio_level=ratio_level,
    )  # fmt: skip


@preset
def luspo(
    *,
    epsilon_low: float = 0.2, epsilon_high: float = 0.2, dual_clip: float | None = None, delta: float | None = None,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "seq-mean-token-sum",
    ratio_level: str = "sequence",
) -> Objective:  # fmt: skip
    """LUSPO (arXiv 2602.05261, as in TRL): GSPO's loss times the rollout's length, which is a sum over its tokens."""
    return Objective(
        surrogate=Clip(epsilon_low, epsilon_high, dual_clip, delta), kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_clamp=kl_clamp, entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights,
        aggregation=aggregation, ratio_level=ratio_level,
    )  # fmt: skip
