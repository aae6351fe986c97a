"""The presets that choose tokens: by probability, entropy or covariance."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.checks import check_is_number, check_number, check_word
from ..objectives import (
    POLICY_METRICS,
    Clip,
    Nothing,
    Objective,
    PolarityWeights,
    Ratio,
    RatioWeight,
    TokenRule,
)
from ..schedules import LinearDecay, Schedule
from .keywords import check_weights, preset


def _check_a3po(
    rho: float, alpha: float, schedule: Schedule | None, metric: str, metrics: dict[str, str | None], polarity: str
) -> None:
    """Raises ValueError for an argument that another one leaves without a use; a default may go with anything.

    metrics: "positive" and "negative": the rules' own.
    """
    # What torch.compile compares it guards on: rho and alpha are looked at beside a schedule alone.
    for name, value, default in (("rho", rho, 2.0), ("alpha", alpha, 0.005)) if schedule is not None else ():
        if value is not None and value != default:
            raise ValueError(f"{name} must be left out where schedule is given, the whole of beta(step); got {value!r}")
    check_word("polarity", polarity, ("both", "positive", "negative"))
    rules = tuple(metrics) if polarity == "both" else (polarity,)
    for name, own in metrics.items():
        if name not in rules and own is not None:
            raise ValueError(
                f"{name}_metric must be left out where polarity is {polarity!r}, which has no {name} rule; got {own!r}"
            )
    given = [f"{name}_metric" for name in rules if metrics[name] is not None]
    if metric not in (None, "probability") and len(given) == len(rules):
        raise ValueError(
            f"metric must be left out where every rule has its own, {' and '.join(given)}; got {metric!r}"
        )


@preset
def fork_tokens(
    ratio: float = 0.2,
    rounding: str = "floor",
    normalize_over: str = "selected",
    *,
    epsilon_low: float = 0.2, epsilon_high: float = 0.28, dual_clip: float | None = None, delta: float | None = None,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "token-mean",
    ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """Fork tokens (arXiv 2506.01939): DAPO on the `ratio` of tokens of highest current entropy in the batch.

    The other tokens leave the objective. The released code rounds up and divides by the selected tokens.

    Args:
        ratio: share of the batch's tokens that is selected, one at least, in (0, 1].
        rounding: "floor" or "ceil" of ratio times their number.
        normalize_over: divide by the "selected" tokens or by "all".
    """
    rule = TokenRule(
        metric="entropy", source="current", side="high", ratio=ratio, rest_scale=0.0, scope="batch", rounding=rounding
    )
    return Objective(
        shaping=(rule,), surrogate=Clip(epsilon_low, epsilon_high, dual_clip, delta), normalize_over=normalize_over,
        kl_coef=kl_coef, kl_estimator=kl_estimator, kl_clamp=kl_clamp, entropy_coef=entropy_coef,
        log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights, aggregation=aggregation, ratio_level=ratio_level,
    )  # fmt: skip


@preset
def a3po(
    rho: float = 2.0,
    alpha: float = 0.005,
    ratio: float = 0.2,
    schedule: Schedule | None = None,
    metric: str = "probability",
    source: str = "old",
    positive_metric: str | None = None,
    negative_metric: str | None = None,
    polarity: str = "both",
    positive_weight: float | Schedule = 1.0,
    negative_weight: float | Schedule = 1.0,
    *,
    epsilon_low: float = 0.2, epsilon_high: float = 0.28, dual_clip: float | None = None, delta: float | None = None,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "token-mean",
    ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """A3PO (arXiv 2512.21625): DAPO with adaptive, asymmetric token weights.

    In a positive rollout the `ratio` of its tokens of lowest old probability, and in a negative one those of highest,
    weigh beta(step) = max(1, rho - alpha * step); all other tokens weigh 1. With metric="entropy" the positive
    rollouts' tokens of highest entropy and the negative ones' of lowest do.

    Args:
        rho: beta at step 0, at least 1; 2.0 is the released scripts' scale.
        alpha: what beta loses a step, at least 0. The paper gives none that we could verify: the default is ours.
        ratio: share of a rollout's tokens that is selected, one at least, in (0, 1].
        schedule: step -> value, in the place of beta(step); rho and alpha are then left out.
        metric: "probability" or "entropy", of both polarities' rules.
        source: the policy whose metric it is, "old" or "current"; without old log-probs it is the current one.
        positive_metric, negative_metric: one polarity's metric, in the place of `metric`.
        polarity: "both", or "positive" or "negative": that rule alone.
        positive_weight, negative_weight: of all tokens of positive and of negative rollouts, at least 0: numbers, or
            schedules step -> value.
    """
    metrics = {"positive": positive_metric, "negative": negative_metric}
    _check_a3po(rho, alpha, schedule, metric, metrics, polarity)
    check_number("rho", rho, 1.0)
    check_number("alpha", alpha, 0.0)
    check_weights(positive_weight=positive_weight, negative_weight=negative_weight)
    beta = LinearDecay(rho, alpha) if schedule is None else schedule
    shaping: list[PolarityWeights | TokenRule] = []
    if (positive_weight, negative_weight) != (1.0, 1.0):
        shaping.append(PolarityWeights(positive_weight, negative_weight))
    for sign, (name, given) in zip((1, -1), metrics.items(), strict=True):
        chosen = metric if given is None else given
        check_word("metric" if given is None else f"{name}_metric", chosen, POLICY_METRICS)
        if polarity in ("both", name):
            side = "low" if (sign > 0) == (chosen == "probability") else "high"
            shaping.append(TokenRule(sign, chosen, source, side, ratio, beta))
    return Objective(
        shaping=tuple(shaping), surrogate=Clip(epsilon_low, epsilon_high, dual_clip, delta), kl_coef=kl_coef,
        kl_estimator=kl_estimator, kl_clamp=kl_clamp, entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef,
        ratio_weights=ratio_weights, aggregation=aggregation, ratio_level=ratio_level,
    )  # fmt: skip


def covariance(t):
    """(A - mean A) (logp - mean logp) of each token, means over the batch's tokens (arXiv 2505.22617)."""
    advantages, logprobs = t.advantages, t.logprobs
    return (advantages - t.batch_mean(advantages)) * (logprobs - t.batch_mean(logprobs))


