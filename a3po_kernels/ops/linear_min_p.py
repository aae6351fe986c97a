"""min_p_token_logprobs of hidden @ weight.T, a chunk of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.checks import compute_dtype
from ..core.tiles import default_chunk_bytes, row_tiles
from ..core.transform import Transform
from .linear_head import LinearHead, Logits
from .linear_token_logprobs import (
    EVERY,
    EXACT,
    Lora,
    check_head_rows,
    read_compaction,
    read_head,
    rows_where,
    scatter_rows,
)
from .min_p import check_min_p, min_p_rows
from .token_logprobs import check_targets


def linear_min_p_unchecked(
    head: LinearHead, targets: Tensor, min_p: float, transform: Transform, max_chunk_bytes: int | None, compaction: int,
    backend: str,
) -> Tensor:  # fmt: skip
    """linear_min_p_token_logprobs after its checks, flat [N]."""
    with torch.no_grad(), torch.autocast(targets.device.type, enabled=False):
        rows, _ = rows_where(targets != transform.ignore_index, compaction)
        mine = targets if rows is None else targets[rows]
        budget = max_chunk_bytes or default_chunk_bytes(targets.device)
        logits = Logits(head, rows, row_tiles(mine.numel(), head.vocabulary, head.tile_bytes(), budget))
        out = torch.empty(mine.numel(), dtype=compute_dtype(head.dtype), device=mine.device)
        for at, _, tile in logits:
            out[at] = min_p_rows(tile[None], mine[at], min_p, transform, backend)
        return scatter_rows(out, rows, targets.numel())


def linear_min_p_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    min_p: float = 0.02,
    *,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    lora: Lora | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    head_dtype: torch.dtype | None = None,
    max_chunk_bytes: int | None = None,
    compaction: str | int = "auto",
    validate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """min_p_token_logprobs of the logits hidden @ weight.T + bias, which never exist as a whole; not differentiable.

    Args:
        hidden: [..., H]; weight: [V, H]; targets: [...]; min_p: as in min_p_token_logprobs; the others: as in
            linear_token_logprobs, but that a chunk holds whole rows.

    Returns:
        [...], in fp32 (fp64 for an fp64 head): -inf for a filtered target, 0 where the target is ignored.

    Raises:
        ValueError, TypeError, IndexError: as linear_token_logprobs does.
    """
    head = read_head(hidden, weight, bias, lora, vocab_size, None, head_dtype)
    check_head_rows(
        head, targets, tuple(hidden.shape[:-1]), 1.0, softcap, logit_scale, max_chunk_bytes, compaction, backend
    )
    check_min_p(min_p)
    check_targets(targets, head.vocabulary, ignore_index, validate)
    transform = Transform.of(1.0, softcap, logit_scale, ignore_index)
    flat = targets.reshape(-1).contiguous()
    chosen = EXACT if read_compaction(compaction, hidden.device, backend) == EXACT else EVERY
    out = linear_min_p_unchecked(head, flat, min_p, transform, max_chunk_bytes, chosen, backend)
    return out.view(targets.shape)
