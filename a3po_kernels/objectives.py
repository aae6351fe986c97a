"""What is optimised, as data: shaping rules, a surrogate, regularisers and an aggregation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Union

from .core.checks import check_selection
from .schedules import Schedule

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
KL_ESTIMATORS = ("k1", "k2", "k3", "k3-ratio")


def _check_number(name: str, value: object, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Raises TypeError for a non-number, ValueError outside [low, high] (outside (low, high] with `above`)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not (low < value <= high if above else low <= value <= high) or not -math.inf < value < math.inf:
        bracket = "(" if above else "["
        raise ValueError(f"{name} must be finite and lie in {bracket}{low}, {high}]; got {value}")


def _check_word(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


@dataclass(frozen=True)
class PolarityWeights:
    """Weights of the tokens of positive, negative and neutral rollouts; a weight of 0 drops the token.

    (1, 0, 0) is PSR, (0, 1, 0) NSR and (lambda, 1) W-REINFORCE (arXiv 2506.01347).
    """

    positive: float = 1.0
    negative: float = 1.0
    zero: float = 1.0

    def __post_init__(self):
        for name in ("positive", "negative", "zero"):
            _check_number(name, getattr(self, name), 0.0)


@dataclass(frozen=True)
class TokenRule:
    """Weights of the k lowest or highest tokens of a scope by a metric, and of the other eligible tokens.

    polarity: +1, -1 or None (any): whose tokens are eligible. Tokens that an earlier rule dropped are not.
    metric, source: "probability" or "entropy", of the "old" (behaviour) or the "current" policy.
    side, ratio, scope, rounding: which tokens are selected; see select_tokens.
    selected_scale: weight of the selected tokens, a number or a schedule step -> value.
    rest_scale: weight of the eligible tokens that were not selected; 0 drops them (a keep rule).
    """

    polarity: int | None = None
    metric: str = "probability"
    source: str = "old"
    side: str = "low"
    ratio: float = 0.2
    selected_scale: float | Schedule = 1.0
    rest_scale: float = 1.0
    scope: str = "rollout"
    rounding: str = "floor"

    def __post_init__(self):
        if self.polarity not in (None, 1, -1):
            raise ValueError(f"polarity must be 1, -1 or None; got {self.polarity!r}")
        _check_word("metric", self.metric, ("probability", "entropy"))
        _check_word("source", self.source, ("old", "current"))
        check_selection(self.ratio, self.side, self.scope, self.rounding)
        if not callable(self.selected_scale):
            _check_number("selected_scale", self.selected_scale, 0.0)
        _check_number("rest_scale", self.rest_scale, 0.0)


@dataclass(frozen=True)
class Clip:
    """max(-A r, -A clamp(r, 1 - epsilon_low, 1 + epsilon_high)) (PPO; DAPO's two bounds, arXiv 2503.14476).

    dual_clip c: where A < 0, min(that, -A c) (arXiv 1912.09729). delta: the unclipped branch uses min(r, delta).
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None

    def __post_init__(self):
        _check_number("epsilon_low", self.epsilon_low, 0.0, 1.0)
        _check_number("epsilon_high", self.epsilon_high, 0.0)
        if self.dual_clip is not None:
            _check_number("dual_clip", self.dual_clip, 1.0, above=True)
        if self.delta is not None:
            _check_number("delta", self.delta, 0.0, above=True)


@dataclass(frozen=True)
class Cispo:
    """-sg(clamp(r)) A logp (CISPO, arXiv 2506.13585).

    epsilon_high is the raw upper bound of r, as in TRL; epsilon_low, if given, adds the lower bound 1 - epsilon_low.
    """

    epsilon_high: float = 1.28
    epsilon_low: float | None = None

    def __post_init__(self):
        _check_number("epsilon_high", self.epsilon_high, 0.0, above=True)
        if self.epsilon_low is not None:
            _check_number("epsilon_low", self.epsilon_low, 0.0, 1.0)


@dataclass(frozen=True)
class Sapo:
    """-A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A (SAPO, arXiv 2511.20347)."""

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self):
        _check_number("tau_positive", self.tau_positive, 0.0, above=True)
        _check_number("tau_negative", self.tau_negative, 0.0, above=True)


@dataclass(frozen=True)
class Reinforce:
    """-A logp."""


