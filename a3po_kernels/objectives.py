"""What is optimised, as data: shaping rules, a surrogate, regularisers and an aggregation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Union

from .core.checks import as_tuple, check_number, check_selection, check_word
from .schedules import Schedule
from .surrogates import (
    SURROGATES,
    Cispo,
    Clip,
    CustomSurrogate,
    Dppo,
    Gmpo,
    Nothing,
    Ratio,
    Reinforce,
    Sapo,
    Surrogate,
    check_surrogate,
)

__all__ = [
    "AGGREGATIONS", "KL_ESTIMATORS", "POLICY_METRICS", "RATIO_WEIGHTS", "SURROGATES", "Cispo", "Clip",
    "CustomSurrogate", "Dppo", "Gmpo", "MinPRegularizer", "Nothing", "Objective", "OffPolicyMask", "PolarityWeights",
    "Ratio", "RatioWeight", "Reinforce", "Sapo", "Surrogate", "TokenRule", "Topr", "Vespo",
]  # fmt: skip

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
KL_ESTIMATORS = ("k1", "k2", "k3", "k3-ratio")
POLICY_METRICS = ("probability", "entropy")


@dataclass(frozen=True)
class PolarityWeights:
    """Weights of the tokens of positive, negative and neutral rollouts; a weight of 0 drops the token.

    positive, negative and zero are each a number of at least 0 (else ValueError is raised) or a schedule step -> value.
    (1, 0, 0) is PSR, (0, 1, 0) NSR and (lambda, 1) W-REINFORCE (arXiv 2506.01347).
    """

    positive: float | Schedule = 1.0
    negative: float | Schedule = 1.0
    zero: float | Schedule = 1.0

    def __post_init__(self):
        for name in ("positive", "negative", "zero"):
            if not callable(getattr(self, name)):
                check_number(name, getattr(self, name), 0.0)

    @property
    def scheduled(self) -> bool:
        """Whether a weight depends on the step."""
        return any(map(callable, (self.positive, self.negative, self.zero)))


@dataclass(frozen=True)
class TokenRule:
    """Weights of the k lowest or highest tokens of a scope by a metric, and of the other eligible tokens.

    polarity: +1, -1 or None (any): whose tokens are eligible. Tokens that an earlier rule dropped are not.
    metric, source: "probability" or "entropy", of the "old" (behaviour) or the "current" policy; or the name of one of
        the caller's `scores`; or a function of the batch's tokens, t -> [N], as CustomSurrogate's (with source "old" it
        may not read the current policy's log-probs and entropy; its result is a constant of the objective).
    side, ratio, scope, rounding: the "low" or "high" end of the metric; the share, in (0, 1], of the tokens of each
        "rollout", of the "batch", or, "global", of the batches of all data-parallel ranks, one at least; "floor" or
        "ceil" of ratio times their number.
    threshold: of those, only the ones above it (side "high") or below (side "low"); ratio=1 leaves it alone.
    quantile: in [0, 1], instead of a share, with ratio and rounding left as they are: whatever reaches this quantile of
        the batch's eligible tokens, ties included, NaN as the largest value; scope "batch".
    selected_scale: weight of the selected tokens, a number or a schedule step -> value.
    rest_scale: weight of the eligible tokens that were not selected; 0 drops them (a keep rule).
    replacement: a surrogate of one token that takes the place of the objective's at the selected tokens.

    Raises ValueError and TypeError for a value out of range or not among its words, and for one without a use: a share
    beside a quantile, the source of a score.
    """

    polarity: int | None = None
    metric: str | Callable[[Any], Any] = "probability"
    source: str = "old"
    side: str = "low"
    ratio: float = 0.2
    selected_scale: float | Schedule = 1.0
    rest_scale: float = 1.0
    scope: str = "rollout"
    rounding: str = "floor"
    threshold: float | None = None
    quantile: float | None = None
    replacement: Surrogate | None = None

    def __post_init__(self):
        if self.polarity not in (None, 1, -1):
            raise ValueError(f"polarity must be 1, -1 or None; got {self.polarity!r}")
        if not callable(self.metric) and not isinstance(self.metric, str):
            raise TypeError(f"metric must be a name or a function; got {type(self.metric).__name__}")
        check_word("source", self.source, ("old", "current"))
        if not self.reads_policy and self.source != "old":
            raise ValueError(f"source is of a policy's metric, and {self.metric!r} is a score; got {self.source!r}")
        check_selection(self.ratio, self.side, self.scope, self.rounding)
        if not callable(self.selected_scale):
            check_number("selected_scale", self.selected_scale, 0.0)
        check_number("rest_scale", self.rest_scale, 0.0)
        if self.threshold is not None:
            check_number("threshold", self.threshold, -math.inf)
        if self.quantile is not None:
            check_number("quantile", self.quantile, 0.0, 1.0)
            if self.scope != "batch":
                raise ValueError(f"quantile is taken over the batch: scope must be 'batch'; got {self.scope!r}")
            for name, default in (("ratio", 0.2), ("rounding", "floor")):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} is of a share, and quantile selects instead; got {getattr(self, name)!r}")
        other = self.replacement
        if isinstance(other, Gmpo):
            raise TypeError("replacement must be a surrogate of one token; got Gmpo")
        if other is not None:
            check_surrogate("replacement", other, tuple(kind for kind in SURROGATES if kind is not Gmpo))
        if isinstance(other, CustomSurrogate) and other.depends_on != "token":
            raise ValueError(f"replacement must be a surrogate of one token; got depends_on = {other.depends_on!r}")

    @property
    def reads_policy(self) -> bool:
        """Whether the metric is of a policy, old or current, and not a score of the caller's."""
        return callable(self.metric) or self.metric in POLICY_METRICS

    @property
    def may_read_current(self) -> bool:
        """Whether the metric is, or on-policy becomes, one of the current policy."""
        return self.source == "current" if callable(self.metric) else self.reads_policy


