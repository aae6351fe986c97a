"""Calls the package with a case's arguments, and plain PyTorch and the reference with the same in fp64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import a3po_kernels
import reference
import reference.loss
from a3po_kernels.losses import one_pass

from .case import Case
from .functions import Given, Recorded, give, record
from .objectives import build

PARAMETERS = ("hidden", "weight", "bias", "lora A", "lora B")


@dataclass
class Found:
    """What the package gave: its output, and the gradients of the wanted inputs, by name."""

    output: Any
    gradients: dict[str, Tensor] = field(default_factory=dict)
    plan: Any = None
    metrics: list[Recorded | None] = field(default_factory=list)  # of the shaping's parts, what a function gave


def spelled(values: Tensor, spelling: str) -> Tensor:
    """The same logits [..., V] with other strides; whatever lies between them is NaN."""
    if spelling == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if spelling == "leading transposed" and values.ndim == 3:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if spelling == "wider":
        wide = values.new_full((*values.shape[:-1], values.shape[-1] + 3), torch.nan)
        wide[..., :-3] = values
        return wide[..., :-3]
    if spelling == "every other row":
        wide = values.new_full((*values.shape[:-2], 2 * values.shape[-2], values.shape[-1]), torch.nan)
        wide[..., ::2, :] = values
        return wide[..., ::2, :]
    return values.clone()


def cotangents(case: Case) -> tuple[Tensor, Tensor]:
    """Incoming gradients of the log-probs and the entropy, some of them 0."""
    generator = torch.Generator().manual_seed(case.index)
    normal = torch.randn(2, *case.shape, generator=generator, dtype=torch.float64)
    normal = normal * (torch.rand(2, *case.shape, generator=generator) > 0.2)
    return normal[0].to(case.compute_dtype), normal[1].to(case.compute_dtype)


def make_plan(case: Case, objective: Any) -> Any:
    keywords = {name: case.keywords[name] for name in ("cu_seqlens", "polarity") if name in case.keywords}
    mask = case.keywords.get("mask", torch.ones(case.shape))
    return a3po_kernels.plan_rows(mask, case.advantages, objective=objective, **keywords)


def _differentiate(case: Case, output: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = {name: leaves[name] for name in case.wanted}
    if not wanted:
        return {}
    if case.spec is not None:
        outputs, incoming = [output.loss * case.factor], None
    else:
        outputs, incoming = list(output), list(cotangents(case))
        outputs = outputs[: 1 + case.index % 2]  # of the log-probs alone, or of both
        incoming = [case.factor * x for x in incoming[: len(outputs)]]
    found = torch.autograd.grad(outputs, list(wanted.values()), incoming, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def call(case: Case) -> Found:
    """The package's answer; raises what the package raises."""
    if case.spec is None:
        return _call(case, None)
    objective, metrics = record(build(a3po_kernels, case.spec))
    found = _call(case, objective)
    found.metrics = metrics
    return found


def _call(case: Case, objective: Any) -> Found:
    entry, keywords = case.entry, {**case.keywords, **case.options, "backend": case.backend}
    if entry == "group_advantages":
        return Found(a3po_kernels.group_advantages(**case.keywords, **case.options))
    if entry == "select_tokens":
        mask = keywords.pop("mask", None)
        return Found(a3po_kernels.select_tokens(keywords.pop("metric"), mask, **keywords))
    if objective is not None:
        keywords["objective"] = objective
    if case.head:
        return _call_linear(case, keywords, objective)
    if entry == "logprob_policy_loss":
        leaves = {name: keywords[name].clone().requires_grad_(name in case.wanted) for name in
                  ("logprobs", "entropy") if name in keywords}  # fmt: skip
        output = a3po_kernels.logprob_policy_loss(**{**keywords, **leaves}, advantages=case.advantages)
        return Found(output, _differentiate(case, output, leaves))
    logits = spelled(case.logits, case.spelling).requires_grad_(bool(case.wanted))
    leaves = {"logits": logits}
    if keywords.get("inplace_backward"):
        # Not over a leaf; it writes where the copy's strides say.
        logits = logits + 0.0 if case.wanted else logits
    if entry == "min_p_token_logprobs":
        return Found(a3po_kernels.min_p_token_logprobs(logits, case.targets, **keywords))
    if entry == "token_logprobs":
        output = a3po_kernels.token_logprobs(logits, case.targets, **keywords)
    elif case.module:
        fixed = {name: keywords.pop(name) for name in case.options if name in keywords}
        module = a3po_kernels.PolicyLoss(keywords.pop("objective"), **fixed, backend=keywords.pop("backend"))
        output = module(logits, case.targets, case.advantages, **keywords)
    else:
        output = a3po_kernels.policy_loss(logits, case.targets, case.advantages, **keywords)
    return Found(output, _differentiate(case, output, leaves))