@dataclass(frozen=True)
class CustomSurrogate:
    """A loss of your own: a PyTorch function of a batch's tokens, whose derivatives autograd finds.

    loss(t) -> [N], the loss of each token, from t's flat [N] tensors in the statistics' dtype: logprobs, old_logprobs,
    log_ratio, ratio (as Clip has it: the log ratio clamped to +-20), advantages (the shaped ones, weights in them),
    weights, polarity, entropy, ref_logprobs, mask (bool) and selected (bool, by any TokenRule), and t.rollout_mean(x),
    t.rollout_sum(x) over the tokens of each one's rollout. Rows that are no token hold 0, and what the function gives
    for them, and for dropped tokens, does not matter. It takes part as the built-in surrogates do: importance weights,
    KL and entropy terms and the aggregation follow. It should neither write into t's tensors nor wait for the device.

    depends_on: what the loss of a token is a function of: that "token" alone, its "rollout", or the whole "batch". It
    decides what may be cut into chunks or left out, and is checked once on an example.
    """

    loss: Callable[[Any], Any]
    depends_on: str = "token"

    def __post_init__(self):
        if not callable(self.loss):
            raise TypeError(f"loss must be a function of a batch's tokens; got {type(self.loss).__name__}")
        _check_word("depends_on", self.depends_on, ("token", "rollout", "batch"))


Surrogate = Union[Clip, Cispo, Sapo, Reinforce, CustomSurrogate]
SURROGATES = (Clip, Cispo, Sapo, Reinforce, CustomSurrogate)


@dataclass(frozen=True)
class MinPRegularizer:
    """Lp-Reg's regulariser (arXiv 2510.03222): it replaces the surrogate of some unlikely tokens.

    Candidates are the floor(n q) tokens of lowest current log-prob among the n tokens of the batch with A < 0, if that
    is more than one. Where logp < t, t the old policy's log-prob among the tokens with p >= min_p * max p, the loss
    becomes -A r + beta * clamp(e^(t - logp) - (t - logp) - 1, -10, 10).
    """

    quantile: float = 0.01
    min_p: float = 0.02
    beta: float = 1.0

    def __post_init__(self):
        _check_number("quantile", self.quantile, 0.0, 1.0, above=True)
        _check_number("min_p", self.min_p, 0.0, 1.0, above=True)
        _check_number("beta", self.beta, 0.0)


@dataclass(frozen=True)
class Objective:
    """A policy objective, to be minimised.

    shaping: PolarityWeights and TokenRules, multiplied in the order listed.
    surrogate: Clip, Cispo, Sapo, Reinforce or a CustomSurrogate.
    ratio_level: "token", or "sequence" for the ratio exp(mean over the rollout of logp - old) (GSPO, arXiv 2507.18071).
    kl_coef, kl_estimator: coefficient and estimator of the KL term to the reference policy: k1, k2, k3, or k3-ratio, k3
        times the token's ratio r and differentiated through it, which is unbiased off-policy (DeepSeek-V3.2, arXiv
        2512.02556; TRL's use_bias_correction_kl). The latter needs ratio_level "token".
    kl_clamp: where the log ratio to the reference policy goes beyond +-kl_clamp it is held there, and has no gradient:
        k3 is inf in fp32 from 88 nats on (TRL's too). None: off. metrics["kl_clamped_fraction"] counts the tokens.
    entropy_coef: coefficient of the entropy bonus.
    low_probability: a MinPRegularizer, or None.
    aggregation: one of AGGREGATIONS.
    normalize_over: "all" tokens, or the "selected" ones: those that shaping did not drop.
    """

    shaping: tuple[PolarityWeights | TokenRule, ...] = ()
    surrogate: Surrogate = field(default_factory=Clip)
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
        for rule in self.shaping:
            if not isinstance(rule, (PolarityWeights, TokenRule)):
                raise TypeError(f"shaping takes PolarityWeights and TokenRule; got {type(rule).__name__}")
        if not isinstance(self.surrogate, SURROGATES):
            takes = ", ".join(kind.__name__ for kind in SURROGATES)
            raise TypeError(f"surrogate must be one of {takes}; got {type(self.surrogate).__name__}")
        _check_word("ratio_level", self.ratio_level, ("token", "sequence"))
        if self.ratio_level == "sequence" and isinstance(self.surrogate, CustomSurrogate):
            raise ValueError("ratio_level 'sequence' is t.rollout_mean(t.log_ratio) in a CustomSurrogate's function")
        if self.low_probability is not None and isinstance(self.surrogate, CustomSurrogate):
            raise ValueError("low_probability replaces the loss of some tokens, which a CustomSurrogate writes itself")
        _check_number("kl_coef", self.kl_coef, 0.0)
        _check_word("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if self.kl_clamp is not None:
            _check_number("kl_clamp", self.kl_clamp, 0.0, above=True)
        if self.kl_estimator == "k3-ratio" and self.ratio_level == "sequence":
            raise ValueError("kl_estimator 'k3-ratio' needs ratio_level 'token'; got 'sequence'")
        _check_number("entropy_coef", self.entropy_coef, -math.inf)
        if self.low_probability is not None and not isinstance(self.low_probability, MinPRegularizer):
            raise TypeError(f"low_probability must be a MinPRegularizer; got {type(self.low_probability).__name__}")
        _check_word("aggregation", self.aggregation, AGGREGATIONS)
        _check_word("normalize_over", self.normalize_over, ("all", "selected"))
