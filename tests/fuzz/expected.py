"""What the documentation says a call must refuse, and which route it must take: from the arguments alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

import reference

from .calls import double
from .case import Case
from .functions import READS
from .objectives import SCORES, build, written


@dataclass
class Features:
    """What the documentation speaks of."""

    objective: Any
    on_policy: bool
    current: list[Any]  # the rules that select by the current policy
    unit: str  # whose statistics a token's gradient depends on
    beside: bool  # whether a token's gradient is known beside its own statistics
    written: bool  # whether a surrogate is a function


def features(case: Case) -> Features:
    objective, keywords = build(reference, case.spec), case.keywords
    on_policy = "old_logprobs" not in keywords
    rules = [rule for rule in objective.shaping if isinstance(rule, reference.TokenRule)]

    def is_current(rule) -> bool:
        if callable(rule.metric) or rule.metric in SCORES:
            return callable(rule.metric) and rule.source == "current"
        given = {"probability": "old_logprobs", "entropy": "old_entropy"}[rule.metric]
        return rule.source == "current" or given not in keywords

    current = [rule for rule in rules if is_current(rule)]
    own = bool(written(case.spec))
    beside = not (
        objective.ratio_level != "token" or objective.low_probability or current or objective.ratio_weights or own
        or any(rule.replacement for rule in rules) or case.dtype == torch.float16
    )  # fmt: skip
    return Features(objective, on_policy, current, unit_of(case, objective, rules, bool(current)), beside, own)


def unit_of(case: Case, objective: Any, rules: list[Any], current: bool) -> str:
    own = case.spec.fields["surrogate"].fields.get("depends_on") if case.spec.name == "Objective" else None
    if objective.low_probability is not None or own == "batch":
        return "batch"
    wide = any(rule.scope in ("batch", "global") or callable(rule.metric) for rule in rules)
    if current and (wide or objective.normalize_over == "selected"):
        return "batch"
    together = own == "rollout" or objective.ratio_level != "token" or any(
        getattr(weight, "level", "sequence") != "token" for weight in objective.ratio_weights
    )  # fmt: skip
    return "rollout" if current or together else "token"


def refusals(case: Case) -> list[str]:
    """Words of every reason for which the call must raise a ValueError; empty where it must answer."""
    if case.spec is None:
        return []
    f, keywords, entry = features(case), case.keywords, case.entry
    objective, found = f.objective, []
    if objective.kl_estimator == "k3-ratio" and objective.ratio_level == "sequence":
        return ["k3-ratio"]
    rules = [rule for rule in objective.shaping if isinstance(rule, reference.TokenRule)]
    if any(rule.metric in SCORES and rule.metric not in keywords.get("scores", {}) for rule in rules):
        return ["scores"]
    for name in (READS.get(rule.metric) for rule in rules):
        missing = name is not None and name not in keywords
        if missing and (name != "entropy" or entry == "logprob_policy_loss"):
            found.append(name)
    if objective.kl_coef and "ref_logprobs" not in keywords:
        found.append("ref_logprobs")
    if objective.low_probability and "min_p_logprobs" not in keywords and (
        not f.on_policy or entry == "logprob_policy_loss"
    ):  # fmt: skip
        found.append("min_p_logprobs")
    by_old_entropy = any((rule.metric, rule.source) == ("entropy", "old") for rule in rules)
    if by_old_entropy and "old_entropy" not in keywords and not f.on_policy:
        found.append("old_entropy")
    needs_length = objective.aggregation == "seq-mean-token-sum-norm" and len(case.shape) == 1
    if needs_length and "max_length" not in keywords and "denominator" not in keywords:
        found.append("max_length")
    if entry == "logprob_policy_loss" and "entropy" not in keywords and (
        objective.entropy_coef or any(rule.metric == "entropy" for rule in f.current)
    ):  # fmt: skip
        found.append("current policy's entropy")
    if case.options.get("route") == "one-launch" and not f.beside:
        found.append("one-launch")
    if entry == "linear_policy_loss":
        found += _linear_refusals(case, f)
    return found


def mend(case: Case) -> None:
    """Takes a route that is not refused, in most cases: an answer says more than a refusal."""
    for word in refusals(case) if case.mended else ():
        if word in ("one-launch", "one-pass"):
            case.options["route"] = "auto"
        elif word == "max_length":
            case.keywords["max_length"] = 6


def _linear_refusals(case: Case, f: Features) -> list[str]:
    capacity = isinstance(case.options["compaction"], int) and case.backend == "triton"
    found = []
    if case.plan and (capacity or case.options["compaction"] == "none"):
        found.append("plan says which rows")
    if case.options["route"] == "one-pass" and (capacity or (case.wanted and not fits(case, f))):
        found.append("one-pass")
    return found


def _may_move(case: Case, objective: Any) -> list[bool]:
    """Tokens that may have a gradient by mask, advantage and PolarityWeights, the mask being all that a plan knows."""
    batch = {"advantages": case.advantages, "polarity": case.keywords.get("polarity", case.advantages)}
    rollouts = len(case.boundaries) - 1
    rows = [s for s, (a, b) in enumerate(pairwise(case.boundaries)) for _ in range(a, b)]
    values = {
        name: [x[s].item() for s in rows] if x.shape == (rollouts,) else x.reshape(-1).tolist()
        for name, x in batch.items()
    }
    surrogates = [objective.surrogate, *(getattr(rule, "replacement", None) for rule in objective.shaping)]
    penalty = any(getattr(surrogate, "penalty", 0.0) for surrogate in surrogates)
    free = bool(objective.kl_coef or objective.entropy_coef or objective.log_ratio_coef or penalty)
    free = free or bool(written(case.spec))
    found = []
    for advantage, polarity in zip(values["advantages"], values["polarity"], strict=True):
        moves = advantage != 0 or free
        for rule in objective.shaping:
            if isinstance(rule, reference.PolarityWeights):
                factor = rule.positive if polarity > 0 else rule.negative if polarity < 0 else rule.zero
                # NaN, of a row that a plan does not know to be no token, has no sign.
                moves = moves and (factor != 0 or polarity != polarity)
        found.append(moves)
    return found


def planned_rows(case: Case, f: Features) -> list[int]:
    """How many rows of each rollout go through the products with a gradient."""
    objective, sizes = f.objective, [b - a for a, b in pairwise(case.boundaries)]
    if case.options["compaction"] == "none":
        return sizes
    moves = _may_move(case, objective)
    if case.plan:
        tokens = (case.keywords["mask"] != 0 if "mask" in case.keywords else torch.ones(case.shape)).reshape(-1) != 0
        rules = [rule for rule in objective.shaping if isinstance(rule, reference.TokenRule)]
        readers = [r for r in rules if (r.source == "current" if callable(r.metric) else r.metric not in SCORES)]
        unit = unit_of(case, objective, rules, bool(readers))
    else:
        tokens, unit = case.tokens, f.unit
        if not f.current:
            weights = known_weights(case, objective)
            moves = [a and w != 0 for a, w in zip(moves, weights, strict=True)]
    on = tokens.tolist()
    per_rollout = []
    for a, b in pairwise(case.boundaries):
        here = sum(on[i] and moves[i] for i in range(a, b))
        per_rollout.append(sum(on[a:b]) if unit == "rollout" and here else here)
    return [sum(on[a:b]) for a, b in pairwise(case.boundaries)] if unit == "batch" else per_rollout


def known_weights(case: Case, objective: Any) -> list[float]:
    """The weights where no rule reads the current policy."""
    keywords = {name: double(value) for name, value in case.keywords.items()}
    per_token = ("old_logprobs", "old_entropy", "ref_logprobs", "min_p_logprobs", "polarity", "importance_weights")
    batch = reference.loss.read_batch(
        case.targets, case.keywords.get("mask"), keywords.get("cu_seqlens"), case.options["ignore_index"],
        torch.float64, advantages=case.advantages.double(), scores=keywords.get("scores"),
        **{name: keywords.get(name) for name in per_token},
    )  # fmt: skip
    nothing = torch.zeros(case.tokens.numel(), dtype=torch.float64)
    weights = reference.loss.shape_tokens(objective, batch, nothing, nothing, keywords.get("step", 0)).weights
    return [weights.get(row, 0.0) for row in range(case.tokens.numel())]


def fits(case: Case, f: Features) -> bool:
    """Whether a chunk holds a whole unit."""
    counts = planned_rows(case, f)
    item = torch.empty((), dtype=case.head_dtype).element_size()
    budget = case.options["max_chunk_bytes"] or (64 << 20)
    chunk = max(budget // (item * case.vocabulary), 1)
    if f.unit == "token" or sum(counts) <= chunk:
        return True
    return f.unit == "rollout" and max(counts) <= chunk


def routes(case: Case) -> set[str]:
    """The routes that the output may name."""
    if case.entry == "logprob_policy_loss":
        return {"logprobs"}
    if not case.wanted:
        return {"statistics"}
    f, route = features(case), case.options["route"]
    if case.entry == "policy_loss":
        if route == "one-launch":
            return {"one-launch"}
        measured = route == "auto" and f.beside and case.backend == "triton"
        return {"two-stage", "one-launch"} if measured else {"two-stage"}
    capacity = isinstance(case.options["compaction"], int) and case.backend == "triton"
    together = route != "recompute" and not capacity and fits(case, f) and sum(planned_rows(case, f))
    return {"one-pass"} if together else {"recompute"}
