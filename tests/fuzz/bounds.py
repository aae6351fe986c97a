"""How large the numbers of a case are, parts that cancel included: what rounding errors are relative to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import reference

from .case import Case


def largest(*tensors: Tensor | None) -> float:
    """Of the finite magnitudes; 0 of nothing."""
    values = [x.detach().double().abs().reshape(-1) for x in tensors if x is not None]
    every = torch.cat(values) if values else torch.zeros(0)
    every = every[every.isfinite()]
    return every.max().item() if every.numel() else 0.0


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def smallest(dtype: torch.dtype) -> float:
    """The step of the smallest numbers."""
    return torch.finfo(dtype).smallest_normal * eps(dtype)


def logit_bound(case: Case, logits: Tensor) -> float:
    """The largest |transformed logit|, before a softcap bounds it: what an exponent's rounding is relative to."""
    on = case.tokens.view(case.shape)
    temperature = case.options.get("temperature", 1.0)
    low = temperature.min().item() if isinstance(temperature, Tensor) and temperature.numel() else temperature
    low = 1.0 if isinstance(low, Tensor) else float(low)
    return largest(logits[on]) * case.options.get("logit_scale", 1.0) / low


def logit_slope(case: Case) -> float:
    temperature = case.options.get("temperature", 1.0)
    low = temperature.min().item() if isinstance(temperature, Tensor) and temperature.numel() else temperature
    return case.options.get("logit_scale", 1.0) / (1.0 if isinstance(low, Tensor) else float(low))


def product_bound(case: Case, name: str, leaf: Tensor) -> float:
    """How large dL/d(name) is for a logits gradient of 1 in every row."""
    head, rows = case.head, max(int(case.tokens.sum()), 1)
    on = case.tokens.view(case.shape)
    hidden = largest(head["hidden"][on]) * head["hidden"].shape[-1] if name != "weight" else largest(head["hidden"][on])
    a, b = largest(head.get("lora A")), largest(head.get("lora B"))
    rank = head["lora A"].shape[0] if "lora A" in head else 0
    if name == "hidden":
        return 2 * (largest(head["weight"]) + case.lora_scale * rank * a * b)
    if name == "weight":
        return rows * hidden
    if name == "bias":
        return rows
    return rows * case.lora_scale * (hidden * a if name == "lora B" else 2 * hidden * b)


def term_bound(case: Case, objective: Any, statistics: Any, want: Any, factors: float) -> float:
    """How large a token's loss, or a part of it that cancels, may be, times the exponents whose rounding exp keeps."""
    keywords, on = case.keywords, case.tokens
    logp = statistics.logprobs.detach().reshape(-1)[on]

    def flat(name: str) -> Tensor | None:
        return keywords[name].double().reshape(-1)[on] if name in keywords else None

    old, ref, proxy = flat("old_logprobs"), flat("ref_logprobs"), flat("min_p_logprobs")
    logs = 1.0 + largest(logp, old, ref)
    ratio = max(largest(want.metrics["ratio_max"]), 1.0)
    importance = largest(keywords.get("importance_weights")) or 1.0
    policy = largest(case.advantages) * max(largest(want.weights), 1e-30) * importance * ratio * logs
    kl = 0.0
    if objective.kl_coef:
        gap = ref - logp
        factor = ratio if objective.kl_estimator == "k3-ratio" else 1.0
        kl = objective.kl_coef * factor * (1.0 + largest(gap) ** 2 + math.exp(min(max([0.0, *gap.tolist()]), 50.0)))
    entropy = abs(objective.entropy_coef) * (1.0 + largest(statistics.entropy))
    replaced = 0.0
    if objective.low_probability is not None:
        gap = torch.zeros(1) if proxy is None else proxy - logp
        # Its slope is 1 - e^gap, up to where the penalty of 10 ends it.
        replaced = objective.low_probability.beta * importance * 20.0 * (1.0 + largest(gap.clamp(max=3.0)))
    if objective.ratio_level != "token":
        policy *= 1.0 + logs
    if objective.ratio_weights:
        policy *= factors * 10.0 * (1.0 + logs)  # whose exponents are sums
    surrogates = surrogates_of(objective)
    sapo = 1.0 + 4.0 * any(isinstance(surrogate, reference.Sapo) for surrogate in surrogates)
    penalty = max(getattr(surrogate, "penalty", 0.0) for surrogate in surrogates) * importance * factors
    moved = penalty * 2.0 * logs + objective.log_ratio_coef * 4.0 * logs**2
    return policy * sapo + kl * logs + entropy + replaced + moved


def surrogates_of(objective: Any) -> list[Any]:
    replacements = [getattr(rule, "replacement", None) for rule in objective.shaping]
    return [objective.surrogate, *(x for x in replacements if x is not None)]
