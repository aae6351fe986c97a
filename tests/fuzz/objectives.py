"""Random objectives, as data that builds the same one of the package and of the reference."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from .functions import CURRENT, OF_ONE_TOKEN, OLD, WRITTEN, written_gspo

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
ESTIMATORS = ("k1", "k2", "k3", "k3-ratio")
OLDER = ("grpo", "dr_grpo", "dapo", "psr", "nsr", "w_reinforce", "fork_tokens", "lp_reg", "a3po", "gspo")
CLIPPED = (*OLDER, "gspo_token", "luspo", "clip_cov")
PRESETS = (*CLIPPED, "a3po", "a3po", "cispo", "sapo", "dppo", "vespo", "gmpo", "topr", "kl_cov")
RATIOS = (0.01, 0.1, 0.2, 0.29, 1 / 3, 0.5, 0.9, 1.0)
SCORES = ("noise", "tied")
# Where ties of what a metric may be fall on a bound, it can be told exactly in any precision.
THRESHOLDS: dict[Any, tuple[float, ...]] = {
    "probability": (0.02, 0.06, 0.3), "entropy": (0.75, 1.9), "noise": (-0.5, 0.0, 0.75), "tied": (0.5, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A call by name: of a class or a preset."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)


def doubled_square_root(step) -> Any:
    """A schedule of the user's own."""
    return 2.0 / (1.0 + 0.1 * step) ** 0.5


def written(spec: Made | None) -> list[Callable]:
    """The losses of its CustomSurrogates."""
    fields = {} if spec is None else spec.fields
    surrogates = [fields.get("surrogate"), *(rule.fields.get("replacement") for rule in fields.get("shaping", ()))]
    return [made.fields["loss"] for made in surrogates if made is not None and made.name == "CustomSurrogate"]


def build(module: ModuleType, spec: Any) -> Any:
    """What the spec says, made of a module's classes; of the reference's, a written surrogate is the built-in one."""
    if isinstance(spec, tuple):
        return tuple(build(module, part) for part in spec)
    if not isinstance(spec, Made):
        return spec
    fields = {name: build(module, value) for name, value in spec.fields.items()}
    if module.__name__ == "reference":
        if spec.name == "CustomSurrogate":
            name, fields = WRITTEN[fields["loss"]]
            return getattr(module, name)(**fields)
        if spec.name == "Objective" and written_gspo in written(spec):
            fields["ratio_level"] = "sequence"
        if spec.name == "clip_cov":
            fields.pop("seed", None)  # of the hash that orders candidates, which are given to the reference
    return getattr(module, spec.name)(**fields)


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


def _threshold(rng: random.Random, metric: Any) -> float:
    return rng.choice(THRESHOLDS.get(metric, (-1.0, 0.0, 0.5)))


def draw_rule(rng: random.Random, choosy: bool, replacements: tuple[str, ...]) -> Made:
    """choosy: by more than the policy's numbers and a share; replacements: what may take the surrogate's place."""
    if rng.random() < 0.25:
        factors = {name: rng.choice((0.0, 0.1, 1.0, 1.0, 1.5)) for name in ("positive", "negative", "zero")}
        for name in factors:
            if rng.random() < 0.15:
                factors[name] = draw_schedule(rng)
        return Made("PolarityWeights", factors)
    fields = {
        "polarity": rng.choice((None, 1, -1)), "metric": rng.choice(("probability", "entropy")),
        "source": rng.choice(("old", "old", "current")), "side": rng.choice(("low", "high")),
        "ratio": rng.choice(RATIOS), "selected_scale": draw_scale(rng),
        "rest_scale": rng.choice((0.0, 0.5, 1.0, 1.0)), "scope": rng.choice(("rollout", "rollout", "batch", "global")),
        "rounding": rng.choice(("floor", "ceil")),
    }  # fmt: skip
    if choosy:
        kinds = (*SCORES, rng.choice(CURRENT if fields["source"] == "current" else OLD))
        fields["metric"] = rng.choice((fields["metric"], rng.choice(kinds)))
        if rng.random() < 0.4:
            fields["threshold"] = _threshold(rng, fields["metric"])
            fields["ratio"] = rng.choice((fields["ratio"], 1.0))
        if rng.random() < 0.3:
            fields.update(quantile=rng.choice((0.0, 0.25, 0.3, 0.3, 0.5, 0.8, 0.8, 1.0)), scope="batch")
    if replacements and rng.random() < 0.8:
        fields["replacement"] = draw_surrogate(rng, rng.choice(replacements))
        fields["ratio"] = rng.choice((fields["ratio"], 0.5, 0.9))
    # What would be without a use is refused: a share beside a quantile, the policy of a score.
    idle = ("ratio", "rounding") if "quantile" in fields else ()
    idle = (*idle, "source") if fields["metric"] in SCORES else idle
    return Made("TokenRule", {name: value for name, value in fields.items() if name not in idle})


