"""What is optimised, as data: the parts an Objective is composed of, and the schedules (SPEC section 3)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from .selection import check_selection, one_of

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def at_least(name: str, value, bound: float, strict: bool = False) -> None:
    """Finite and not below `bound`, or above it if strict."""
    value = float(value)
    if not math.isfinite(value) or value < bound or (strict and value == bound):
        raise ValueError(f"{name} must be finite and {'above' if strict else 'at least'} {bound}, got {value}")


# --- schedules: step -> scale. Any other callable will do as well. ---


@dataclass(frozen=True)
class Constant:
    value: float

    def __call__(self, step) -> float:
        return float(self.value)


@dataclass(frozen=True)
class LinearDecay:
    """A3PO's beta(step) = max(1, rho - alpha step), arXiv 2512.21625.

    rho = 2.0 is the scale of the released scripts; the paper names alpha without a value that we could verify, and
    0.005 is this project's own choice.
    """

    start: float = 2.0
    rate: float = 0.005
    minimum: float = 1.0

    def __call__(self, step) -> float:
        return max(float(self.minimum), self.start - self.rate * float(step))


@dataclass(frozen=True)
class ExponentialDecay:
    start: float
    rate: float
    minimum: float = 1.0

    def __call__(self, step) -> float:
        return self.minimum + (self.start - self.minimum) * math.exp(-self.rate * float(step))


@dataclass(frozen=True)
class CosineDecay:
    """From `start` at step 0 along half a cosine to `minimum`, reached at `steps` and kept."""

    start: float
    steps: float
    minimum: float = 1.0

    def __post_init__(self):
        at_least("steps", self.steps, 0, strict=True)

    def __call__(self, step) -> float:
        done = min(1.0, float(step) / self.steps)
        return self.minimum + (self.start - self.minimum) * 0.5 * (1 + math.cos(math.pi * done))


# --- advantage shaping: factors multiplied onto the advantage ---


@dataclass(frozen=True)
class PolarityWeights:
    """A factor per polarity (PSR, NSR, W-REINFORCE, arXiv 2506.01347). A factor of 0 drops the token."""

    positive: float | Callable = 1.0
    negative: float | Callable = 1.0
    zero: float | Callable = 1.0

    def __post_init__(self):
        for name in ("positive", "negative", "zero"):
            if not callable(getattr(self, name)):
                at_least(name, getattr(self, name), 0)


@dataclass(frozen=True)
class TokenRule:
    """A factor for the tokens at one end of a metric, and one for the rest (A3PO 2512.21625, fork tokens 2506.01939).

    Eligible are the tokens of `polarity` (any, if None) that no earlier shaping step dropped. Among the n eligible
    tokens of a scope, k are selected and get selected_scale(step), the others get rest_scale; the tokens that are not
    eligible are left alone (factor 1).

    metric: "probability" or "entropy"; any other word is a name in scores=; or a function of shaping.TokenValues.
    quantile q: instead of the k, all whose metric is >= ("high") or <= ("low") the eligible metrics' quantile q.
    threshold: of those, only the tokens whose metric is above ("high") or below ("low") it.
    replacement: the surrogate of the selected tokens, instead of the objective's; a later rule's wins.
    """

    polarity: int | None = None
    metric: str | Callable = "probability"
    source: str = "old"
    side: str = "low"
    ratio: float = 0.2
    selected_scale: float | Callable = 1.0
    rest_scale: float | Callable = 1.0
    scope: str = "rollout"
    rounding: str = "floor"
    threshold: float | None = None
    quantile: float | None = None
    replacement: object = None

    def __post_init__(self):
        one_of("polarity", self.polarity, (None, 1, -1))
        if not callable(self.metric) and not isinstance(self.metric, str):
            raise TypeError(f"metric must be a word or a function of the tokens' values, got {self.metric!r}")
        one_of("source", self.source, ("old", "current"))
        check_selection(self.ratio, self.side, self.scope, self.rounding)
        for name in ("selected_scale", "rest_scale"):
            if not callable(getattr(self, name)):
                at_least(name, getattr(self, name), 0)
        if self.threshold is not None:
            at_least("threshold", self.threshold, -math.inf)
        if self.quantile is not None:
            if not 0 <= self.quantile <= 1:
                raise ValueError(f"quantile must be in [0, 1], got {self.quantile}")
            if self.scope != "batch":
                raise ValueError(f"a quantile is one of the batch: scope must be 'batch', got {self.scope!r}")
        if self.replacement is not None and (
            not isinstance(self.replacement, SURROGATES) or isinstance(self.replacement, Gmpo)
        ):
            raise TypeError(f"replacement must be a surrogate of single tokens, got {self.replacement!r}")


# --- surrogates: the loss of a token as a function of its ratio and log-probability ---


@dataclass(frozen=True)
class Clip:
    """PPO's clip with separate bounds (DAPO, 2503.14476), dual clip (1912.09729), two-sided clip `delta` (TRL)."""

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None

    def __post_init__(self):
        at_least("epsilon_low", self.epsilon_low, 0)
        at_least("epsilon_high", self.epsilon_high, 0)
        if self.dual_clip is not None:
            at_least("dual_clip", self.dual_clip, 1, strict=True)
        if self.delta is not None:
            at_least("delta", self.delta, 0, strict=True)


