"""The loss of a token as code words and run-time numbers: what an objective is to a backend."""

from __future__ import annotations

from typing import NamedTuple

# Columns of the partial sums, one row a rollout; the last is a maximum.
SUMS = (
    "loss", "entropy", "kl", "approx_kl", "ratio", "clip_low", "clip_high", "dual_clip", "selected_positive",
    "selected_negative", "positive", "negative", "active", "tokens", "ratio_max",
)  # fmt: skip


class SurrogateForm(NamedTuple):
    """What the loss of a token is. Words choose code, numbers are run-time values.

    kind: "clip", "cispo", "sapo" or "reinforce"; low, high: bounds of the ratio (cispo: low 0 is none); dual_clip,
    delta: inf is none; tau_positive, tau_negative: SAPO's; beta: weight of the replacement regulariser.
    """

    kind: str
    sequence: bool
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
