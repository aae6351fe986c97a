"""Compares what a case gave with the reference in fp64 on the same, rounded, inputs.

The bounds. Statistics: a logit x carries a rounding of eps |x|, and a sum over a vocabulary a few more. The loss, its
metrics and the coefficients are judged at the package's own statistics, so that no selection and no clip hinges on
their rounding: what remains are roundings relative to the largest term. A gradient is rounded once to its dtype. A
linear head in fp32, bf16 or fp16 may be SLACK times as far from the truth as eager PyTorch in that dtype, plus a floor:
eager's own error on one small case can be 0 by chance.
"""

from __future__ import annotations

import math
import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import reference

from .bounds import (
    eps,
    largest,
    logit_bound,
    logit_slope,
    product_bound,
    smallest,
    surrogates_of,
    term_bound,
)
from .calls import Found, call, cotangents, exact_statistics, reference_loss, transform_of
from .case import LOW, Case
from .cases import draw
from .expected import features, mend, planned_rows, refusals, routes
from .functions import Given, written_gspo
from .objectives import written

SLACK, ROUNDINGS = 4.0, 32.0
# The interpreter cuts fp32 off to bf16 and fp16 where a GPU rounds.
HALF = {"torch": 0.51, "triton": 1.01}


class Fault(Exception):
    """The package and the reference disagree."""


@dataclass
class Verdict:
    """Of a case: "compared" or "raised", or what is wrong."""

    case: Case
    kind: str
    fault: str = ""


def run_case(seed: int, index: int, backend: str) -> Verdict:
    """Draws a case, calls, and judges. What is not a refusal by rule and not an answer that is right is a fault."""
    case = draw(seed, index, backend)
    mend(case)
    reasons = refusals(case)
    try:
        found = call(case)
    except ValueError as error:
        if any(reason in str(error) for reason in reasons):
            return Verdict(case, "raised")
        return Verdict(case, "fault", f"refused ({error}), expected {reasons or 'an answer'}")
    except Exception:
        return Verdict(case, "fault", traceback.format_exc(limit=-4))
    if reasons:
        return Verdict(case, "fault", f"answered, and should have refused: {reasons}")
    try:
        judge(case, found)
    except Fault as fault:
        return Verdict(case, "fault", str(fault))
    return Verdict(case, "compared")


def expect(name: str, got: Tensor, want: Tensor, tolerance: float | Tensor) -> None:
    """Raises a Fault unless |got - want| <= tolerance everywhere, NaN and infinities at the same places."""
    if got.shape != want.shape:
        raise Fault(f"{name}: shape {list(got.shape)}, expected {list(want.shape)}")
    got, want = got.detach().double(), want.detach().double()
    same = (got == want) | (got.isnan() & want.isnan())
    error = (got - want).abs().masked_fill(same, 0.0)
    wrong = ~(error <= torch.as_tensor(tolerance, dtype=torch.float64).nan_to_num(nan=0.0, posinf=torch.inf))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        allowed = torch.as_tensor(tolerance).expand(error.shape)[at]
        raise Fault(
            f"{name}{list(at)}: {got[at]:.9g}, expected {want[at]:.9g}, error {error[at]:.3g} > {allowed:.3g} "
            f"({int(wrong.sum())} of {wrong.numel()} are off)"
        )


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Fault(message)


