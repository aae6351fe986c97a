"""min_p_token_logprobs of hidden @ weight.T, a chunk of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.checks import compute_dtype
from ..core.operators import plainly, without_autocast
from ..core.tiles import default_chunk_bytes, row_tiles
from ..core.transform import Transform
from ..parallel.agreement import check_agreement
from ..parallel.vocabulary import Shard, Split
from .head_arguments import EVERY, EXACT, Lora, check_head_rows, read_compaction, read_head
from .linear_head import LinearHead, Logits
from .linear_token_logprobs import rows_where, scatter_rows
from .min_p import check_min_p, min_p_rows
from .token_logprobs import check_targets


@torch.library.custom_op("a3po::linear_min_p", mutates_args=())
def _linear_min_p(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, targets: Tensor,
    lora_scale: float, vocabulary: int, dtype: torch.dtype, min_p: float, logit_scale: float, softcap: float,
    ignore_index: int, max_chunk_bytes: int, compaction: int, backend: str, group: str, grad_hidden: str,
    shard_numbers: list[int],
) -> Tensor:  # fmt: skip
    """[N] of hidden [N, H]; compaction: see rows_where."""
    shard = Shard.of(group, grad_hidden, shard_numbers)
    head = LinearHead(hidden, weight, bias, lora_a, lora_b, lora_scale, vocabulary, dtype, shard)
    transform = Transform(None, 1.0, logit_scale, softcap, ignore_index)
    with without_autocast(hidden.device):
        rows, _ = rows_where(targets != ignore_index, compaction)
        mine = targets if rows is None else targets[rows]
        common = None if shard is None else shard.common
        logits = Logits(head, rows, row_tiles(mine.numel(), vocabulary, head.tile_bytes(), max_chunk_bytes, common))
        out = torch.empty(mine.numel(), dtype=compute_dtype(dtype), device=mine.device)
        for at, _, tile in logits:
            out[at] = min_p_rows(tile[None], mine[at], min_p, transform, backend, shard)
        return scatter_rows(out, rows, targets.numel())


@_linear_min_p.register_fake
def _(hidden, weight, bias, lora_a, lora_b, targets, lora_scale, vocabulary, dtype, *_):
    return hidden.new_empty(targets.shape[0], dtype=compute_dtype(dtype))


_linear_min_p_plainly = plainly(_linear_min_p)


def linear_min_p_unchecked(
    head: LinearHead, targets: Tensor, min_p: float, transform: Transform, max_chunk_bytes: int | None, compaction: int,
    backend: str,
) -> Tensor:  # fmt: skip
    """linear_min_p_token_logprobs after its checks, flat [N]."""
    parameters = (None if x is None else x.detach() for x in head.parameters)
    return _linear_min_p_plainly(
        *parameters, targets, head.lora_scale, head.vocabulary, head.dtype, float(min_p), transform.logit_scale,
        transform.softcap, transform.ignore_index, max_chunk_bytes or default_chunk_bytes(targets.device), compaction,
        backend, *Shard.flat(head.shard),
    )  # fmt: skip


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
    tp_group: Any = None,
    vocab_start: int | tuple[int, int] | None = None,
    hidden_layout: str = "replicated",
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
    if validate and tp_group is not None:
        check_agreement(tp_group, locals())
    split = Split(tp_group, vocab_start, hidden_layout)
    head, shape = read_head(hidden, weight, bias, lora, vocab_size, None, head_dtype, split)
    check_head_rows(
        head, targets, shape, 1.0, softcap, logit_scale, max_chunk_bytes, compaction, backend
    )
    check_min_p(min_p)
    transform = Transform.of(1.0, softcap, logit_scale, ignore_index)
    check_targets(targets, head.total, ignore_index, validate)
    flat = targets.reshape(-1).contiguous()
    chosen = EXACT if read_compaction(compaction, hidden, backend) == EXACT else EVERY
    out = linear_min_p_unchecked(head, flat, min_p, transform, max_chunk_bytes, chosen, backend)
    return out.view(targets.shape)
