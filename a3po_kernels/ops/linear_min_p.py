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
    """Log-probability (nats) of each target among the tokens with p >= min_p * max p (Lp-Reg, arXiv 2510.03222).

    p is the softmax of the logits hidden @ weight.T + bias, which never exist as a whole, after the scale and the
    softcap, before any temperature; what is kept is renormalised. Not differentiable.

    Args:
        hidden: [..., H], fp16, bf16, fp32 or fp64; row i predicts targets[i]. It and weight may be DTensors.
        weight: [V, H]; one that is Shard(0) over a dimension of its mesh gives tp_group, vocab_start and vocab_size.
        targets: [...], int32 or int64.
        min_p: kappa, in (0, 1].
        bias: [V].
        vocab_size: the true vocabulary where weight has more rows (padding); those take no part in the softmax.
        lora: (A [r, H], B [V, r], scale) of an adapter: the logits of weight + scale * B @ A, which is not formed.
        softcap: bound of a tanh softcap, or None.
        logit_scale: multiplies the logits before the softcap.
        ignore_index: the target of a row that is not computed.
        head_dtype: of the products and of the logits; by default autocast's, else the wider of hidden's and weight's.
        max_chunk_bytes: budget of the tile of logits that exists at a time, which holds whole rows; by default 1/128 of
            a GPU's memory, between 64 MiB and 1 GiB; 64 MiB on the CPU.
        compaction: "exact" leaves out ignored rows, for which a GPU waits once; "none" computes every row; "auto" is
            "exact" but while a CUDA graph is captured and under torch.compile. A number is "exact" on the CPU, else
            "none".
        tp_group: a torch.distributed group whose ranks share the vocabulary: weight, bias and lora's B are this rank's
            rows of it, and targets are global numbers; one number a row is gathered, then two. Every rank gets the same
            result.
        vocab_start: the global number of the first row, or (first, stop) where those from stop on are padding; by
            default the ranks hold equal parts in rank order.
        hidden_layout: "replicated", or "sequence_sharded": hidden has this rank's part of the rows, in rank order.
        validate: on a GPU also check values, not only shapes, which waits for it. The CPU always checks. Over the ranks
            of tp_group one small collective first finds out whether they make the same call.
        backend: "triton", "torch" or "auto" (Triton on a GPU it supports, else torch).

    Returns:
        [...], in fp32 (fp64 for an fp64 head): -inf for a filtered target, 0 where the target is ignored.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range.
        IndexError: a target outside the vocabulary, on the CPU or with `validate`.
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
    chosen = EXACT if read_compaction(compaction, head.hidden, backend) == EXACT else EVERY
    out = linear_min_p_unchecked(head, flat, min_p, transform, max_chunk_bytes, chosen, backend)
    return out.view(targets.shape)