def _call_linear(case: Case, keywords: dict[str, Any], objective: Any) -> Found:
    leaves = {name: value.clone().requires_grad_(name in case.wanted) for name, value in case.head.items()}
    keywords["bias"] = leaves.get("bias")
    if "lora A" in leaves:
        keywords["lora"] = (leaves["lora A"], leaves["lora B"], case.lora_scale)
    arguments = (leaves["hidden"], leaves["weight"], case.targets)
    if case.entry == "linear_min_p_token_logprobs":
        return Found(a3po_kernels.linear_min_p_token_logprobs(*arguments, **keywords))
    buffer = start = None
    if case.main_grad:
        start = torch.linspace(-1, 1, leaves["weight"].numel()).view(leaves["weight"].shape)
        buffer = keywords["main_grad"] = start.clone()
    plan = None
    if case.entry == "linear_token_logprobs":
        output = a3po_kernels.linear_token_logprobs(*arguments, **keywords)
    else:
        if case.plan:
            plan = keywords["plan"] = make_plan(case, objective)
        loss = a3po_kernels.LinearPolicyLoss(objective) if case.module else a3po_kernels.linear_policy_loss
        counts = one_pass._counts_freely
        with mock.patch.object(one_pass, "_counts_freely", lambda device: counts(device) and not case.uncounted):
            output = loss(*arguments, case.advantages, **keywords)
    gradients = _differentiate(case, output, leaves)
    if buffer is not None and start is not None:
        assert gradients.get("weight") is None, "the weight's gradient went to main_grad and to weight.grad"
        gradients["weight"] = buffer - start
    return Found(output, gradients, plan)


# --- the truth ---


def double(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: double(values) for name, values in value.items()}
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def transform_of(case: Case) -> dict[str, Any]:
    names = ("temperature", "softcap", "logit_scale", "ignore_index")
    return {name: double(case.options[name]) for name in names if name in case.options}


def plain_logits(case: Case, leaves: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Of a linear head, as eager PyTorch forms them in `dtype`; rows that are no token may be NaN and are 0 here."""
    at = {name: value.to(dtype) for name, value in leaves.items()}
    hidden = at["hidden"].masked_fill(~case.tokens.view(case.shape).unsqueeze(-1), 0.0)
    logits = hidden @ at["weight"].T
    if "bias" in at:
        logits = logits + at["bias"]
    if "lora A" in at:
        logits = logits + case.lora_scale * ((hidden @ at["lora A"].T) @ at["lora B"].T)
    return logits[..., : case.vocabulary]


def exact_statistics(case: Case, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Any, Tensor]:
    """(leaves, statistics of the reference, logits) in fp64; a `dtype` that is not is eager PyTorch in it."""
    exact = dtype == torch.float64
    given = case.head or {"logits": case.logits}
    leaves = {name: (value.double() if exact else value).clone().requires_grad_() for name, value in given.items()}
    logits = plain_logits(case, leaves, dtype) if case.head else leaves["logits"]
    stats = reference.token_logprobs(logits, case.targets, mask=case.tokens.view(case.shape), **transform_of(case))
    return leaves, stats, logits


@dataclass
class Scale:
    """How large the numbers are that the loss is a sum of: what rounding errors are relative to."""

    divisors: float = 0.0  # the sum over kept tokens of 1 / (what each is divided by)
    factors: float = 1.0  # the largest ratio weight
    metrics: list[Given] = field(default_factory=list)  # of the rules' functions


def reference_loss(case: Case, found: Found, statistics: Any, logits: Tensor) -> tuple[Any, Tensor, Tensor, Scale]:
    """(output, dL/dlogp, dL/dH, scale) of the reference's loss at given statistics, leaves [...] in fp64.

    The package's own statistics are given, and what its rules' functions gave: whichever token a rule selects or a
    bound clips is then no matter of their rounding, for which they are judged apart.
    """
    scale = Scale()
    objective, scale.metrics = give(build(reference, case.spec), found.metrics, case.spec.name == "clip_cov")
    aggregate, ratio_factors = reference.loss.aggregate, reference.loss.ratio_factors

    def factors(*arguments):
        found = ratio_factors(*arguments)
        scale.factors = max([1.0, *found[found.isfinite()].tolist()])
        return found

    def recorded(objective, batch, loss_of, zero, *rest):
        ones = {row: torch.ones_like(value) for row, value in loss_of.items()}
        scale.divisors = float(aggregate(objective, batch, ones, torch.zeros_like(zero), *rest))
        return aggregate(objective, batch, loss_of, zero, *rest)

    keywords = {name: double(value) for name, value in case.keywords.items() if name not in ("logprobs", "entropy")}
    targets, rest = case.targets, transform_of(case)
    if case.entry == "logprob_policy_loss":
        logits, targets = torch.zeros(*case.shape, 1, dtype=torch.float64), torch.zeros(case.shape, dtype=torch.long)
    with (
        mock.patch.object(reference.loss, "token_logprobs", lambda *_, **__: statistics),
        mock.patch.object(reference.loss, "aggregate", recorded),
        mock.patch.object(reference.loss, "ratio_factors", factors),
    ):
        output = reference.policy_loss(
            logits.detach(), targets, case.advantages.double(), objective=objective, **keywords, **rest
        )
    found = torch.autograd.grad(output.loss, list(statistics), allow_unused=True)
    d_logp, d_entropy = (torch.zeros(case.shape).double() if g is None else g for g in found)
    return output, d_logp, d_entropy, scale
