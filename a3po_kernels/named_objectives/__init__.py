"""The published objectives by name: each a composition of the parts in objectives.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.checks import did_you_mean
from ..objectives import SURROGATES, Objective
from .chosen import CovarianceCandidates, a3po, clip_cov, covariance, fork_tokens, kl_cov
from .clipped import dapo, dr_grpo, grpo, gspo, gspo_token, lp_reg, luspo, nsr, psr, w_reinforce
from .keywords import CLIP_OVERRIDES, OVERRIDES
from .unclipped import cispo, dppo, gmpo, sapo, topr, vespo

__all__ = [
    "CLIP_OVERRIDES", "OVERRIDES", "CovarianceCandidates", "a3po", "as_objective", "cispo", "clip_cov", "covariance",
    "dapo", "dppo", "dr_grpo", "find_preset", "fork_tokens", "gmpo", "grpo", "gspo", "gspo_token", "kl_cov", "lp_reg",
    "luspo", "nsr", "presets", "psr", "sapo", "topr", "vespo", "w_reinforce",
]  # fmt: skip

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
    hint = did_you_mean(str(name).lower().replace("-", "_"), presets)
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
    if isinstance(objective, SURROGATES):
        hint = f": Objective(surrogate={type(objective).__name__}(...))"
    raise TypeError(
        f"objective must be an Objective, such as a3po(), or a preset's name; got {type(objective).__name__}{hint}"
    )
