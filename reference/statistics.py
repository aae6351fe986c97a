"""Per-token statistics of the logits, one row at a time (SPEC section 2).

For the raw logits z of a row, logit scale s, softcap c, temperature tau and target a:

    y = s z;   u = c tanh(y / c) if a softcap is given, else y;   x = u / tau
    log p_j = x_j - log sum_k exp(x_k);   logp = log p_a;   H = - sum_j p_j log p_j   (nats)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    logprobs: Tensor
    entropy: Tensor


class Rows(NamedTuple):
    """The arguments of a call, flattened: one logits row, one target, one temperature per position."""

    logits: Tensor  # [N, V], in the dtype that everything is computed in
    targets: list[int]
    is_token: list[bool]
    temperatures: list[float]
    shape: torch.Size  # the leading shape, to give results back in


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
) -> TokenStats:
    """Log-probability of the target and entropy of every row, both differentiable.

    A row that is not a token (mask 0, or target `ignore_index`) has logp = H = 0 and gradient 0, whatever it holds.
    A row with NaN or +inf, or with nothing but -inf, gives NaN. float64 logits are computed in
    float64, others in float32.
    """
    rows = read_rows(logits, targets, temperature, softcap, logit_scale, ignore_index, mask)
    if not rows.targets:  # no rows: an empty sum keeps the result attached to the logits
        return TokenStats(rows.logits.sum(-1).reshape(rows.shape), rows.logits.sum(-1).reshape(rows.shape))
    logprobs, entropies = [], []
    for row, target, is_token, tau in zip(rows.logits, rows.targets, rows.is_token, rows.temperatures, strict=True):
        if not is_token:
            logprobs.append(differentiable_zero(row))
            entropies.append(differentiable_zero(row))
            continue
        log_p = log_softmax(transform(row, softcap, logit_scale) / tau)
        logprobs.append(log_p[target])
        entropies.append(entropy_of(log_p))
    return TokenStats(torch.stack(logprobs).reshape(rows.shape), torch.stack(entropies).reshape(rows.shape))


def logits_gradient(
    logits: Tensor,
    targets: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
) -> Tensor:
    """The closed-form gradient of SPEC section 2, for comparison with autograd. With q_j = log p_j:

    dL/dx_j = g_lp (1[j = target] - p_j) - g_H p_j (q_j + H);   dL/dz_j = dL/dx_j (1/tau) (1 - (u/c)^2) s
    """
    rows = read_rows(logits.detach(), targets, temperature, softcap, logit_scale, ignore_index, mask)
    result = torch.zeros_like(rows.logits)
    for i, row in enumerate(rows.logits):
        if not rows.is_token[i]:
            continue
        u = transform(row, softcap, logit_scale)
        q = log_softmax(u / rows.temperatures[i])
        p = q.exp()
        dx = torch.zeros_like(row)
        if grad_logprobs is not None:
            one_hot = torch.zeros_like(row)
            one_hot[rows.targets[i]] = 1.0
            dx = dx + grad_logprobs.detach().reshape(-1)[i] * (one_hot - p)
        if grad_entropy is not None:
            p_q_plus_h = torch.where(q == -math.inf, 0.0, p * (q + entropy_of(q)))  # p = 0: its limit is 0
            dx = dx - grad_entropy.detach().reshape(-1)[i] * p_q_plus_h
        dz = dx / rows.temperatures[i] * logit_scale
        if softcap is not None:
            dz = dz * torch.where(row.isfinite(), 1 - (u / softcap) ** 2, 1.0)  # non-finite logits bypass the cap
        result[i] = dz
    return result.reshape(logits.shape)


def min_p_token_logprobs(
    logits: Tensor,
    targets: Tensor,
    min_p: float = 0.02,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
) -> Tensor:
    """Lp-Reg's proxy log-probability t (arXiv 2510.03222, SPEC section 3). No gradient.

    p = softmax of the logits after scale and softcap, before temperature; keep p_j >= min_p max p; t is the log of
    the renormalised probability of the target, -inf where the target was filtered out, 0 where the row is no token.
    """
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be in [0, 1], got {min_p}")
    rows = read_rows(logits.detach(), targets, 1.0, softcap, logit_scale, ignore_index, mask)
    result = rows.logits.new_zeros(len(rows.targets))
    for i, row in enumerate(rows.logits):
        if not rows.is_token[i]:
            continue
        p = log_softmax(transform(row, softcap, logit_scale)).exp()
        kept = p >= min_p * p.max()
        target = rows.targets[i]
        if p.isnan().any():
            result[i] = math.nan
        elif kept[target]:
            result[i] = (p[target] / p[kept].sum()).log()
        else:
            result[i] = -math.inf
    return result.reshape(rows.shape)


def transform(row: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """u of the raw logits z. Non-finite logits bypass the softcap: -inf stays -inf."""
    y = logit_scale * row
    if softcap is None:
        return y
    return torch.where(row.isfinite(), softcap * torch.tanh(y / softcap), y)


def log_softmax(x: Tensor) -> Tensor:
    """log p_j = (x_j - m) - log sum_k exp(x_k - m), m = max x only to avoid overflow: the value does not depend on it.

    Written out so that -inf needs no special case: exp(-inf) = 0 adds nothing to the sum and has gradient 0, and the
    log-probability of a target at -inf is -inf with the one-hot gradient. NaN, +inf and an all -inf row make m, and
    with it the whole row, NaN.
    """
    shifted = x - x.max().detach()
    return shifted - shifted.exp().sum().log()


def entropy_of(log_p: Tensor) -> Tensor:
    """H = - sum_j p_j log p_j over the entries that are not exactly p = 0; those would add 0 log 0 = 0."""
    log_p = log_p[log_p != -math.inf]
    return -(log_p.exp() * log_p).sum()


def differentiable_zero(x: Tensor) -> Tensor:
    """Exactly 0, attached to the graph of x with gradient exactly 0, even where x is NaN."""
    return x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0.0).sum()


def read_rows(logits, targets, temperature, softcap, logit_scale, ignore_index, mask) -> Rows:
    """Check the arguments and flatten the leading dimensions."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    shape = logits.shape[:-1]
    if targets.shape != shape:
        raise ValueError(f"targets must have the shape {tuple(shape)} of the logits' rows, got {tuple(targets.shape)}")
    positive("logit_scale", logit_scale)
    if softcap is not None:
        positive("softcap", softcap)

    count, vocabulary = math.prod(shape), logits.shape[-1]
    target_of = targets.reshape(-1).tolist()
    on = read_mask(mask, shape)
    is_token = [on[i] and target_of[i] != ignore_index for i in range(count)]

    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        if temperature.shape != shape:
            raise ValueError(f"temperature must be a number or {tuple(shape)}, got {tuple(temperature.shape)}")
        tau_of = temperature.detach().reshape(-1).tolist()
    else:
        positive("temperature", temperature)
        tau_of = [float(temperature)] * count
    for i in range(count):
        if is_token[i]:
            positive("temperature", tau_of[i])
            if not 0 <= target_of[i] < vocabulary:
                raise IndexError(f"target {target_of[i]} is outside the vocabulary of {vocabulary}")

    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return Rows(logits.to(dtype).reshape(count, vocabulary), target_of, is_token, tau_of, shape)


def read_mask(mask: Tensor | None, shape: torch.Size) -> list[bool]:
    """A bool or 0/1 mask as a flat list; None is all ones."""
    if mask is None:
        return [True] * math.prod(shape)
    if mask.shape != shape:
        raise ValueError(f"mask must have the shape {tuple(shape)}, got {tuple(mask.shape)}")
    values = mask.reshape(-1).tolist()
    if any(value not in (0, 1) for value in values):
        raise ValueError("mask must hold only 0 and 1")
    return [bool(value) for value in values]


def positive(name: str, value) -> None:
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