def draw_clip(rng: random.Random) -> dict[str, Any]:
    return _some(
        rng, 0.3, epsilon_low=(0.01, 0.2, 1.0), epsilon_high=(0.01, 0.28, 9.0), dual_clip=(1.1, 3.0),
        delta=(0.9, 1.15, 4.0),
    )  # fmt: skip


def _vespo(rng: random.Random) -> dict[str, Any]:
    return _some(
        rng, 0.4, k_positive=(0.5, 3.0), lambda_positive=(0.4, 2.0), k_negative=(0.0, 2.0), lambda_negative=(0.5, 3.0)
    )


def draw_surrogate(rng: random.Random, name: str) -> Made:
    if name == "Clip":
        return Made(name, draw_clip(rng))
    if name == "Cispo":
        return Made(name, _some(rng, 0.6, epsilon_high=(1.05, 1.28, 5.0), epsilon_low=(0.02, 0.3, 1.0)))
    if name == "Sapo":
        return Made(name, _some(rng, 0.6, tau_positive=(1.0, 3.0), tau_negative=(1.05, 5.0)))
    if name == "Dppo":
        return Made(name, _some(
            rng, 0.9, divergence=("tv", "kl"), delta_low=(0.002, 0.01, 0.3), delta_high=(0.003, 0.02, 0.4),
            ratio_cap=(0.9, 1.1, 3.0),
        ))  # fmt: skip
    if name == "Gmpo":
        return Made(name, _some(rng, 0.6, epsilon_low=(0.04, 0.4), epsilon_high=(0.06, 0.3)))
    if name == "Ratio":
        return Made(name, _some(rng, 0.8, penalty=(0.1, 1.0)))
    if name == "CustomSurrogate":
        return Made(name, {"loss": rng.choice(OF_ONE_TOKEN)})
    return Made(name)


def draw_ratio_weight(rng: random.Random) -> Made:
    name = rng.choice(("OffPolicyMask", "Vespo", "Topr"))
    if name == "OffPolicyMask":
        return Made(name, {"threshold": rng.choice((0.0, 0.04, 0.3))})
    if name == "Vespo":
        return Made(name, _vespo(rng))
    return Made(name, _some(rng, 0.6, level=("sequence", "geometric", "token"), low=(0.3, 0.9), high=(0.95, 3.0)))


def draw_regularizer(rng: random.Random) -> dict[str, Any]:
    return {"quantile": rng.choice((0.2, 0.3, 0.9, 1.0)), "min_p": rng.choice((0.02, 0.3, 1.0)),
            "beta": rng.choice((0.0, 0.3, 1.0))}  # fmt: skip


def _terms(rng: random.Random, levels: tuple[str, ...] = ("sequence", "sequence", "sequence-token")) -> dict[str, Any]:
    """What a preset and an Objective have in common; levels: those that it may take."""
    terms = _some(rng, 0.3, kl_coef=(0.05, 0.4), entropy_coef=(0.03, -0.2), aggregation=AGGREGATIONS)
    terms.update(_some(rng, 0.15, log_ratio_coef=(0.02, 0.5)))
    terms.update(_some(rng, 0.4 if "kl_coef" in terms else 0.1, kl_clamp=(0.05, 0.2, 3.0)))
    if rng.random() < 0.5:
        terms["kl_estimator"] = rng.choice(ESTIMATORS)
    if levels and rng.random() < 0.2:
        terms["ratio_level"] = rng.choice(levels)
    if rng.random() < 0.2:
        terms["ratio_weights"] = tuple(draw_ratio_weight(rng) for _ in range(rng.choice((1, 1, 2))))
    return terms


def _idle(own: dict[str, Any]) -> set[str]:
    """What a3po refuses beside its others, which would leave it without a use."""
    rules = {"positive", "negative"} & {own.get("polarity", "positive"), own.get("polarity", "negative")}
    rules = rules or {"positive", "negative"}
    idle = {f"{name}_metric" for name in {"positive", "negative"} - rules}
    idle |= {"rho", "alpha"} if "schedule" in own else set()
    return idle | ({"metric"} if all(f"{name}_metric" in own for name in rules) else set())


