"""The published objectives by name: each a composition of the parts in objectives.py."""

from __future__ import annotations

from collections.abc import Callable

from .objectives import Cispo, Clip, MinPRegularizer, Objective, PolarityWeights, Sapo, TokenRule
from .schedules import LinearDecay, Schedule


def _common(aggregation: str, options: dict, **fields) -> Objective:
    """An Objective from a preset's fields and the overrides that every preset takes."""
    known = {"kl_coef", "kl_estimator", "kl_clamp", "entropy_coef", "aggregation", "ratio_level"}
    unknown = sorted(set(options) - known)
    if unknown:
        clip = {"epsilon_low", "epsilon_high", "dual_clip", "delta"} if isinstance(fields["surrogate"], Clip) else set()
        takes = ", ".join(sorted(known | clip))
        raise TypeError(f"unexpected keyword {unknown[0]!r}; besides its own, this preset takes {takes}")
    return Objective(**{"aggregation": aggregation, **fields, **options})


def _clipped(low: float, high: float, options: dict) -> Clip:
    """The clip surrogate of a preset, its overrides taken out of `options`."""
    given = {name: options.pop(name) for name in ("dual_clip", "delta") if name in options}
    return Clip(options.pop("epsilon_low", low), options.pop("epsilon_high", high), **given)


def grpo(**options) -> Objective:
    """GRPO (DeepSeekMath, arXiv 2402.03300): clip .2/.2, k3 KL (coefficient 0 unless given), mean of rollout means.

    Keywords, here and in every preset: kl_coef, kl_estimator, kl_clamp, entropy_coef, aggregation, ratio_level, and
    (where the surrogate is the clip) epsilon_low, epsilon_high, dual_clip, delta. Values out of range raise ValueError.
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
    **options,
) -> Objective:
    """A3PO (arXiv 2512.21625): DAPO with adaptive, asymmetric token weights.

    In a positive rollout the `ratio` of its tokens of lowest old probability, and in a negative one those of highest,
    weigh beta(step) = max(1, rho - alpha * step); all other tokens weigh 1. rho = 2.0 is the released scripts' scale;
    the paper gives no alpha that we could verify: the default 0.005 is ours. `schedule` replaces beta. With
    metric="entropy" the positive rollouts' tokens of highest entropy and the negative ones' of lowest do.
    """
    beta = LinearDecay(rho, alpha) if schedule is None else schedule
    unlikely, likely = ("low", "high") if metric == "probability" else ("high", "low")
    shaping = tuple(
        TokenRule(polarity, metric, source, side, ratio, beta) for polarity, side in ((1, unlikely), (-1, likely))
    )
    surrogate = _clipped(0.2, 0.28, options)
    return _common("token-mean", options, surrogate=surrogate, shaping=shaping)


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


presets: dict[str, Callable[..., Objective]] = {
    preset.__name__: preset
    for preset in (a3po, cispo, dapo, dr_grpo, fork_tokens, grpo, gspo, lp_reg, nsr, psr, sapo, w_reinforce)
}
