"""Log-probability of the targets among the tokens that min-p sampling keeps: Lp-Reg's proxy policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..core.checks import as_rows, check_is_number, compute_dtype
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


def check_min_p(min_p: Any) -> None:
    """Raises TypeError or ValueError unless 0 < min_p <= 1."""
    check_is_number("min_p", min_p)
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
        logits: [..., V], fp16, bf16, fp32 or fp64; row i predicts targets[i] (nothing is shifted). Or a DTensor whose
            Shard(-1) over one dimension of its mesh gives tp_group, vocab_start and vocab_size.
        targets: [...], int32 or int64.
        min_p: kappa, in (0, 1].
        softcap: bound of a tanh softcap, or None.
        logit_scale: multiplies the logits before the softcap.
        ignore_index: the target of a row that is not computed.
        tp_group: a torch.distributed group whose ranks share the vocabulary: the logits are this rank's columns of it,
            and targets are global numbers; one number a row is gathered, then two. Every rank gets the same result.
        vocab_start: the global number of the first column, or (first, stop) where those from stop on are padding; by
            default the ranks hold equal parts in rank order.
        vocab_size: the true vocabulary where logits have more columns (padding); those take no part in the softmax.
        validate: on a GPU also check values, not only shapes, which waits for it. The CPU always checks. Over the ranks
            of tp_group one small collective first finds out whether they make the same call.
        backend: "triton", "torch" or "auto" (Triton on a GPU it supports, else torch).

    Returns:
        [...], fp32 (fp64 for fp64 logits): -inf for a filtered target, 0 where the target is ignored.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range.
        IndexError: a target outside the vocabulary, on the CPU or with `validate`.
    """
    if validate and tp_group is not None:
        check_agreement(tp_group, locals())
    logits, columns, shard, total = read_logits_shard(
        logits, targets, 1.0, softcap, logit_scale, Split(tp_group, vocab_start), vocab_size, backend
    )
    check_min_p(min_p)
    transform = Transform.of(1.0, softcap, logit_scale, ignore_index)
    check_targets(targets, total, ignore_index, validate)
    rows, flat = as_rows(logits)[..., :columns], targets.reshape(-1).contiguous()
    return min_p_rows_of(rows, flat, min_p, transform, backend, shard).view(targets.shape)


def min_p_rows_of(
    rows: Tensor, targets: Tensor, min_p: float, transform: Transform, backend: str, shard: Shard | None
) -> Tensor:
    """min_p_token_logprobs after its checks, of logits [batch, rows, V] and flat targets [N]; flat [N]."""
    group, _, numbers = Shard.flat(shard)
    return _min_p_plainly(
        rows.detach(), targets, float(min_p), transform.logit_scale, transform.softcap, transform.ignore_index, backend,
        group, numbers,
    )  # fmt: skip