@dataclass(frozen=True)
class Cispo:
    """CISPO (2506.13585). epsilon_high is the raw upper bound of the ratio, as in TRL; epsilon_low adds 1 - eps_low."""

    epsilon_high: float = 1.28
    epsilon_low: float | None = None

    def __post_init__(self):
        at_least("epsilon_high", self.epsilon_high, 0, strict=True)
        if self.epsilon_low is not None:
            at_least("epsilon_low", self.epsilon_low, 0)


@dataclass(frozen=True)
class Sapo:
    """SAPO (2511.20347): a sigmoid gate on the ratio, softer or harder by the sign of the advantage."""

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self):
        at_least("tau_positive", self.tau_positive, 0, strict=True)
        at_least("tau_negative", self.tau_negative, 0, strict=True)


@dataclass(frozen=True)
class Reinforce:
    """-A log p."""


@dataclass(frozen=True)
class Dppo:
    """DPPO (2602.04879) as its authors and verl release it: -sg(min(r, ratio_cap)) A log p where M, else 0.

    M holds a token whose divergence from the old policy is small, or whose update would make it smaller: "tv" compares
    p - p_old with the deltas, "kl" the divergence of the two Bernoulli distributions of taking the token.
    """

    divergence: str = "tv"
    delta_low: float = 0.2
    delta_high: float = 0.2
    ratio_cap: float | None = None

    def __post_init__(self):
        one_of("divergence", self.divergence, ("tv", "kl"))
        at_least("delta_low", self.delta_low, 0)
        at_least("delta_high", self.delta_high, 0)
        if self.ratio_cap is not None:
            at_least("ratio_cap", self.ratio_cap, 0, strict=True)


@dataclass(frozen=True)
class Gmpo:
    """GMPO (2507.20673): -A R, R the geometric mean of the rollout's ratios, each log ratio clipped on one side."""

    epsilon_low: float = 0.4
    epsilon_high: float = 0.4

    def __post_init__(self):
        at_least("epsilon_low", self.epsilon_low, 0)
        at_least("epsilon_high", self.epsilon_high, 0)


@dataclass(frozen=True)
class Ratio:
    """-A r + penalty |l - l_old|: KL-Cov's loss of a token (2505.22617); without the penalty, no clip at all."""

    penalty: float = 0.0

    def __post_init__(self):
        at_least("penalty", self.penalty, 0)


@dataclass(frozen=True)
class Nothing:
    """0: what Clip-Cov leaves of a token (2505.22617)."""


SURROGATES = (Clip, Cispo, Sapo, Reinforce, Dppo, Gmpo, Ratio, Nothing)


# --- ratio weights: constant factors of the surrogate, made of the log ratios ---


@dataclass(frozen=True)
class OffPolicyMask:
    """0 where A < 0 and the rollout's mean of l_old - l is above the threshold (DeepSeek-V3.2, 2512.02556, eq. 9)."""

    threshold: float

    def __post_init__(self):
        at_least("threshold", self.threshold, 0)