def judge(case: Case, found: Found) -> None:
    if case.entry == "group_advantages":
        rewards = case.keywords["rewards"]
        want = reference.group_advantages(rewards.double(), case.keywords["group_ids"], **case.options)
        require(found.output.dtype == case.dtype, "dtype")
        # Divided by a spread of 1e-6 and more, what fp64 rounds is below 1e-9.
        return expect("advantages", found.output, want, HALF["torch"] * eps(case.dtype) * want.abs() + 1e-9)
    if case.entry == "select_tokens":
        options = {name: value for name, value in case.options.items() if name != "validate"}
        metric, mask = case.keywords["metric"], case.keywords.get("mask")
        ends = case.keywords.get("cu_seqlens")
        want = reference.select_tokens(metric, mask, cu_seqlens=ends, **options)
        return require(torch.equal(found.output, want), f"selected {found.output.int()}, expected {want.int()}")
    if case.entry in ("min_p_token_logprobs", "linear_min_p_token_logprobs"):
        return _judge_min_p(case, found.output)
    if case.entry == "logprob_policy_loss":
        return _judge_loss(case, found, None)
    if case.options.get("statistics") == "active" and overflows(case, sum(planned_rows(case, features(case)))):
        require(bool(found.output.loss.isnan()), "more rows than the capacity, and the loss is a number")
        return _judge_overflow(found)
    truth = exact_statistics(case)
    eager = exact_statistics(case, case.head_dtype) if case.head and case.head_dtype != torch.float64 else None
    output = found.output
    computed = case.tokens.view(case.shape)
    if case.options.get("statistics") == "active":
        # With one column both are 0 of every token: which ones were computed is in the weights alone.
        nonzero = (output.logprobs != 0) | (output.entropy != 0)
        computed = computed & (nonzero if case.vocabulary > 1 else output.weights != 0)
    x = logit_bound(case, truth[2])
    for name in ("logprobs", "entropy"):
        got, want = getattr(output, name), getattr(truth[1], name)
        require(got.dtype == case.compute_dtype, f"{name}: {got.dtype}")
        tolerance = ROUNDINGS * eps(case.compute_dtype) * (1 + x)
        if eager is not None:
            tolerance += SLACK * largest(getattr(eager[1], name) - want) + 4 * eps(case.head_dtype) * (1 + x)
        expect(name, got, torch.where(computed, want, 0.0), tolerance)
    if case.spec is None:
        incoming = [case.factor * g.double() for g in cotangents(case)[: 1 + case.index % 2]]
        return _judge_gradients(case, found, truth, eager, incoming, 0.0, x)
    return _judge_loss(case, found, truth, eager, computed, x)


def _judge_min_p(case: Case, got: Tensor) -> None:
    _, _, logits = exact_statistics(case)
    if case.head_dtype in LOW and case.head:
        # Which tokens min-p keeps hinges on the head's rounding, which other cases judge; here, that it is a log-prob.
        return require(bool((got <= 0).all()) and not got[~case.tokens.view(case.shape)].any(), f"min_p {got}")
    transform = {name: value for name, value in transform_of(case).items() if name != "temperature"}
    on = case.tokens.view(case.shape)
    want = reference.min_p_token_logprobs(logits.detach(), case.targets, case.options["min_p"], mask=on, **transform)
    x = logit_bound(case, logits)
    expect("min_p", got, want, ROUNDINGS * eps(case.compute_dtype) * (1 + x) * (1 + case.vocabulary * bool(case.head)))


def _judge_loss(case: Case, found: Found, truth: Any, eager: Any = None, computed: Tensor | None = None, x=0.0) -> None:
    output, compute = found.output, case.compute_dtype
    on = case.tokens.view(case.shape)
    if truth is None:
        given = case.keywords
        zeros = torch.zeros(case.shape, dtype=torch.float64)
        values = [given["logprobs"].double(), given["entropy"].double() if "entropy" in given else zeros]
        logits, computed = None, on
        for name, value in zip(("logprobs", "entropy"), values, strict=True):
            expect(name, getattr(output, name), torch.where(on, value, 0.0), 0.0)
    else:
        values = [
            torch.where(computed, mine.double(), exact.detach())
            for mine, exact in zip((output.logprobs, output.entropy), truth[1], strict=True)
        ]
        logits = truth[2]
    leaves = reference.TokenStats(*(torch.where(on, value, 0.0).requires_grad_() for value in values))
    want, d_logp, d_entropy, scale = reference_loss(case, found, leaves, logits)
    f = features(case)
    amplitude = term_bound(case, f.objective, leaves, want, scale.factors)
    for metric in scale.metrics:
        judge_metric_of_a_rule(case, f.objective, metric)
    rounding = ROUNDINGS * eps(compute)
    expect("loss", output.loss, want.loss, rounding * amplitude * scale.divisors)
    require(output.loss.dtype == compute, f"loss: {output.loss.dtype}")
    active_only = case.options.get("statistics") == "active"
    kept = want.weights if not active_only else torch.where(computed, want.weights, 0.0)
    expect("weights", output.weights, kept, rounding * kept)
    require(bool(torch.equal(output.weights != 0, kept != 0)), "weights: other tokens are dropped")
    require(output.route in routes(case), f"route {output.route}, expected {routes(case)}")
    _judge_metrics(case, found, want, leaves, computed if active_only else None)
    if truth is not None:
        incoming = [case.factor * d_logp, case.factor * d_entropy]
        _judge_gradients(case, found, truth, eager, incoming, abs(case.factor) * amplitude * scale.divisors, x)
        return
    for name, gradient in (("logprobs", d_logp), ("entropy", d_entropy)):
        if name in case.wanted:
            error = abs(case.factor) * rounding * amplitude * scale.divisors
            bound = error + eps(case.dtype) * gradient.abs() + smallest(case.dtype)
            got = found.gradients[name]
            got = torch.zeros(case.shape) if got is None and not gradient.any() else got
            expect(f"gradient of {name}", got, case.factor * gradient, bound * max(abs(case.factor), 1.0))


