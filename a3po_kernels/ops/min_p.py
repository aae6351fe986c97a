"""Log-probability of the targets among the tokens that min-p sampling keeps: Lp-Reg's proxy policy."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import check_backend, choose
from ..core.checks import as_rows, check_rows, compute_dtype
from ..core.operators import plainly
from ..core.transform import Transform
from .token_logprobs import check_targets


def min_p_rows(logits: Tensor, targets: Tensor, min_p: float, transform: Transform, backend: str) -> Tensor:
    """[N] of logits [batch, rows, V]; the transform's temperature plays no part."""
    transform = transform._replace(temperature=None, temperature_value=1.0)
    return choose(backend, logits.device).min_p_logprobs(logits, targets, min_p, transform)


@torch.library.custom_op("a3po::min_p_token_logprobs", mutates_args=())
def _min_p(
    logits: Tensor, targets: Tensor, min_p: float, logit_scale: float, softcap: float, ignore_index: int, backend: str
) -> Tensor:
    """[N] of logits [batch, rows, V]; softcap 0 means none."""
    return min_p_rows(logits, targets, min_p, Transform(None, 1.0, logit_scale, softcap, ignore_index), backend)


@_min_p.register_fake
def _(logits, targets, *_):
    return logits.new_empty(targets.shape[0], dtype=compute_dtype(logits.dtype))


_min_p_plainly = plainly(_min_p)


def check_min_p(min_p: object) -> None:
    """Raises TypeError or ValueError unless 0 < min_p <= 1."""
    if isinstance(min_p, bool) or not isinstance(min_p, (int, float)):
        raise TypeError(f"min_p must be a number; got {type(min_p).__name__}")
    if not 0 < min_p <= 1:
        raise ValueError(f"min_p must lie in (0, 1]; got {min_p}")


def min_p_token_logprobs(
    logits: Tensor,
    targets: Tensor,
    min_p: float = 0.02,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    validate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Log-probability (nats) of each target among the tokens with p >= min_p * max p (Lp-Reg, arXiv 2510.03222).

    p is the softmax after the scale and the softcap, before any temperature; what is kept is renormalised. Not
    differentiable: the proxy is a constant of the objective.

    Args:
        logits: [..., V]; targets: [...]; softcap, logit_scale, ignore_index, validate, backend: as in token_logprobs.
        min_p: kappa, in (0, 1].

    Returns:
        [...], fp32 (fp64 for fp64 logits): -inf for a filtered target, 0 where the target is ignored.

    Raises:
        ValueError, TypeError, IndexError: as token_logprobs does.
    """
    check_rows(logits, targets, 1.0, softcap, logit_scale)
    check_backend(backend, logits.device)
    check_min_p(min_p)
    transform = Transform.of(1.0, softcap, logit_scale, ignore_index)
    check_targets(targets, logits.shape[-1], ignore_index, validate)
    flat = min_p_rows_of(as_rows(logits), targets.reshape(-1).contiguous(), min_p, transform, backend)
    return flat.view(targets.shape)


def min_p_rows_of(rows: Tensor, targets: Tensor, min_p: float, transform: Transform, backend: str) -> Tensor:
    """min_p_token_logprobs after its checks, of logits [batch, rows, V] and flat targets [N]; flat [N]."""
    return _min_p_plainly(
        rows.detach(), targets, float(min_p), transform.logit_scale, transform.softcap, transform.ignore_index, backend
    )