def _own(name: str, rng: random.Random) -> dict[str, Any]:
    """The keywords that a preset alone has."""
    if name == "w_reinforce":
        return _some(rng, 0.5, positive_weight=(0.0, 0.1, 2.0), negative_weight=(0.0, 0.7))
    if name == "fork_tokens":
        return _some(rng, 0.5, ratio=RATIOS, rounding=("ceil",), normalize_over=("all",))
    if name == "lp_reg":
        return draw_regularizer(rng)
    if name == "a3po":
        metrics = ("probability", "entropy")
        own = _some(
            rng, 0.4, rho=(1.0, 3.0), alpha=(0.0, 0.1), ratio=RATIOS, metric=("entropy",), source=("current",),
            positive_metric=metrics, negative_metric=metrics, polarity=("both", "positive", "negative"),
            positive_weight=(0.0, 0.5, draw_schedule(rng)), negative_weight=(0.0, 2.0, draw_schedule(rng)),
        )  # fmt: skip
        own = {**own, "schedule": draw_schedule(rng)} if rng.random() < 0.3 else own
        return {key: value for key, value in own.items() if key not in _idle(own)}
    if name == "vespo":
        return _vespo(rng)
    if name == "topr":
        return _some(rng, 0.6, level=("sequence", "geometric", "token"))
    if name == "kl_cov":
        return _some(rng, 0.6, ratio=RATIOS, penalty=(0.0, 1.0))
    if name == "clip_cov":
        return _some(rng, 0.8, ratio=RATIOS, low=(-0.5, 0.05), high=(1.4, 3.0), seed=(1, 7))
    return draw_surrogate(rng, name.capitalize()).fields if name in ("cispo", "sapo", "dppo", "gmpo") else {}


def _mended(rng: random.Random, fields: dict[str, Any], own_ratio: bool) -> dict[str, Any]:
    """Without an estimator that is refused, in most cases; own_ratio: whether the reference refuses it too."""
    if fields.get("kl_estimator") == "k3-ratio" and (own_ratio or fields.get("ratio_level") == "sequence-token"):
        fields["kl_estimator"] = rng.choice(("k2", "k3"))
    return fields


def draw_preset(rng: random.Random) -> Made:
    name = rng.choice(PRESETS)
    clip = draw_clip(rng) if name in CLIPPED else {}
    levels = () if name in ("dppo", "gmpo") else ("sequence", "sequence", "sequence-token")
    fields = {**clip, **_own(name, rng), **_terms(rng, levels)}
    fields = _mended(rng, fields, name in ("gspo_token", "gmpo"))
    if name in ("vespo", "topr"):
        fields.pop("ratio_level", None)
    return Made(name, fields)


def draw_composition(rng: random.Random) -> Made:
    """An objective that no preset makes."""
    one = ("Clip", "Cispo", "Sapo", "Reinforce", "Dppo", "Ratio", "Nothing", "CustomSurrogate")
    name = rng.choice((*one, "Clip", "Clip", "Dppo", "Ratio", "Gmpo", "CustomSurrogate"))
    regularized = rng.random() < 0.15 and name != "CustomSurrogate"
    surrogate = draw_surrogate(rng, name)
    if name == "CustomSurrogate":
        loss = rng.choice((*OF_ONE_TOKEN, written_gspo))
        units = ("rollout", "batch") if loss is written_gspo else ("token", "token", "rollout", "batch")
        surrogate = Made(name, {"loss": loss, "depends_on": rng.choice(units)})
    fields = _terms(rng, () if name in ("Dppo", "Gmpo", "CustomSurrogate") else ("sequence", "sequence-token"))
    if name == "Gmpo":
        fields["ratio_level"] = "sequence"
    of_rollout = surrogate.fields.get("loss") is written_gspo
    replacements = one
    if name == "Gmpo" or regularized or of_rollout:
        replacements = ()
    elif "ratio_level" in fields:
        replacements = ("Clip", "Cispo", "Sapo", "Reinforce", "Ratio", "Nothing")
    style = rng.choice(("plain", "plain", "choosy", "choosy", "replacing"))
    choosy = style == "choosy" or (style == "replacing" and rng.random() < 0.3)
    count = rng.choice((2, 3) if style == "replacing" else (0, 1, 1, 2, 3))
    shaping = tuple(draw_rule(rng, choosy, replacements if style == "replacing" else ()) for _ in range(count))
    fields = {"shaping": shaping, "surrogate": surrogate, **fields}
    if regularized:
        fields["low_probability"] = Made("MinPRegularizer", draw_regularizer(rng))
    if rng.random() < 0.4:
        fields["normalize_over"] = "selected"
    fields = _mended(rng, fields, name == "Gmpo" or of_rollout)
    surrogates = {name, *(rule.fields["replacement"].name for rule in shaping if "replacement" in rule.fields)}
    if surrogates <= {"Reinforce", "Nothing"} and not regularized:
        fields.pop("ratio_level", None)  # which no ratio would read
    return Made("Objective", fields)


def draw_objective(rng: random.Random) -> Made:
    """A preset with overrides, or a composition that no preset makes."""
    return draw_preset(rng) if rng.random() < 0.4 else draw_composition(rng)