def judge_metric_of_a_rule(case: Case, objective: Any, given: Given) -> None:
    """What a function of the tokens gave to the package, from the package's own statistics."""
    if case.broken or given.seen is None:
        return
    t, rounding = given.seen, ROUNDINGS * eps(case.compute_dtype)
    bound = rounding * (1.0 + largest(t.advantages)) * (1.0 + largest(t.old_logprobs)) * 30.0
    if not given.candidates:
        return expect("a rule's metric", given.got[t.mask], given.want[t.mask], bound * (1.0 + largest(given.want)))
    clip, value = objective.surrogate, reference.presets.covariance(t)
    own = case.spec.fields
    edges = [value - own.get("low", 1.0), value - own.get("high", 5.0), t.ratio - 1 - clip.epsilon_high,
             t.ratio - 1 + clip.epsilon_low]  # fmt: skip
    clear = t.mask & (torch.stack(edges).abs() > bound).all(0)
    same = (given.got > -torch.inf) == (given.want > -torch.inf)
    require(bool(same[clear].all()), f"candidates {given.got}, expected {given.want}")


def _judge_metrics(case: Case, found: Found, want: Any, statistics: Any, computed: Tensor | None) -> None:
    """computed: where only some tokens were, the means over those that the output gives anew."""
    metrics, on = found.output.metrics, case.tokens
    require(set(metrics) == set(want.metrics), f"metrics {sorted(metrics)}")
    ref = case.keywords.get("ref_logprobs")
    logp = statistics.logprobs.detach().reshape(-1)[on]
    logs = 1.0 + largest(logp, *(case.keywords[n].reshape(-1)[on] for n in ("old_logprobs", "ref_logprobs")
                                 if n in case.keywords))  # fmt: skip
    gap = 0.0 if ref is None else max([0.0, *(ref.double().reshape(-1)[on] - logp).tolist()])
    ratio = max(1.0, largest(want.metrics["ratio_max"]))
    wanted = dict(want.metrics)
    names = set(wanted)
    if computed is not None:
        names = {"token_count", "active_fraction", "weight"}
        if case.vocabulary > 2 and computed.any():  # a log-prob of a token is then never exactly 0
            names |= {"entropy", "approx_kl"}
            wanted["entropy"] = statistics.entropy[computed].mean()
            old = case.keywords.get("old_logprobs")
            wanted["approx_kl"] = torch.zeros(()) if old is None else (old - statistics.logprobs)[computed].mean()
    if case.entry == "logprob_policy_loss" and "entropy" not in case.keywords:
        wanted["entropy"] = torch.tensor(math.nan)
    objective, custom = features(case).objective, written(case.spec)
    flat = any(isinstance(surrogate, reference.Sapo) for surrogate in surrogates_of(objective))
    flat = flat or any(isinstance(weight, reference.Vespo) for weight in objective.ratio_weights)
    if case.broken or (flat and (case.extreme or case.compute_dtype != torch.float64)):
        # NaN has no size; the gate and VESPO's factor are flat at large ratios, but for what the precision holds.
        names -= {"active_fraction"}
    if custom:
        names -= {"clip_fraction_low", "clip_fraction_high", "dual_clip_fraction"}  # a function has no bounds
    if written_gspo in custom:
        names -= {"ratio_mean", "ratio_max"}  # of the tokens
    for name in sorted(names):
        value = torch.as_tensor(wanted[name]).double()
        size = {"kl": math.exp(min(gap, 50.0)) * logs, "ratio_mean": ratio, "ratio_max": ratio}.get(name, 1.0)
        size *= ratio if name == "kl" else 1.0
        bound = ROUNDINGS * eps(case.compute_dtype) * logs * (size + largest(value))
        expect(f"metric {name}", metrics[name], value, bound)


