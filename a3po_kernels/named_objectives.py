"""The published objectives by name: each a composition of the parts in objectives.py."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .core.checks import as_tuple, check_number, check_word
from .objectives import (
    POLICY_METRICS,
    RATIO_WEIGHTS,
    Cispo,
    Clip,
    Dppo,
    Gmpo,
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
from .schedules import LinearDecay, Schedule

# Keywords that every preset takes, and those of every preset whose surrogate is the clip.
OVERRIDES = {
    "kl_coef", "kl_estimator", "kl_clamp", "entropy_coef", "aggregation", "ratio_level", "log_ratio_coef",
    "ratio_weights",
}  # fmt: skip
CLIP_OVERRIDES = {"epsilon_low", "epsilon_high", "dual_clip", "delta"}


def _common(aggregation: str, options: dict, **fields) -> Objective:
    """An Objective from a preset's fields and the overrides that every preset takes."""
    unknown = sorted(set(options) - OVERRIDES)
    if unknown:
        takes = ", ".join(sorted(OVERRIDES | (CLIP_OVERRIDES if isinstance(fields["surrogate"], Clip) else set())))
        raise TypeError(f"unexpected keyword {unknown[0]!r}; besides its own, this preset takes {takes}")
    if "ratio_weights" in fields and "ratio_weights" in options:
        given = as_tuple("ratio_weights", options.pop("ratio_weights"), RATIO_WEIGHTS)
        fields["ratio_weights"] = (*fields["ratio_weights"], *given)
    return Objective(**{"aggregation": aggregation, **fields, **options})


def _check_weights(**weights: float | Schedule) -> None:
    """Raises, by the caller's name, for a weight that is neither a schedule nor a number of at least 0."""
    for name, value in weights.items():
        if not callable(value):
            check_number(name, value, 0.0)


def _clipped(low: float, high: float, options: dict) -> Clip:
    """The clip surrogate of a preset, its overrides taken out of `options`."""
    given = {name: options.pop(name) for name in ("dual_clip", "delta") if name in options}
    return Clip(options.pop("epsilon_low", low), options.pop("epsilon_high", high), **given)


def grpo(**options) -> Objective:
    """GRPO (DeepSeekMath, arXiv 2402.03300): clip .2/.2, k3 KL (coefficient 0 unless given), mean of rollout means.

    Keywords, here and in every preset: kl_coef, kl_estimator, kl_clamp, entropy_coef, log_ratio_coef, ratio_weights,
    aggregation, ratio_level, and (where the surrogate is the clip) epsilon_low, epsilon_high, dual_clip, delta. Values
    out of range raise ValueError.
    """
    surrogate = _clipped(0.2, 0.2, options)
    return _common("seq-mean-token-mean", options, surrogate=surrogate)


def dr_grpo(**options) -> Objective:
    """Dr. GRPO (arXiv 2503.20783): clip .2/.2, token sums over rollouts x max_length; advantages without the std."""
    surrogate = _clipped(0.2, 0.2, options)
    return _common("seq-mean-token-sum-norm", options, surrogate=surrogate)


def dapo(**options) -> Objective:
    """DAPO (arXiv 2503.14476): clip .2/.28, mean over tokens; dual clip off unless given."""
    surrogate = _clipped(0.2, 0.28, options)
    return _common("token-mean", options, surrogate=surrogate)


def psr(**options) -> Objective:
    """Positive-sample reinforcement (arXiv 2506.01347): rollouts of positive polarity alone, mean over their tokens."""
    surrogate = _clipped(0.2, 0.2, options)
    shaping = (PolarityWeights(1.0, 0.0, 0.0),)
    return _common("token-mean", options, surrogate=surrogate, shaping=shaping, normalize_over="selected")


def nsr(**options) -> Objective:
    """Negative-sample reinforcement (arXiv 2506.01347): rollouts of negative polarity alone, mean over their tokens."""
    surrogate = _clipped(0.2, 0.2, options)
    shaping = (PolarityWeights(0.0, 1.0, 0.0),)
    return _common("token-mean", options, surrogate=surrogate, shaping=shaping, normalize_over="selected")


def w_reinforce(positive_weight: float = 0.1, negative_weight: float = 1.0, **options) -> Objective:
    """W-REINFORCE (arXiv 2506.01347): positive rollouts weighed by lambda = 0.1, negative ones by 1."""
    _check_weights(positive_weight=positive_weight, negative_weight=negative_weight)
    surrogate = _clipped(0.2, 0.2, options)
    shaping = (PolarityWeights(positive_weight, negative_weight),)
    return _common("token-mean", options, surrogate=surrogate, shaping=shaping)


