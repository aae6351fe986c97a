"""A surrogate that is a PyTorch function: the loss of each token and its two coefficients, by autograd on N numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.forms import METRICS
from ..core.operators import runs_plainly
from ..objectives import CustomSurrogate
from ..ops.surrogate import PolicyTerms, with_coefficients
from ..ops.token_logprobs import TokenStats
from .batch import TokenBatch
from .token_values import TokenValues, check_result

# Shares of the tokens that a surrogate clips, each of its own tokens.
_CLIPPED = ("clip_fraction_low", "clip_fraction_high", "dual_clip_fraction")


def _loss(surrogate: CustomSurrogate, values: TokenValues) -> Tensor:
    return check_result("a CustomSurrogate's loss", surrogate.loss(values), values.mask.shape)


class _AnyScore(dict):
    """A score by whatever name, of the rows that are there."""

    def __init__(self, rows: Tensor):
        self.rows = rows

    def __missing__(self, name: str) -> Tensor:
        return (1.7 * self.rows.double() + len(name)).sin()


def _example(rows: Tensor, lengths: list[int], all_values: Mapping[str, Tensor]) -> TokenValues:
    offsets = torch.tensor([0, *lengths], device=rows.device).cumsum(0)
    rollout = torch.repeat_interleave(torch.arange(len(lengths), device=rows.device), offsets.diff())
    mask = torch.ones(rows.numel(), dtype=torch.bool, device=rows.device)
    given = {name: values[rows] for name, values in all_values.items()}
    values = TokenValues(mask, rollout, offsets, offsets.diff().double(), given)
    values.scores = _AnyScore(rows)
    return values


@torch.no_grad()
def _check_dependence(surrogate: CustomSurrogate, device: torch.device) -> bool:
    """Raises ValueError where the loss of a token changes with the company that `depends_on` says does not matter."""
    lengths = [3, 1, 4]
    count, generator = sum(lengths), torch.Generator().manual_seed(0)
    for spread in (0.1, 1.0, 4.0):

        def normal(scale: float) -> Tensor:
            return (scale * torch.randn(count, generator=generator, dtype=torch.float64)).to(device)

        logp = -normal(1.0).abs() - 0.01
        sign = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 0.0, -1.0], dtype=torch.float64, device=device)
        given = {
            "logprobs": logp, "old_logprobs": logp + normal(0.3 * spread), "ref_logprobs": logp + normal(0.3 * spread),
            "entropy": normal(1.0).abs(), "advantages": sign * (0.5 + normal(spread).abs()), "polarity": sign,
            "weights": 1.0 + normal(0.1).abs(), "selected": normal(1.0) > 0, "old_entropy": normal(1.0).abs(),
            "position": torch.tensor([0, 1, 2, 0, 0, 1, 2, 3], device=device),
            "rollout": torch.tensor([0, 0, 0, 1, 2, 2, 2, 2], device=device),
        }  # fmt: skip
        rows = torch.arange(count, device=device)
        whole = _loss(surrogate, _example(rows, lengths, given))
        alone = [1] * count if surrogate.depends_on == "token" else lengths
        if surrogate.depends_on == "batch":
            continue
        parts = [_loss(surrogate, _example(part, [part.numel()], given)) for part in rows.split(alone)]
        if not torch.allclose(torch.cat(parts), whole, rtol=1e-6, atol=1e-9, equal_nan=True):
            wider = "'rollout' or 'batch'" if surrogate.depends_on == "token" else "'batch'"
            raise ValueError(
                f"the loss of a CustomSurrogate with depends_on={surrogate.depends_on!r} depends on other tokens than "
                f"that: on an example a token's changes with its company; declare {wider}"
            )
    return True


def check_custom(surrogate: CustomSurrogate, device: torch.device) -> None:
    """_check_dependence, once for a surrogate, on an example on the batch's device."""
    if getattr(surrogate, "_checked", False) or torch.compiler.is_compiling():
        return
    try:
        passed = _check_dependence(surrogate, torch.device("cpu"))  # which waits for nothing
    except RuntimeError:
        if device.type == "cpu":
            raise
        passed = _check_dependence(surrogate, device)  # a function may hold tensors of its own there
    object.__setattr__(surrogate, "_checked", passed)


