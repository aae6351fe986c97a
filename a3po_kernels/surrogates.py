"""What the loss of a token is: the surrogates, built in or a function of the caller's."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

from .core.checks import check_number, check_word


def _level_of_the_caller() -> int:
    """The stacklevel, from where this is called, of the first frame outside of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(f"{__package__}."):
        level, frame = level + 1, frame.f_back
    return level


@dataclass(frozen=True)
class Clip:
    """max(-A r, -A clamp(r, 1 - epsilon_low, 1 + epsilon_high)) (PPO; DAPO's two bounds, arXiv 2503.14476).

    epsilon_low, in [0, 1], and epsilon_high, at least 0: its bounds. dual_clip c > 1: where A < 0, min(that, -A c)
    (arXiv 1912.09729). delta > 0: the unclipped branch uses min(r, delta). None: off. Raises ValueError out of range.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None

    def __post_init__(self):
        check_number("epsilon_low", self.epsilon_low, 0.0, 1.0)
        check_number("epsilon_high", self.epsilon_high, 0.0)
        if self.dual_clip is not None:
            check_number("dual_clip", self.dual_clip, 1.0, above=True)
        if self.delta is not None:
            check_number("delta", self.delta, 0.0, above=True)


@dataclass(frozen=True)
class Cispo:
    """-sg(clamp(r)) A logp (CISPO, arXiv 2506.13585).

    epsilon_high > 0 is the raw upper bound of r, as in TRL: 1.28 where other objectives say .28, and a warning below 1.
    epsilon_low in [0, 1], if given, adds the lower bound 1 - epsilon_low. Raises ValueError out of range.
    """

    epsilon_high: float = 1.28
    epsilon_low: float | None = None

    def __post_init__(self):
        check_number("epsilon_high", self.epsilon_high, 0.0, above=True)
        if self.epsilon_low is not None:
            check_number("epsilon_low", self.epsilon_low, 0.0, 1.0)
        if self.epsilon_high < 1.0:
            warnings.warn(
                f"CISPO's epsilon_high = {self.epsilon_high:g} bounds the ratio itself: no gradient weighs more, and "
                f"on-policy each is multiplied by it; {1 + self.epsilon_high:g} is what other objectives call "
                f"{self.epsilon_high:g}", stacklevel=_level_of_the_caller(),
            )  # fmt: skip


@dataclass(frozen=True)
class Sapo:
    """-A (4 / tau) sigmoid(tau (r - 1)) (SAPO, arXiv 2511.20347).

    tau is tau_positive where A > 0, else tau_negative, both above 0. Raises ValueError out of range.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self):
        check_number("tau_positive", self.tau_positive, 0.0, above=True)
        check_number("tau_negative", self.tau_negative, 0.0, above=True)


@dataclass(frozen=True)
class Reinforce:
    """-A logp."""


@dataclass(frozen=True)
class Dppo:
    """-sg(min(r, ratio_cap)) A logp inside a trust region, 0 outside (DPPO, arXiv 2602.04879; verl's form).

    The region bounds a divergence between the two policies' choice of this token or another: "tv", p - p_old, by
    delta_high from above where A > 0 and by -delta_low from below elsewhere; "kl", of the two Bernoulli variables, with
    the same two bounds where the policy moved the way that A asks for. Paper, prime-rl and SkyRL differentiate r A: the
    same gradient without a cap, another value. divergence is one of the two; delta_low and delta_high are at least 0,
    ratio_cap is above 0 or None; else ValueError is raised. The paper's behaviour policy is the sampler: give its
    log-probs as old.
    """

    divergence: str = "tv"
    delta_low: float = 0.2
    delta_high: float = 0.2
    ratio_cap: float | None = None

    def __post_init__(self):
        check_word("divergence", self.divergence, ("tv", "kl"))
        check_number("delta_low", self.delta_low, 0.0)
        check_number("delta_high", self.delta_high, 0.0)
        if self.ratio_cap is not None:
            check_number("ratio_cap", self.ratio_cap, 0.0, above=True)


@dataclass(frozen=True)
class Gmpo:
    """-A exp(mean over the rollout of c), c the token's log ratio clipped on one side (GMPO, arXiv 2507.20673).

    c = min(logp - old, epsilon_high) where A >= 0, else max(logp - old, -epsilon_low): the bounds are of the log ratio.
    The gradient reaches every token that was not clipped. It needs ratio_level "sequence". Raises ValueError for bounds
    below 0, which are in nats.
    """

    epsilon_low: float = 0.4
    epsilon_high: float = 0.4

    def __post_init__(self):
        check_number("epsilon_low", self.epsilon_low, 0.0)
        check_number("epsilon_high", self.epsilon_high, 0.0)


@dataclass(frozen=True)
class Ratio:
    """-A r + penalty |logp - old|: the ratio without bounds; with a penalty as KL-Cov's tokens have it (2505.22617).

    Raises ValueError for a penalty below 0.
    """

    penalty: float = 0.0

    def __post_init__(self):
        check_number("penalty", self.penalty, 0.0)


@dataclass(frozen=True)
class Nothing:
    """0: the replacement of tokens that are to have no surrogate, and still their KL and entropy terms."""


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
    decides what may be cut into chunks or left out, and is checked on an example at the first use (not under
    torch.compile).

    Raises TypeError for a loss that cannot be called, ValueError for another word and, in the first call of a policy
    loss, for a depends_on that the example contradicts.
    """

    loss: Callable[[Any], Any]
    depends_on: str = "token"

    def __post_init__(self):
        if not callable(self.loss):
            raise TypeError(f"loss must be a function of a batch's tokens; got {type(self.loss).__name__}")
        check_word("depends_on", self.depends_on, ("token", "rollout", "batch"))


Surrogate = Union[Clip, Cispo, Sapo, Reinforce, Dppo, Gmpo, Ratio, Nothing, CustomSurrogate]
SURROGATES = (Clip, Cispo, Sapo, Reinforce, Dppo, Gmpo, Ratio, Nothing, CustomSurrogate)


def check_surrogate(name: str, value: object, takes: tuple[type, ...]) -> None:
    """Raises TypeError for a subclass too: the kernels know the classes' own formulas, and would train those."""
    if type(value) in takes or isinstance(value, CustomSurrogate):
        return
    names = ", ".join(kind.__name__ for kind in takes)
    hint = "a formula of your own is a CustomSurrogate"
    got = type(value).__name__
    if isinstance(value, type):
        got, hint = f"the class {value.__name__}", "call it"
    raise TypeError(f"{name} must be one of {names}; got {got}: {hint}")