@dataclass(frozen=True)
class OffPolicyMask:
    """0 for the rollouts with A < 0 whose mean of old - logp is above a threshold, else 1 (DeepSeek-V3.2, 2512.02556).

    As in the paper and in TRL only the surrogate is masked: denominators and KL term stay. Raises ValueError for a
    threshold, in nats, below 0.
    """

    threshold: float

    def __post_init__(self):
        check_number("threshold", self.threshold, 0.0)


@dataclass(frozen=True)
class Vespo:
    """exp(lambda + k log w - lambda w) of the rollout's ratio w, 1 at w = 1 (VESPO, arXiv 2602.10693, as in TRL).

    log w is the sum over the rollout's tokens of the log ratio, each clamped to +-20, and of the logarithms of the
    importance weights, which are then not multiplied again, clamped to [log 1e-8, 20]. k_positive and lambda_positive
    hold where A >= 0, else k_negative and lambda_negative. Raises ValueError for one below 0.
    """

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0

    def __post_init__(self):
        for name in ("k_positive", "lambda_positive", "k_negative", "lambda_negative"):
            check_number(name, getattr(self, name), 0.0)


@dataclass(frozen=True)
class Topr:
    """1 where A >= 0, else the ratio clamped to [low, high] (TOPR, arXiv 2503.14286).

    level: the ratio of the "sequence", a product as in the paper, its "geometric" mean, or the "token"'s (Trinity).
    Raises ValueError for another level or bounds that are not 0 <= low <= high.
    """

    level: str = "sequence"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        check_word("level", self.level, ("sequence", "geometric", "token"))
        check_number("low", self.low, 0.0)
        check_number("high", self.high, self.low)


RatioWeight = Union[OffPolicyMask, Vespo, Topr]
RATIO_WEIGHTS = (OffPolicyMask, Vespo, Topr)


@dataclass(frozen=True)
class MinPRegularizer:
    """Lp-Reg's regulariser (arXiv 2510.03222): it replaces the surrogate of some unlikely tokens.

    Candidates are the floor(n quantile) tokens of lowest current log-prob among the n tokens of the batch with A < 0,
    if that is more than one. Where logp < t, t the old policy's log-prob among the tokens with p >= min_p * max p, the
    loss becomes -A r + beta * clamp(e^(t - logp) - (t - logp) - 1, -10, 10). quantile and min_p are in (0, 1], beta at
    least 0; else ValueError is raised.
    """

    quantile: float = 0.01
    min_p: float = 0.02
    beta: float = 1.0

    def __post_init__(self):
        check_number("quantile", self.quantile, 0.0, 1.0, above=True)
        check_number("min_p", self.min_p, 0.0, 1.0, above=True)
        check_number("beta", self.beta, 0.0)