def _judge_gradients(
    case: Case, found: Found, truth: Any, eager: Any, incoming: list[Tensor], coefficient: float, x: float
) -> None:
    """incoming: dL/dlogp and, if it is one, dL/dH; coefficient: how large they are, cancelled parts included."""
    if not case.wanted:
        return
    leaves, stats, _ = truth
    wanted = [leaves[name] for name in case.wanted]

    def push(leaves: dict[str, Tensor], stats: Any) -> list[Tensor]:
        outputs = list(stats)[: len(incoming)]
        given = [g.to(o.dtype) for g, o in zip(incoming, outputs, strict=True)]
        found = torch.autograd.grad(outputs, [leaves[n] for n in case.wanted], given, allow_unused=True)
        return [torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(case.wanted, found, strict=True)]

    on = case.tokens.view(case.shape)
    if overflows(case, sum((g != 0) & on for g in incoming)):
        return _judge_overflow(found)
    exact = push(leaves, stats)
    plain = exact if eager is None else push(eager[0], eager[1])
    slope = logit_slope(case)
    moved = largest(incoming[0][on]) + (largest(incoming[1][on]) if len(incoming) > 1 else 0.0) * (
        2 + math.log(case.vocabulary) + x
    )
    for name, want, other, leaf in zip(case.wanted, exact, plain, wanted, strict=True):
        got = found.gradients[name]
        require(got is not None, f"no gradient of {name}")
        if name == "logits":
            noise = ROUNDINGS * eps(case.compute_dtype) * slope * (coefficient + moved) * (1 + x)
            roundings = 1 + (getattr(found.output, "route", "") == "one-launch" and case.factor != 1.0)
            bound = noise + roundings * (HALF[case.backend] * eps(case.dtype) * want.abs() + smallest(case.dtype))
            require(got.dtype == case.dtype, f"gradient of {name}: {got.dtype}")
            got, want = _of_a_broken_row(case, found, got, want, on)
            expect(f"gradient of {name}", got, want, bound)
            require(not got[~on].any(), "gradient of logits: not 0 at a row that is no token")
            continue
        size = product_bound(case, name, leaf)
        in_main_grad = name == "weight" and case.main_grad
        out = torch.float32 if in_main_grad else case.head[name].dtype
        require(got.dtype == out, f"gradient of {name}: {got.dtype}")
        bound = ROUNDINGS * eps(case.compute_dtype) * slope * (coefficient + moved) * (1 + x) * size
        bound += 2 * eps(case.head_dtype) * slope * moved * (1 + x) * size + SLACK * largest(other.double() - want)
        bound += 2 * eps(out) * largest(want) + smallest(out) * 4
        bound += 8 * eps(out) * in_main_grad  # added to numbers of 1, tile after tile
        expect(f"gradient of {name}", got, want, bound)
    if "hidden" in case.wanted:
        require(not found.gradients["hidden"][~on].any(), "gradient of hidden: not 0 at a row that is no token")


def _of_a_broken_row(case: Case, found: Found, got: Tensor, want: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
    """Where either side is NaN nothing is compared, but that a kept row with NaN must have a gradient of NaN.

    A dropped one has left the objective, though 0 times NaN is NaN in the reference's autograd; a ratio that is NaN is
    in every token of its rollout, though a clamp in the reference gives it a derivative of 0.
    """
    if not case.broken:
        return got, want
    broken = on & (found.output.weights != 0) & (case.logits.isnan() | (case.logits == torch.inf)).any(-1)
    if any(isinstance(surrogate, reference.Nothing) for surrogate in surrogates_of(features(case).objective)):
        broken &= False  # a token without a surrogate is in no loss
    require(bool(got[broken].isnan().all()), "a kept row with NaN has a gradient of numbers")
    unknown = got.isnan() | want.isnan()
    return got.masked_fill(unknown, 0.0), want.masked_fill(unknown, 0.0)


def overflows(case: Case, rows: int | Tensor) -> bool:
    """Whether more rows (a number, or those that are not 0) take part than the number that compaction allows.

    Where counting waits for nothing a number means nothing: PyTorch on a CPU.
    """
    most = case.options.get("compaction")
    number = rows if isinstance(rows, int) else int((rows != 0).sum())
    return case.backend == "triton" and isinstance(most, int) and number > most


def _judge_overflow(found: Found) -> None:
    for name, gradient in found.gradients.items():
        require(bool(gradient.isnan().any()), f"more rows than the capacity, and the gradient of {name} is a number")