def _refuse_to_join(sums: Tensor) -> Tensor:
    # A chunk of its own tokens is all that such a function is shown: other ranks may be asked another number of times.
    raise ValueError(
        "a CustomSurrogate with depends_on='token' reads a sum over other tokens, which cp_group spreads over ranks; "
        "declare 'rollout' or 'batch'"
    )


def custom_terms(
    surrogate: CustomSurrogate, batch: TokenBatch, stats: TokenStats, weights: Tensor, selected: Tensor | None,
    mine: Tensor | None, scale: Tensor, has_entropy: bool,
) -> PolicyTerms:  # fmt: skip
    """The surrogate's loss and coefficients at the tokens `mine` (None: all), attached to nothing; without metrics."""
    tokens = batch.tokens
    kept = tokens & (weights != 0)
    kept = kept if mine is None else kept & mine
    rollout = batch.rollout.long()
    factor = torch.where(kept, scale[rollout], 0.0)
    if batch.importance is not None:
        factor = factor * torch.where(kept, batch.importance, 0.0)
    if runs_plainly(stats.logprobs):
        check_custom(surrogate, tokens.device)
    seen: set[str] = set()

    def total(logp: Tensor, entropy: Tensor) -> Tensor:
        values = TokenValues.of(batch, weights, selected, logp, entropy if has_entropy else None)
        if surrogate.depends_on == "token" and batch.ranks.context is not None:
            values.join = _refuse_to_join
        loss = _loss(surrogate, values).to(logp.dtype)
        seen.update(values.read)
        # A clamp's derivative of NaN is 0, which beside a loss of NaN would pass for sound: here it is NaN.
        broken = kept & loss.detach().isnan()
        loss = torch.where(broken, torch.where(broken, logp, 0.0) * torch.where(broken, torch.nan, 0.0), loss)
        return (torch.where(kept, loss, 0.0) * factor).sum()

    loss, d_logp, d_entropy = _derivatives(total, stats)
    # What a row without a token is given by the function is nothing.
    d_entropy = torch.where(tokens, d_entropy, 0.0) if "entropy" in seen else d_entropy[:0]
    return PolicyTerms(loss, torch.where(tokens, d_logp, 0.0), d_entropy, loss.new_zeros(len(METRICS)))


def join_terms(stats: TokenStats, parts: Sequence[PolicyTerms], counts: Tensor) -> PolicyTerms:
    """The sum of terms, differentiable in the statistics; the metrics are the last one's, and of all what they clip."""
    loss = torch.stack([part.loss.detach() for part in parts]).sum()
    d_logp = torch.stack([part.d_logp for part in parts]).sum(0)
    with_entropy = [part.d_entropy for part in parts if part.d_entropy.numel()]
    d_entropy = torch.stack(with_entropy).sum(0) if with_entropy else d_logp[:0]
    active = d_logp != 0 if not with_entropy else (d_logp != 0) | (d_entropy != 0)
    metrics = dict(zip(METRICS, parts[-1].metrics.unbind(), strict=True))
    metrics["active_fraction"] = active.sum() / counts.sum().clamp(min=1.0)
    for name in _CLIPPED:
        at = METRICS.index(name)
        metrics[name] = torch.stack([part.metrics[at] for part in parts]).sum()
    joined = torch.stack([value.to(loss.dtype) for value in metrics.values()])
    attached = with_coefficients(stats.logprobs, stats.entropy, loss, d_logp, d_entropy)
    return PolicyTerms(attached, d_logp, d_entropy, joined)


def _derivatives(total: Callable[[Tensor, Tensor], Tensor], stats: TokenStats) -> tuple[Tensor, Tensor, Tensor]:
    """(total, d total / d logp, d total / d entropy), attached to nothing."""
    logp, entropy = stats.logprobs.detach(), stats.entropy.detach()
    if not runs_plainly(stats.logprobs):
        (d_logp, d_entropy), value = torch.func.grad_and_value(total, argnums=(0, 1))(logp, entropy)
        return value, d_logp, d_entropy
    if torch.is_inference_mode_enabled():
        return total(logp, entropy), torch.zeros_like(logp), torch.zeros_like(logp)
    with torch.enable_grad():
        leaves = [logp.requires_grad_(), entropy.requires_grad_()]
        value = total(*leaves)
        found: Any = (None, None)
        if value.requires_grad:
            found = torch.autograd.grad(value, leaves, allow_unused=True)
    d_logp, d_entropy = (torch.zeros_like(logp) if x is None else x for x in found)
    return value.detach(), d_logp.detach(), d_entropy.detach()