def fork_tokens(ratio: float = 0.2, rounding: str = "floor", normalize_over: str = "selected", **options) -> Objective:
    """Fork tokens (arXiv 2506.01939): DAPO on the `ratio` of tokens of highest current entropy in the batch.

    The released code rounds up (`rounding="ceil"`) and divides by the selected tokens (`normalize_over="selected"`).
    """
    surrogate = _clipped(0.2, 0.28, options)
    rule = TokenRule(
        metric="entropy", source="current", side="high", ratio=ratio, rest_scale=0.0, scope="batch", rounding=rounding
    )
    return _common("token-mean", options, surrogate=surrogate, shaping=(rule,), normalize_over=normalize_over)


def lp_reg(quantile: float = 0.01, min_p: float = 0.02, beta: float = 1.0, **options) -> Objective:
    """Lp-Reg (arXiv 2510.03222, released code): plain clip 1.0/9.0 and the MinPRegularizer."""
    surrogate = _clipped(1.0, 9.0, options)
    return _common("token-mean", options, surrogate=surrogate, low_probability=MinPRegularizer(quantile, min_p, beta))


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
    **options,
) -> Objective:
    """A3PO (arXiv 2512.21625): DAPO with adaptive, asymmetric token weights.

    In a positive rollout the `ratio` of its tokens of lowest old probability, and in a negative one those of highest,
    weigh beta(step) = max(1, rho - alpha * step); all other tokens weigh 1. rho = 2.0 is the released scripts' scale;
    the paper gives no alpha that we could verify: the default 0.005 is ours. `schedule` replaces beta. With
    metric="entropy" the positive rollouts' tokens of highest entropy and the negative ones' of lowest do.

    The paper's ablations: positive_metric and negative_metric, of one polarity's rule; polarity "positive" or
    "negative", that rule alone; positive_weight and negative_weight, numbers or schedules, of all its tokens.
    """
    if polarity not in ("both", "positive", "negative"):
        raise ValueError(f"polarity must be 'both', 'positive' or 'negative'; got {polarity!r}")
    check_number("rho", rho, 0.0)
    check_number("alpha", alpha, 0.0)
    _check_weights(positive_weight=positive_weight, negative_weight=negative_weight)
    beta = LinearDecay(rho, alpha) if schedule is None else schedule
    shaping: list[PolarityWeights | TokenRule] = []
    if (positive_weight, negative_weight) != (1.0, 1.0):
        shaping.append(PolarityWeights(positive_weight, negative_weight))
    for sign, name, given in ((1, "positive", positive_metric), (-1, "negative", negative_metric)):
        chosen = metric if given is None else given
        check_word("metric" if given is None else f"{name}_metric", chosen, POLICY_METRICS)
        if polarity in ("both", name):
            side = "low" if (sign > 0) == (chosen == "probability") else "high"
            shaping.append(TokenRule(sign, chosen, source, side, ratio, beta))
    surrogate = _clipped(0.2, 0.28, options)
    return _common("token-mean", options, surrogate=surrogate, shaping=tuple(shaping))


def gspo(**options) -> Objective:
    """GSPO (arXiv 2507.18071): clip .2/.2 on the rollout's ratio exp(mean(logp - old)), mean of rollout means."""
    surrogate = _clipped(0.2, 0.2, options)
    return _common("seq-mean-token-mean", options, surrogate=surrogate, ratio_level="sequence")


def cispo(epsilon_high: float = 1.28, epsilon_low: float | None = None, **options) -> Objective:
    """CISPO (arXiv 2506.13585): -sg(min(r, epsilon_high)) A logp, mean over tokens; no lower bound unless given."""
    return _common("token-mean", options, surrogate=Cispo(epsilon_high, epsilon_low))


def sapo(tau_positive: float = 1.0, tau_negative: float = 1.05, **options) -> Objective:
    """SAPO (arXiv 2511.20347): -A (4 / tau) sigmoid(tau (r - 1)), mean of rollout means."""
    return _common("seq-mean-token-mean", options, surrogate=Sapo(tau_positive, tau_negative))


def dppo(
    divergence: str = "tv", delta_low: float = 0.2, delta_high: float = 0.2, ratio_cap: float | None = None, **options
) -> Objective:
    """DPPO (arXiv 2602.04879): a trust region on the divergence of each token instead of a bound of its ratio.

    Bounds .2 as verl, prime-rl and SkyRL have them (the authors' scripts: tv .15, kl .05). prime-rl's default is
    dppo(log_ratio_coef=1e-3) with the sampler's log-probs as old_logprobs. verl's ratio_cap is its clip_ratio_c, 3.
    """
    surrogate = Dppo(divergence, delta_low, delta_high, ratio_cap)
    return _common("token-mean", options, surrogate=surrogate)


def vespo(
    k_positive: float = 2.0, lambda_positive: float = 3.0, k_negative: float = 3.0, lambda_negative: float = 2.0,
    **options,
) -> Objective:  # fmt: skip
    """VESPO (arXiv 2602.10693, as released and in TRL): -phi(w) A logp, w the rollout's ratio; mean over tokens."""
    weight = Vespo(k_positive, lambda_positive, k_negative, lambda_negative)
    return _common("token-mean", options, surrogate=Reinforce(), ratio_weights=(weight,))