@preset
def kl_cov(
    ratio: float = 0.0002,
    penalty: float = 0.1,
    *,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "token-mean",
    ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """KL-Cov (arXiv 2505.22617): -A r, and at the `ratio` of tokens of highest covariance + penalty |logp - old|.

    The penalty has no gradient where logp = old.

    Args:
        ratio: share of the batch's tokens that is penalised, one at least, in (0, 1]; as in verl (the released scripts:
            2e-3 or 2e-4).
        penalty: its coefficient, at least 0; verl's ppo_kl_coef (the released scripts: 1).
    """
    rule = TokenRule(
        metric=covariance, source="current", side="high", ratio=ratio, scope="batch", replacement=Ratio(penalty)
    )
    return Objective(
        shaping=(rule,), surrogate=Ratio(), kl_coef=kl_coef, kl_estimator=kl_estimator, kl_clamp=kl_clamp,
        entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights, aggregation=aggregation,
        ratio_level=ratio_level,
    )  # fmt: skip


@dataclass(frozen=True)
class CovarianceCandidates:
    """A metric in (0, 1) at the tokens whose covariance lies in (low, high) and that the clip does not cut, else -1.

    The order among candidates is a hash of rollout, position, step and seed.
    """

    low: float
    high: float
    seed: int
    clip: Clip

    def __call__(self, t):
        ratio, value = t.ratio, covariance(t)
        cut = ((t.advantages > 0) & (ratio > 1 + self.clip.epsilon_high)) | (
            (t.advantages < 0) & (ratio < 1 - self.clip.epsilon_low)
        )
        candidate = (value > self.low) & (value < self.high) & ~cut & t.mask
        # Fractions of multiples of irrational numbers: even, and the same on every route and in either spelling.
        turns = 0.7548776662466927 * t.position.double() + 0.5698402909980532 * t.rollout.double()
        step = t.step.double() if hasattr(t.step, "double") else t.step
        turns = turns + 0.6180339887498949 * (step + 1.0) + 0.3247179572447461 * self.seed
        even = (turns - turns.floor()) * 0.998 + 0.001
        return even.to(value.dtype).masked_fill(~candidate, -1.0)


@preset
def clip_cov(
    ratio: float = 0.0002,
    low: float = 1.0,
    high: float = 5.0,
    seed: int = 0,
    *,
    epsilon_low: float = 0.2, epsilon_high: float = 0.2, dual_clip: float | None = None, delta: float | None = None,
    kl_coef: float = 0.0, kl_estimator: str = "k3", kl_clamp: float | None = None, entropy_coef: float = 0.0,
    log_ratio_coef: float = 0.0, ratio_weights: tuple[RatioWeight, ...] = (), aggregation: str = "token-mean",
    ratio_level: str = "token",
) -> Objective:  # fmt: skip
    """Clip-Cov (arXiv 2505.22617): the clip, and no surrogate at some tokens whose covariance lies in (low, high).

    They are taken out of those that the clip leaves. Released code and verl draw them by an unseeded generator; here a
    hash of rollout, position, step and `seed` decides, so that the same inputs give the same bits.

    Args:
        ratio: share of the batch's tokens that is taken at most, one at least, in (0, 1].
        low, high: bounds of the covariance (A - mean A) (logp - mean logp) of the candidates, in nats.
        seed: an integer of the hash.
    """
    check_is_number("low", low)
    check_is_number("high", high)
    if not low < high:
        raise ValueError(f"low must be below high: no token lies between; got {low} and {high}")
    surrogate = Clip(epsilon_low, epsilon_high, dual_clip, delta)
    rule = TokenRule(
        metric=CovarianceCandidates(low, high, seed, surrogate), source="current", side="high", ratio=ratio,
        scope="batch", threshold=0.0, replacement=Nothing(),
    )  # fmt: skip
    return Objective(
        shaping=(rule,), surrogate=surrogate, kl_coef=kl_coef, kl_estimator=kl_estimator, kl_clamp=kl_clamp,
        entropy_coef=entropy_coef, log_ratio_coef=log_ratio_coef, ratio_weights=ratio_weights, aggregation=aggregation,
        ratio_level=ratio_level,
    )  # fmt: skip
