"""Log-probability of the targets among the tokens that min-p sampling keeps: Lp-Reg's proxy policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..core.checks import as_rows, compute_dtype
from ..core.operators import plainly
from ..core.transform import Transform
from ..parallel.agreement import check_agreement
from ..parallel.vocabulary import Shard, Split
from .token_logprobs import check_targets, read_logits_shard


def min_p_rows(
    logits: Tensor, targets: Tensor, min_p: float, transform: Transform, backend: str, shard: Shard | None = None
) -> Tensor:
    """[N] of logits [batch, rows, V]; the transform's temperature plays no part."""
    transform = transform._replace(temperature=None, temperature_value=1.0)
    kernels = choose(backend, logits.device)
    if shard is None or not targets.numel():
        return kernels.min_p_logprobs(logits, targets, min_p, transform)
    # The largest of all parts, then what each part has above the share of it.
    if logits.shape[-1]:
        largest = kernels.row_maxima(logits, targets, transform)
    else:
        largest = torch.full(targets.shape, -torch.inf, dtype=compute_dtype(logits.dtype), device=logits.device)
    largest = shard.gather(largest).wait().amax(0)
    if logits.shape[-1]:
        part = kernels.min_p_part(logits, targets, largest, min_p, transform, shard.first)
    else:
        part = torch.stack([torch.zeros_like(largest), torch.full_like(largest, torch.nan)])
    return kernels.finish_min_p(shard.gather(part).wait(), targets, min_p, transform)


@torch.library.custom_op("a3po::min_p_token_logprobs", mutates_args=())
def _min_p(
    logits: Tensor, targets: Tensor, min_p: float, logit_scale: float, softcap: float, ignore_index: int, backend: str,
    group: str, shard_numbers: list[int],
) -> Tensor:  # fmt: skip
    """[N] of logits [batch, rows, V]; softcap 0 means none."""
    transform = Transform(None, 1.0, logit_scale, softcap, ignore_index)
    return min_p_rows(logits, targets, min_p, transform, backend, Shard.of(group, "", shard_numbers))


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
    tp_group: Any = None,
    vocab_start: int | tuple[int, int] | None = None,
    vocab_size: int | None = None,
    validate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Log-probability (nats) of each target among the tokens with p >= min_p * max p (Lp-Reg, arXiv 2510.03222).

    p is the softmax after the scale and the softcap, before any temperature; what is kept is renormalised. Not
    differentiable: the proxy is a constant of the objective.

    Args:
        logits: [..., V]; targets: [...]; softcap, logit_scale, ignore_index, tp_group, vocab_start, vocab_size,
            validate, backend: as in token_logprobs; of a split vocabulary one number a row is gathered, then two.
        min_p: kappa, in (0, 1].

    Returns:
        [...], fp32 (fp64 for fp64 logits): -inf for a filtered target, 0 where the target is ignored.

    Raises:
        ValueError, TypeError, IndexError: as token_logprobs does.
    """
    if validate and tp_group is not None:
        check_agreement(tp_group, locals())
    logits, shard, total = read_logits_shard(
        logits, targets, 1.0, softcap, logit_scale, Split(tp_group, vocab_start), vocab_size, backend
    )
    check_min_p(min_p)
    transform = Transform.of(1.0, softcap, logit_scale, ignore_index)
    check_targets(targets, total, ignore_index, validate)
    flat = min_p_rows_of(as_rows(logits), targets.reshape(-1).contiguous(), min_p, transform, backend, shard)
    return flat.view(targets.shape)


def min_p_rows_of(
    rows: Tensor, targets: Tensor, min_p: float, transform: Transform, backend: str, shard: Shard | None
) -> Tensor:
    """min_p_token_logprobs after its checks, of logits [batch, rows, V] and flat targets [N]; flat [N]."""
    group, _, numbers = Shard.flat(shard)
    return _min_p_plainly(
        rows.detach(), targets, float(min_p), transform.logit_scale, transform.softcap, transform.ignore_index, backend,
        group, numbers,
    )  # fmt: skip
