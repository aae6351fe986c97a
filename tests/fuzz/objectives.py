"""Random objectives, as data that builds the same one of the package and of the reference."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
ESTIMATORS = ("k1", "k2", "k3", "k3-ratio")
CLIPPED = ("grpo", "dr_grpo", "dapo", "psr", "nsr", "w_reinforce", "fork_tokens", "lp_reg", "a3po", "gspo")
PRESETS = (*CLIPPED, "cispo", "sapo")
RATIOS = (0.01, 0.1, 0.2, 0.29, 1 / 3, 0.5, 0.9, 1.0)


@dataclass(frozen=True)
class Made:
    """A call by name: of a class or a preset."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)


def doubled_square_root(step) -> Any:
    """A schedule of the user's own."""
    return 2.0 / (1.0 + 0.1 * step) ** 0.5


def build(module: ModuleType, spec: Any) -> Any:
    """What the spec says, made of a module's classes. The reference's presets take no ratio_level: it is set after."""
    if isinstance(spec, tuple):
        return tuple(build(module, part) for part in spec)
    if not isinstance(spec, Made):
        return spec
    fields = {name: build(module, value) for name, value in spec.fields.items()}
    late = {}
    if spec.name in PRESETS and module.__name__ == "reference" and "ratio_level" in fields:
        late["ratio_level"] = fields.pop("ratio_level")
    made = getattr(module, spec.name)(**fields)
    return dataclasses.replace(made, **late) if late else made


def _some(rng: random.Random, chance: float, **choices: tuple) -> dict[str, Any]:
    """Each of the fields with some chance."""
    return {name: rng.choice(values) for name, values in choices.items() if rng.random() < chance}


def draw_schedule(rng: random.Random) -> Any:
    low = {"minimum": rng.choice((0.0, 0.5, 1.0))}
    return rng.choice((
        Made("Constant", {"value": rng.choice((0.0, 1.7))}),
        Made("LinearDecay", {"start": 2.0, "rate": rng.choice((0.005, 0.05)), **low}),
        Made("ExponentialDecay", {"start": 3.0, "rate": 0.01, **low}),
        Made("CosineDecay", {"start": 2.5, "steps": rng.choice((1, 40, 200)), **low}),
        doubled_square_root,
    ))  # fmt: skip


def draw_scale(rng: random.Random) -> Any:
    return draw_schedule(rng) if rng.random() < 0.4 else rng.choice((0.0, 0.3, 1.0, 1.0, 2.0, 3.5))


def draw_rule(rng: random.Random) -> Made:
    if rng.random() < 0.3:
        factors = {name: rng.choice((0.0, 0.1, 1.0, 1.0, 1.5)) for name in ("positive", "negative", "zero")}
        return Made("PolarityWeights", factors)
    return Made("TokenRule", {
        "polarity": rng.choice((None, 1, -1)), "metric": rng.choice(("probability", "entropy")),
        "source": rng.choice(("old", "old", "current")), "side": rng.choice(("low", "high")),
        "ratio": rng.choice(RATIOS), "selected_scale": draw_scale(rng),
        "rest_scale": rng.choice((0.0, 0.5, 1.0, 1.0)), "scope": rng.choice(("rollout", "rollout", "batch", "global")),
        "rounding": rng.choice(("floor", "ceil")),
    })  # fmt: skip


def draw_clip(rng: random.Random) -> dict[str, Any]:
    return _some(
        rng, 0.3, epsilon_low=(0.01, 0.2, 1.0), epsilon_high=(0.01, 0.28, 9.0), dual_clip=(1.1, 3.0),
        delta=(0.9, 1.15, 4.0),
    )  # fmt: skip


def draw_surrogate(rng: random.Random, name: str | None = None) -> Made:
    name = name or rng.choice(("Clip", "Clip", "Cispo", "Sapo", "Reinforce"))
    if name == "Clip":
        return Made(name, draw_clip(rng))
    if name == "Cispo":
        return Made(name, _some(rng, 0.6, epsilon_high=(1.05, 1.28, 5.0), epsilon_low=(0.02, 0.3, 1.0)))
    if name == "Sapo":
        return Made(name, _some(rng, 0.6, tau_positive=(1.0, 3.0), tau_negative=(1.05, 5.0)))
    return Made(name)


def draw_regularizer(rng: random.Random) -> dict[str, Any]:
    return {"quantile": rng.choice((0.2, 0.3, 0.9, 1.0)), "min_p": rng.choice((0.02, 0.3, 1.0)),
            "beta": rng.choice((0.0, 0.3, 1.0))}  # fmt: skip


def _terms(rng: random.Random) -> dict[str, Any]:
    """What a preset and an Objective have in common."""
    terms = _some(rng, 0.3, kl_coef=(0.05, 0.4), entropy_coef=(0.03, -0.2), aggregation=AGGREGATIONS)
    if rng.random() < 0.5:
        terms["kl_estimator"] = rng.choice(ESTIMATORS)
    if rng.random() < 0.2:
        terms["ratio_level"] = "sequence"
    return terms


def _own(name: str, rng: random.Random) -> dict[str, Any]:
    """The keywords that a preset alone has."""
    if name == "w_reinforce":
        return _some(rng, 0.5, positive_weight=(0.0, 0.1, 2.0), negative_weight=(0.0, 0.7))
    if name == "fork_tokens":
        return _some(rng, 0.5, ratio=RATIOS, rounding=("ceil",), normalize_over=("all",))
    if name == "lp_reg":
        return draw_regularizer(rng)
    if name == "a3po":
        own = _some(rng, 0.4, rho=(1.0, 3.0), alpha=(0.0, 0.1), ratio=RATIOS, metric=("entropy",), source=("current",))
        return {**own, "schedule": draw_schedule(rng)} if rng.random() < 0.3 else own
    return draw_surrogate(rng, name.capitalize()).fields if name in ("cispo", "sapo") else {}


def draw_objective(rng: random.Random) -> Made:
    """A preset with overrides, or a composition that no preset makes."""
    if rng.random() < 0.5:
        name = rng.choice(PRESETS)
        clip = draw_clip(rng) if name in CLIPPED else {}
        return Made(name, {**clip, **_own(name, rng), **_terms(rng)})
    fields = {
        "shaping": tuple(draw_rule(rng) for _ in range(rng.choice((0, 1, 1, 2, 3)))), "surrogate": draw_surrogate(rng),
        **_terms(rng),
    }  # fmt: skip
    if rng.random() < 0.15:
        fields["low_probability"] = Made("MinPRegularizer", draw_regularizer(rng))
    if rng.random() < 0.4:
        fields["normalize_over"] = "selected"
    return Made("Objective", fields)
