"""What an objective is to a backend: code words, run-time numbers, and the names of what it gives back."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Columns of the partial sums; the last is a maximum.
SUMS = (
    "loss", "entropy", "kl", "approx_kl", "ratio", "clip_low", "clip_high", "dual_clip", "selected_positive",
    "selected_negative", "positive", "negative", "active", "tokens", "kl_clamped", "ratio_max",
)  # fmt: skip
METRICS = (
    "entropy", "kl", "approx_kl", "ratio_mean", "ratio_max", "clip_fraction_low", "clip_fraction_high",
    "dual_clip_fraction", "selected_fraction_positive", "selected_fraction_negative", "active_fraction", "token_count",
    "weight", "kl_clamped_fraction",
)  # fmt: skip


class SurrogateForm(NamedTuple):
    """What the loss of a token is. Words choose code, numbers are run-time values.

    kind: "clip", "cispo", "sapo", "reinforce", "dppo-tv", "dppo-kl", "gmpo", "ratio", or "none" where something else
    finds that part of the loss. sequence: the ratio is the rollout's; own_gradient: differentiated as each token's own.
    low, high: bounds of the ratio (cispo: low 0 is none), of the divergence (dppo) or of the log ratio (gmpo);
    dual_clip (dppo: the ratio's cap), delta, kl_clamp: inf is none; tau_positive, tau_negative: SAPO's; beta: weight of
    the replacement regulariser; log_ratio_coef: of the squared log ratio to the behaviour policy; penalty: of its size.
    """

    kind: str
    sequence: bool
    own_gradient: bool
    kl_estimator: str
    low: float
    high: float
    dual_clip: float
    delta: float
    tau_positive: float
    tau_negative: float
    kl_coef: float
    entropy_coef: float
    beta: float
    kl_clamp: float
    log_ratio_coef: float
    penalty: float

    @property
    def numbers(self) -> tuple[float, ...]:
        return self[4:]


class RuleForm(NamedTuple):
    """Of the k lowest (or highest) eligible tokens of each rollout by a metric [N]: the factors of their weights.

    polarity: whose tokens are eligible, +1, -1 or 0 for any; scale, rest: of the selected, and of the other eligible.
    """

    metric: Tensor
    polarity: int
    high: bool
    ceil: bool
    ratio: float
    scale: float | Tensor
    rest: float


class PolicyInputs(NamedTuple):
    """What the loss of N tokens reads besides their statistics: flat [N] tensors, 0 or anything where no token is.

    tokens: bool; rollout: int32, the rollout of each row; weights: shaping factors, 0 for a dropped token; old,
    reference: log-probs; proxy: log-probs of the regulariser that replaces the `replaced` tokens' loss; offsets,
    counts: [S + 1] and [S], rows and tokens of the rollouts; scale: [S], multiplies the loss of a rollout's tokens.
    """

    tokens: Tensor
    rollout: Tensor
    weights: Tensor
    advantages: Tensor
    polarity: Tensor
    old: Tensor | None
    reference: Tensor | None
    importance: Tensor | None
    proxy: Tensor | None
    replaced: Tensor | None
    selected: Tensor | None
    offsets: Tensor
    counts: Tensor
    scale: Tensor
