"""The presets with a surrogate other than the clip."""

from __future__ import annotations

from ..objectives import Cispo, Dppo, Gmpo, Objective, RatioWeight, Reinforce, Sapo, Topr, Vespo
from .keywords import joined, preset


@preset
def cispo(
    epsilon_high: float = 1.28,
    epsilon_low: float | None = None,
    *,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "token-mean",
    ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """CISPO (arXiv 2506.13585): -sg(min(r, epsilon_high)) A logp, mean over tokens.

    Args:
        epsilon_high: bound of the ratio itself, as in TRL, above 0.
        epsilon_low: in [0, 1]; adds the lower bound 1 - epsilon_low, as in verl. None: no lower bound.
    """
    return Objective(
        surrogate=Cispo(epsilon_high, epsilon_low), kl_coef=kl_coef, kl_estimator=kl_estimator, kl_clamp=kl_clamp,
        entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights, aggregation=aggregation,
        ratio_level=ratio_level,
    )  # fmt: skip


@preset
def sapo(
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    *,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "seq-mean-token-mean",
    ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """SAPO (arXiv 2511.20347): -A (4 / tau) sigmoid(tau (r - 1)), mean of rollout means.

    Args:
        tau_positive, tau_negative: tau where A > 0, and elsewhere; above 0.
    """
    return Objective(
        surrogate=Sapo(tau_positive, tau_negative), kl_coef=kl_coef, kl_estimator=kl_estimator, kl_clamp=kl_clamp,
        entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights, aggregation=aggregation,
        ratio_level=ratio_level,
    )  # fmt: skip


@preset
def dppo(
    divergence: str = "tv",
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    ratio_cap: float | None = None,
    *,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "token-mean",
    ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """DPPO (arXiv 2602.04879): a trust region on the divergence of each token instead of a bound of its ratio.

    Bounds .2 as verl, prime-rl and SkyRL have them (the authors' scripts: tv .15, kl .05). prime-rl's default is
    dppo(log_ratio_coef=1e-3) with the sampler's log-probs as old_logprobs.

    Args:
        divergence: "tv", the difference of the token's two probabilities, or "kl" of the two Bernoulli variables.
        delta_low, delta_high: its bounds downwards and upwards, at least 0; nats for "kl".
        ratio_cap: cap of the ratio, above 0, verl's clip_ratio_c, there 3. None: none.
    """
    return Objective(
        surrogate=Dppo(divergence, delta_low, delta_high, ratio_cap), kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_clamp=kl_clamp, entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights,
        aggregation=aggregation, ratio_level=ratio_level,
    )  # fmt: skip


@preset
def vespo(
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
    *,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "token-mean",
    ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """VESPO (arXiv 2602.10693, as released and in TRL): -phi(w) A logp, w the rollout's ratio; mean over tokens.

    phi(w) = exp(lambda + k log w - lambda w), without a gradient.

    Args:
        k_positive, lambda_positive: k and lambda where A >= 0; at least 0.
        k_negative, lambda_negative: where A < 0; at least 0.
    """
    own = Vespo(k_positive, lambda_positive, k_negative, lambda_negative)
    return Objective(
        surrogate=Reinforce(), kl_coef=kl_coef, kl_estimator=kl_estimator, kl_clamp=kl_clamp, entropy_coef=entropy_coef,
        log_ratio_coef=log_ratio_coef, ratio_weights=joined(own, ratio_weights), aggregation=aggregation,
        ratio_level=ratio_level,
    )  # fmt: skip


@preset
def gmpo(
    epsilon_low: float = 0.4,
    epsilon_high: float = 0.4,
    *,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "seq-mean-token-mean",
    ratio_level: str = "sequence",
) -> Objective:  # fmt: skip
    """GMPO (arXiv 2507.20673): the geometric mean of clipped token ratios, mean over rollouts.

    verl's geo_mean averages over a micro-batch's rows whatever the configuration says; ours takes `denominator`.

    Args:
        epsilon_low, epsilon_high: bounds of the log ratio, in nats, at least 0; .4 as released.
    """
    return Objective(
        surrogate=Gmpo(epsilon_low, epsilon_high), kl_coef=kl_coef, kl_estimator=kl_estimator, kl_clamp=kl_clamp,
        entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights, aggregation=aggregation,
        ratio_level=ratio_level,
    )  # fmt: skip


@preset
def topr(
    level: str = "sequence",
    *,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "seq-mean-token-sum",
    ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """TOPR (arXiv 2503.14286): -A logp, in negative rollouts times the ratio, at most 1; sums over rollouts.

    Args:
        level: whose ratio: of the "sequence", a product as in the paper, its "geometric" mean, or the "token"'s.
    """
    return Objective(
        surrogate=Reinforce(), kl_coef=kl_coef, kl_estimator=kl_estimator, kl_clamp=kl_clamp, entropy_coef=entropy_coef,
        log_ratio_coef=log_ratio_coef, ratio_weights=joined(Topr(level), ratio_weights), aggregation=aggregation,
        ratio_level=ratio_level,
    )  # fmt: skip