@dataclass(frozen=True)
class Objective:
    """A policy objective, to be minimised.

    shaping: PolarityWeights and TokenRules, multiplied in the order listed.
    surrogate: the loss of a token: a Clip, Cispo, Sapo, Reinforce, Dppo, Gmpo, Ratio, Nothing or CustomSurrogate.
    ratio_level: "token", or "sequence" for the ratio exp(mean over the rollout of logp - old) (GSPO, arXiv 2507.18071),
        or "sequence-token" for that value with each token's own derivative (GSPO-token).
    ratio_weights: factors of the surrogate that read the ratio, without a gradient: OffPolicyMask, Vespo, Topr.
    log_ratio_coef: coefficient of (logp - old)^2 (Kimi K2.5, arXiv 2602.02276; prime-rl), not importance-weighted.
    kl_coef, kl_estimator: coefficient and estimator of the KL term to the reference policy: k1, k2, k3, or k3-ratio, k3
        times the token's ratio r and differentiated through it, which is unbiased off-policy (DeepSeek-V3.2, arXiv
        2512.02556; TRL's use_bias_correction_kl). The latter needs ratio_level "token".
    kl_clamp: where the log ratio to the reference policy goes beyond +-kl_clamp it is held there, and has no gradient:
        k3 is inf in fp32 from 88 nats on (TRL's too). None: off. metrics["kl_clamped_fraction"] counts the tokens.
    entropy_coef: coefficient of the entropy bonus.
    low_probability: a MinPRegularizer, or None.
    aggregation: "token-mean", "seq-mean-token-sum", "seq-mean-token-mean" or "seq-mean-token-sum-norm".
    normalize_over: "all" tokens, or the "selected" ones: those that shaping did not drop.

    Raises ValueError and TypeError for a value out of range or not among its words, and for parts that do not go
    together, such as a ratio_level that the surrogate cannot have or does not read.
    """

    shaping: tuple[PolarityWeights | TokenRule, ...] = ()
    surrogate: Surrogate = field(default_factory=Clip)
    ratio_level: str = "token"
    ratio_weights: tuple[RatioWeight, ...] = ()
    log_ratio_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_clamp: float | None = None
    entropy_coef: float = 0.0
    low_probability: MinPRegularizer | None = None
    aggregation: str = "token-mean"
    normalize_over: str = "all"

    def __post_init__(self):
        object.__setattr__(self, "shaping", as_tuple("shaping", self.shaping, (PolarityWeights, TokenRule)))
        check_surrogate("surrogate", self.surrogate, SURROGATES)
        weights = as_tuple("ratio_weights", self.ratio_weights, RATIO_WEIGHTS)
        object.__setattr__(self, "ratio_weights", weights)
        check_word("ratio_level", self.ratio_level, ("token", "sequence", "sequence-token"))
        if isinstance(self.surrogate, Gmpo) and self.ratio_level != "sequence":
            raise ValueError(f"Gmpo is of the rollout: ratio_level must be 'sequence'; got {self.ratio_level!r}")
        replaces = any(isinstance(rule, TokenRule) and rule.replacement is not None for rule in self.shaping)
        if isinstance(self.surrogate, Gmpo) and replaces:
            raise ValueError("a rule's replacement is of single tokens, and Gmpo's ratio of the whole rollout")
        if self.low_probability is not None and replaces:
            raise ValueError("low_probability replaces the surrogate of some tokens, and so does a rule: take one")
        others = [rule.replacement for rule in self.shaping if isinstance(rule, TokenRule)]
        if self.ratio_level != "token" and any(isinstance(x, Dppo) for x in (self.surrogate, *others)):
            raise ValueError(f"Dppo is of the token: ratio_level must be 'token'; got {self.ratio_level!r}")
        surrogates = [self.surrogate, *(other for other in others if other is not None)]
        blind = self.low_probability is None and all(isinstance(x, (Reinforce, Nothing)) for x in surrogates)
        if self.ratio_level != "token" and blind:
            name = type(self.surrogate).__name__
            raise ValueError(f"{name} reads no ratio: ratio_level must be 'token'; got {self.ratio_level!r}")
        check_number("log_ratio_coef", self.log_ratio_coef, 0.0)
        if self.ratio_level != "token" and any(isinstance(x, CustomSurrogate) for x in (self.surrogate, *others)):
            raise ValueError("ratio_level 'sequence' is t.rollout_mean(t.log_ratio) in a CustomSurrogate's function")
        if self.low_probability is not None and isinstance(self.surrogate, CustomSurrogate):
            raise ValueError("low_probability replaces the loss of some tokens, which a CustomSurrogate writes itself")
        check_number("kl_coef", self.kl_coef, 0.0)
        check_word("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if self.kl_clamp is not None:
            check_number("kl_clamp", self.kl_clamp, 0.0, above=True)
        if self.kl_estimator == "k3-ratio" and self.ratio_level != "token":
            raise ValueError(f"kl_estimator 'k3-ratio' needs ratio_level 'token'; got {self.ratio_level!r}")
        check_number("entropy_coef", self.entropy_coef, -math.inf)
        if self.low_probability is not None and not isinstance(self.low_probability, MinPRegularizer):
            raise TypeError(f"low_probability must be a MinPRegularizer; got {type(self.low_probability).__name__}")
        check_word("aggregation", self.aggregation, AGGREGATIONS)
        check_word("normalize_over", self.normalize_over, ("all", "selected"))
