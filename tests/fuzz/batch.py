"""The N-sized arguments of a policy loss, drawn around the case's own policy."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import LOW, Case, Draw, legal_targets
from .functions import noise_of_the_others, scored
from .objectives import SCORES


def current_logprobs(case: Case) -> Tensor:
    """fp64 [...] of the case's own policy, to draw old and reference log-probs around; 0 where there is none."""
    if case.head:
        head = {name: value.double() for name, value in case.head.items()}
        weight = head["weight"]
        if "lora A" in head:
            weight = weight + case.lora_scale * head["lora B"] @ head["lora A"]
        logits = head["hidden"].nan_to_num() @ weight.T + head.get("bias", 0.0)
        logits = logits[..., : case.vocabulary]
    else:
        logits = case.logits.double().nan_to_num(neginf=-torch.inf)
    y = logits * case.options.get("logit_scale", 1.0)
    if softcap := case.options.get("softcap"):
        y = torch.where(y.isfinite(), softcap * torch.tanh(y / softcap), y)
    temperature = case.options.get("temperature", 1.0)
    if isinstance(temperature, Tensor) and temperature.ndim:
        temperature = temperature.double().unsqueeze(-1)
    _, targets = legal_targets(case)
    found = torch.log_softmax(y / temperature, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return torch.where(found.isfinite(), found, 0.0)


def draw_batch(d: Draw, case: Case) -> None:
    """The N-sized arguments of a policy loss."""
    shape, tokens, keywords = case.shape, case.tokens.view(case.shape), case.keywords
    rollouts = len(case.boundaries) - 1
    compute = case.compute_dtype

    def given(values: Tensor) -> Tensor:
        """In a dtype that the statistics' dtype holds without rounding."""
        dtype = d.pick(compute, compute, compute, torch.float32, torch.bfloat16)
        return values.to(dtype).to(d.pick(dtype, dtype, torch.float64))

    def hidden(values: Tensor) -> Tensor:
        return given(values).masked_fill(~tokens, torch.nan) if d.chance(0.8) else given(values)

    current = current_logprobs(case)
    off = d.pick(0.05, 0.3, 0.3, 1.0)
    old = current + off * d.normal(*shape)
    case.extreme = compute == torch.float64 and d.chance(0.08)
    if case.extreme:
        old = old + d.pick(20.5, 30.0) * d.true(0.3, *shape) - d.pick(20.5, 40.0) * d.true(0.2, *shape)
    if d.chance(0.3):
        old = (4 * old).round() / 4  # ties
    old = old.clamp(max=0.0)
    if d.chance(0.75):
        keywords["old_logprobs"] = hidden(old)
    if d.chance(0.97 if "kl_coef" in case.spec.fields else 0.4):
        keywords["ref_logprobs"] = hidden((current + 0.3 * d.normal(*shape)).clamp(max=0.0))
    if d.chance(0.6):
        keywords["old_entropy"] = hidden((4 * d.normal(*shape).abs()).round() / 4)
    metrics = [rule.fields.get("metric") for rule in case.spec.fields.get("shaping", ())]
    # A function that reads a score finds it; a rule that names one may not.
    by_function = noise_of_the_others in metrics or scored in metrics
    if by_function or d.chance(0.97 if set(SCORES) & set(metrics) else 0.1):
        tied = (2 * d.normal(*shape)).round() / 2
        for special in (torch.nan, torch.inf, -torch.inf) if d.chance(0.3) else ():
            tied = tied.masked_fill(d.true(0.15, *shape), special)
        keywords["scores"] = {"noise": hidden(d.normal(*shape)), "tied": hidden(tied)}
    low_head = bool(case.head) and case.head_dtype in LOW
    lp_reg = case.spec.name == "lp_reg" or "low_probability" in case.spec.fields
    # Where min-p keeps all tokens t is logp but for rounding, and t > logp a coin: only where both ways are the same.
    hinges = lp_reg and (low_head or case.spec.name != "lp_reg")
    if d.chance(0.5 if lp_reg else 0.1) or (hinges and d.chance(0.97 if "old_logprobs" in keywords else 1.0)):
        keywords["min_p_logprobs"] = hidden(
            torch.where(d.true(0.1, *shape), -torch.inf, (current + d.normal(*shape)).clamp(max=0.0))
        )
    alike = shape == (rollouts,)  # then values are the rollouts'
    kind = "rollout" if alike else d.pick("rollout", "token")
    signs = torch.tensor([1.0, -1.0, 0.0, -0.0], dtype=torch.float64)
    sign = signs[torch.randint(0, d.pick(2, 3, 4), shape if kind == "token" else (rollouts,), generator=d.generator)]
    advantages = given(sign * (0.5 + d.normal(*sign.shape).abs()))
    empty = torch.tensor([
        not case.tokens[a:b].any() for a, b in zip(case.boundaries, case.boundaries[1:], strict=False)
    ], dtype=torch.bool)  # fmt: skip
    if d.chance(0.8):
        advantages = advantages.masked_fill(~tokens if kind == "token" else empty, torch.nan)
    case.advantages = advantages
    if d.chance(0.25):
        size = shape if d.chance(0.5) else (rollouts,)
        polarity = torch.randint(-1, 2, size, generator=d.generator)
        keywords["polarity"] = polarity.to(d.pick(torch.int64, torch.int8, torch.float32, torch.float64))
    if d.chance(0.25):
        per_token = d.chance(0.6) and not alike
        importance = 0.5 + torch.rand(shape if per_token else (rollouts,), generator=d.generator)
        keywords["importance_weights"] = hidden(importance) if per_token else given(importance)
    kind = d.pick("none", "none", "float", "0-d")
    if kind != "none":
        value = d.pick(0.5, 7.0, 100.0, 3.0 if tokens.any() else 0.0)
        dtype = d.pick(torch.float32, torch.float64)
        keywords["denominator"] = value if kind == "float" else torch.tensor(value, dtype=dtype)
    if d.chance(0.5):
        keywords["max_length"] = d.pick(5, 9.0)
    if d.chance(0.7):
        step = d.pick(0, 3, 50, 150.5)
        keywords["step"] = torch.tensor(step, dtype=compute) if d.chance(0.4) else step
    if case.entry == "logprob_policy_loss":
        # Given in the logits' dtype.
        keywords["logprobs"] = current.masked_fill(~tokens, torch.nan).to(case.dtype)
        if d.chance(0.7):
            keywords["entropy"] = d.normal(*shape).abs().masked_fill(~tokens, torch.nan).to(case.dtype)
        case.wanted = tuple(name for name in ("logprobs", "entropy") if name in keywords and d.chance(0.9))
        case.logits, case.spelling = None, "plain"