@dataclass(frozen=True)
class Vespo:
    """VESPO (2602.10693): e^lambda w^k e^(-lambda w), w the rollout's ratio, a product; k, lambda by the sign of A."""

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0

    def __post_init__(self):
        for name in ("k_positive", "lambda_positive", "k_negative", "lambda_negative"):
            at_least(name, getattr(self, name), 0)


@dataclass(frozen=True)
class Topr:
    """TOPR (2503.14286): 1 where A >= 0, else the ratio held within [low, high].

    The ratio is the rollout's product ("sequence", the paper), its geometric mean or the token's own.
    """

    level: str = "sequence"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        one_of("level", self.level, ("sequence", "geometric", "token"))
        at_least("low", self.low, 0)
        at_least("high", self.high, self.low)


@dataclass(frozen=True)
class MinPRegularizer:
    """Lp-Reg (2510.03222): the regulariser of the least likely tokens with negative advantage."""

    quantile: float = 0.01
    min_p: float = 0.02
    beta: float = 1.0

    def __post_init__(self):
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile must be in (0, 1], got {self.quantile}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        at_least("beta", self.beta, 0)


@dataclass(frozen=True)
class Objective:
    """Shaping -> surrogate -> regularisers -> aggregation."""

    shaping: tuple = ()
    surrogate: Clip | Cispo | Sapo | Reinforce | Dppo | Gmpo | Ratio | Nothing = Clip()
    ratio_level: str = "token"
    ratio_weights: tuple = ()
    log_ratio_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_clamp: float | None = None
    entropy_coef: float = 0.0
    low_probability: MinPRegularizer | None = None
    aggregation: str = "token-mean"
    normalize_over: str = "all"

    def __post_init__(self):
        object.__setattr__(self, "shaping", tuple(self.shaping))
        object.__setattr__(self, "ratio_weights", tuple(self.ratio_weights))
        for step in self.shaping:
            if not isinstance(step, (PolarityWeights, TokenRule)):
                raise TypeError(f"shaping takes PolarityWeights and TokenRule, got {step!r}")
        if not isinstance(self.surrogate, SURROGATES):
            names = ", ".join(kind.__name__ for kind in SURROGATES)
            raise TypeError(f"surrogate must be one of {names}, got {self.surrogate!r}")
        for weight in self.ratio_weights:
            if not isinstance(weight, (OffPolicyMask, Vespo, Topr)):
                raise TypeError(f"ratio_weights takes OffPolicyMask, Vespo and Topr, got {weight!r}")
        one_of("ratio_level", self.ratio_level, ("token", "sequence", "sequence-token"))
        replacements = [step.replacement for step in self.shaping if getattr(step, "replacement", None) is not None]
        if replacements and isinstance(self.surrogate, Gmpo):
            raise ValueError("a rule's replacement is of single tokens, Gmpo's ratio of the whole rollout")
        if replacements and self.low_probability is not None:
            raise ValueError("low_probability and a rule's replacement both take the surrogate's place: give one")
        for surrogate in (self.surrogate, *replacements):
            if isinstance(surrogate, Dppo) and self.ratio_level != "token":
                raise ValueError(f"Dppo needs ratio_level 'token', got {self.ratio_level!r}")
        if isinstance(self.surrogate, Gmpo) and self.ratio_level != "sequence":
            raise ValueError(f"Gmpo needs ratio_level 'sequence', got {self.ratio_level!r}")
        one_of("kl_estimator", self.kl_estimator, ("k1", "k2", "k3", "k3-ratio"))
        other_ratio = self.ratio_level == "sequence-token" or isinstance(self.surrogate, Gmpo)
        if self.kl_estimator == "k3-ratio" and other_ratio:
            raise ValueError("kl_estimator 'k3-ratio' needs the ratio of the token or of the rollout")
        if self.kl_clamp is not None:
            at_least("kl_clamp", self.kl_clamp, 0, strict=True)
        at_least("log_ratio_coef", self.log_ratio_coef, 0)
        one_of("aggregation", self.aggregation, AGGREGATIONS)
        one_of("normalize_over", self.normalize_over, ("all", "selected"))
