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

    positive: float = 1.0
    negative: float = 1.0
    zero: float = 1.0

    def __post_init__(self):
        for name in ("positive", "negative", "zero"):
            at_least(name, getattr(self, name), 0)


@dataclass(frozen=True)
class TokenRule:
    """A factor for the tokens at one end of a metric, and one for the rest (A3PO 2512.21625, fork tokens 2506.01939).

    Eligible are the tokens of `polarity` (any, if None) that no earlier shaping step dropped. Among the n eligible
    tokens of a scope, k are selected and get selected_scale(step), the others get rest_scale; the tokens that are not
    eligible are left alone (factor 1).
    """

    polarity: int | None = None
    metric: str = "probability"
    source: str = "old"
    side: str = "low"
    ratio: float = 0.2
    selected_scale: float | Callable = 1.0
    rest_scale: float | Callable = 1.0
    scope: str = "rollout"
    rounding: str = "floor"

    def __post_init__(self):
        one_of("polarity", self.polarity, (None, 1, -1))
        one_of("metric", self.metric, ("probability", "entropy"))
        one_of("source", self.source, ("old", "current"))
        check_selection(self.ratio, self.side, self.scope, self.rounding)
        for name in ("selected_scale", "rest_scale"):
            if not callable(getattr(self, name)):
                at_least(name, getattr(self, name), 0)


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
    surrogate: Clip | Cispo | Sapo | Reinforce = Clip()
    ratio_level: str = "token"
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_clamp: float | None = None
    entropy_coef: float = 0.0
    low_probability: MinPRegularizer | None = None
    aggregation: str = "token-mean"
    normalize_over: str = "all"

    def __post_init__(self):
        object.__setattr__(self, "shaping", tuple(self.shaping))
        for step in self.shaping:
            if not isinstance(step, (PolarityWeights, TokenRule)):
                raise TypeError(f"shaping takes PolarityWeights and TokenRule, got {step!r}")
        if not isinstance(self.surrogate, (Clip, Cispo, Sapo, Reinforce)):
            raise TypeError(f"surrogate must be Clip, Cispo, Sapo or Reinforce, got {self.surrogate!r}")
        one_of("ratio_level", self.ratio_level, ("token", "sequence"))
        one_of("kl_estimator", self.kl_estimator, ("k1", "k2", "k3", "k3-ratio"))
        if self.kl_clamp is not None:
            at_least("kl_clamp", self.kl_clamp, 0, strict=True)
        one_of("aggregation", self.aggregation, AGGREGATIONS)
        one_of("normalize_over", self.normalize_over, ("all", "selected"))
