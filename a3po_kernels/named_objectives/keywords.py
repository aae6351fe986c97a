"""What the presets share: the keywords that each takes, their text in its help, and the error for any other."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import ParamSpec

from ..core.checks import as_tuple, check_number, nearest
from ..objectives import RATIO_WEIGHTS, Objective, RatioWeight
from ..schedules import Schedule

P = ParamSpec("P")
# The keywords of every preset, and those of every preset whose surrogate is the clip.
OVERRIDES = {
    "kl_coef": "coefficient of the KL term to the reference policy, at least 0; 0 leaves it out.",
    "kl_estimator": (
        '"k1", "k2", "k3", or "k3-ratio": k3 times the token\'s ratio, unbiased off-policy, for ratio_level "token".'
    ),
    "kl_clamp": "bound, in nats, of the log ratio to the reference policy in the KL term, above 0. None: off.",
    "entropy_coef": "coefficient of the entropy bonus, any finite number.",
    "log_ratio_coef": "coefficient of (logp - old)^2, at least 0, not importance-weighted.",
    "ratio_weights": (
        "factors of the surrogate that read the ratio, without a gradient: OffPolicyMask, Vespo, Topr; after those "
        "that the preset has itself."
    ),
    "aggregation": '"token-mean", "seq-mean-token-sum", "seq-mean-token-mean" or "seq-mean-token-sum-norm".',
    "ratio_level": (
        '"token", "sequence", the ratio exp(mean over the rollout of logp - old), or "sequence-token", that value with '
        "each token's own derivative. A surrogate that reads no ratio, or that of one level alone, takes one word."
    ),
}
CLIP_OVERRIDES = {
    "epsilon_low": "the ratio is clipped below 1 - epsilon_low, in [0, 1].",
    "epsilon_high": "the ratio is clipped above 1 + epsilon_high, at least 0.",
    "dual_clip": "c > 1: where A < 0 the loss is at most -A c. None: off.",
    "delta": "the unclipped branch uses min(ratio, delta), above 0. None: off.",
}
# What TRL and verl call a keyword.
ELSEWHERE = {
    "epsilon": "epsilon_low and epsilon_high", "clip_ratio": "epsilon_low and epsilon_high",
    "clip_ratio_low": "epsilon_low", "clip_ratio_high": "epsilon_high", "clip_ratio_c": "dual_clip",
    "beta": "kl_coef", "kl_loss_coef": "kl_coef", "entropy_coeff": "entropy_coef",
    "token_ratio": "ratio", "loss_agg_mode": "aggregation", "importance_sampling_level": "ratio_level",
}  # fmt: skip
_RAW = " (its epsilon_high is the bound of the ratio itself: 1.28 where others say .28)"
OF_ONE = {
    **{("cispo", name): _RAW for name in ("epsilon", "clip_ratio", "clip_ratio_high")},
    ("a3po", "beta"): " (beta(step) is rho and alpha, or schedule; TRL's KL coefficient is kl_coef)",
}
_END = """
Returns:
    The Objective, for the argument `objective` of every loss.

Raises:
    TypeError: a keyword that the preset does not take, with the nearest that it does; a value of another type.
    ValueError: a value out of its range or not among its words, or one that goes with no other that was given."""


def _documented(function: Callable[..., Objective]) -> str | None:
    """A preset's docstring, its Args completed by the shared keywords; None where docstrings are stripped."""
    if function.__doc__ is None:
        return None
    text = inspect.cleandoc(function.__doc__)
    own = text.partition("\nArgs:\n")[2]
    parameters = inspect.signature(function).parameters
    clips = "dual_clip" in parameters
    shared = {**(CLIP_OVERRIDES if clips else {}), **OVERRIDES}
    lines = [
        textwrap.fill(f"{name}: {shared[name]}", 112, initial_indent=" " * 4, subsequent_indent=" " * 8)
        for name in parameters
        if name in shared
    ]
    return "\n".join([text, *([] if own else ["", "Args:"]), *lines, _END])


def preset(function: Callable[P, Objective]) -> Callable[P, Objective]:
    """A preset, with the help of its shared keywords and a TypeError that names the nearest to an unknown one."""
    takes = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def build(*args: P.args, **kwargs: P.kwargs) -> Objective:
        for name in kwargs:
            if name not in takes:
                near = nearest(name, takes)
                hint = f" (did you mean {near!r}?)" if near else ""
                if name in ELSEWHERE and ELSEWHERE[name].split()[0].rstrip(",") in takes:
                    hint = f" (here it is {ELSEWHERE[name]})"
                hint = OF_ONE.get((function.__name__, name), hint)
                raise TypeError(
                    f"unexpected keyword {name!r} of {function.__name__}{hint}; it takes {', '.join(takes)}"
                )
        return function(*args, **kwargs)

    build.__doc__ = _documented(function)
    return build


def check_weights(**weights: float | Schedule) -> None:
    """Raises, by the caller's name, for a weight that is neither a schedule nor a number of at least 0."""
    for name, value in weights.items():
        if not callable(value):
            check_number(name, value, 0.0)


def joined(own: RatioWeight, given: tuple[RatioWeight, ...]) -> tuple[RatioWeight, ...]:
    """A preset's own factor and the caller's after it."""
    return (own, *as_tuple("ratio_weights", given, RATIO_WEIGHTS))