def gmpo(epsilon_low: float = 0.4, epsilon_high: float = 0.4, **options) -> Objective:
    """GMPO (arXiv 2507.20673): the geometric mean of clipped token ratios; bounds of the log ratio, .4 as released.

    verl's geo_mean averages over a micro-batch's rows whatever the configuration says; ours takes `denominator`.
    """
    surrogate = Gmpo(epsilon_low, epsilon_high)
    return _common("seq-mean-token-mean", options, surrogate=surrogate, ratio_level="sequence")


def gspo_token(**options) -> Objective:
    """GSPO-token (arXiv 2507.18071, and what verl calls gspo): the rollout's ratio, each token's own derivative."""
    surrogate = _clipped(0.2, 0.2, options)
    return _common("seq-mean-token-mean", options, surrogate=surrogate, ratio_level="sequence-token")


def luspo(**options) -> Objective:
    """LUSPO (arXiv 2602.05261, as in TRL): GSPO's loss times the rollout's length, which is a sum over its tokens."""
    surrogate = _clipped(0.2, 0.2, options)
    return _common("seq-mean-token-sum", options, surrogate=surrogate, ratio_level="sequence")


def topr(level: str = "sequence", **options) -> Objective:
    """TOPR (arXiv 2503.14286): -A logp, in negative rollouts times the ratio, at most 1; sums over rollouts."""
    return _common("seq-mean-token-sum", options, surrogate=Reinforce(), ratio_weights=(Topr(level),))


def covariance(t):
    """(A - mean A) (logp - mean logp) of each token, means over the batch's tokens (arXiv 2505.22617)."""
    advantages, logprobs = t.advantages, t.logprobs
    return (advantages - t.batch_mean(advantages)) * (logprobs - t.batch_mean(logprobs))


def kl_cov(ratio: float = 0.0002, penalty: float = 0.1, **options) -> Objective:
    """KL-Cov (arXiv 2505.22617): -A r, and at the `ratio` of tokens of highest covariance + penalty |logp - old|.

    As in verl (ratio 2e-4, its ppo_kl_coef .1; the released scripts: 2e-3 or 2e-4, and 1). The penalty has no gradient
    where logp = old. At least one token is selected.
    """
    rule = TokenRule(
        metric=covariance, source="current", side="high", ratio=ratio, scope="batch", replacement=Ratio(penalty)
    )
    return _common("token-mean", options, surrogate=Ratio(), shaping=(rule,))


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


def clip_cov(ratio: float = 0.0002, low: float = 1.0, high: float = 5.0, seed: int = 0, **options) -> Objective:
    """Clip-Cov (arXiv 2505.22617): the clip, and no surrogate at some tokens whose covariance lies in (low, high).

    At most `ratio` of the batch's tokens, one at least, are taken out of those that the clip leaves. Released code and
    verl draw them by an unseeded generator; here a hash of rollout, position, step and `seed` decides, so that the same
    inputs give the same bits.
    """
    for name, bound in (("low", low), ("high", high)):
        if isinstance(bound, bool) or not isinstance(bound, (int, float)):
            raise TypeError(f"{name} must be a number; got {type(bound).__name__}")
    surrogate = _clipped(0.2, 0.2, options)
    rule = TokenRule(
        metric=CovarianceCandidates(low, high, seed, surrogate), source="current", side="high", ratio=ratio,
        scope="batch", threshold=0.0, replacement=Nothing(),
    )  # fmt: skip
    return _common("token-mean", options, surrogate=surrogate, shaping=(rule,))


presets: dict[str, Callable[..., Objective]] = {
    preset.__name__: preset
    for preset in (
        a3po, cispo, clip_cov, dapo, dppo, dr_grpo, fork_tokens, gmpo, grpo, gspo, gspo_token, kl_cov, lp_reg, luspo,
        nsr, psr, sapo, topr, vespo, w_reinforce,
    )
}  # fmt: skip


def find_preset(name: Any) -> Callable[..., Objective]:
    """The preset of a name; raises ValueError with all of them, and the nearest, for an unknown one."""
    if isinstance(name, str) and name in presets:
        return presets[name]
    near = difflib.get_close_matches(str(name).lower().replace("-", "_"), presets, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"objective must be an Objective or one of {', '.join(presets)}; got {name!r}{hint}")


def as_objective(objective: Any) -> Objective:
    """An Objective as it is, and a preset with its defaults by its name: what every `objective` argument takes.

    `presets` is the registry: a function put there under a name is found by it. Raises ValueError for an unknown name,
    TypeError for anything else.
    """
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, str):
        return find_preset(objective)()
    name = getattr(objective, "__name__", None)
    hint = f"; call it: {name}()" if callable(objective) and presets.get(str(name)) is objective else ""
    raise TypeError(
        f"objective must be an Objective, such as a3po(), or a preset's name; got {type(objective).__name__}{hint}"
    )
