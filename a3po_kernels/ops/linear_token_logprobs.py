"""Per-token log-probability and entropy of hidden @ weight.T, whose logits exist a tile at a time.

Forward forms every tile once (2 N V H operations). Backward forms them again for the rows that have a gradient, a share
f, and takes two products of each (6 f N V H).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.autograd import final
from ..core.checks import check_temperature
from ..core.operators import plainly, plainly_differentiable, without_autocast
from ..core.segments import true_first
from ..core.tiles import column_tiles, default_chunk_bytes
from ..core.transform import Transform
from ..parallel.agreement import check_agreement
from ..parallel.vocabulary import Shard, Split
from .head_arguments import (
    EVERY,
    EXACT,
    GIVEN,
    Lora,
    check_head_rows,
    read_compaction,
    read_head,
    weight_gradient_dtype,
)
from .linear_head import LinearHead, Logits, at_rows, head_gradients
from .token_logprobs import (
    TokenStats,
    check_targets,
    empty_results,
    empty_state,
    finish_statistics,
    fold_statistics,
    write_gradient,
)


def rows_where(
    wanted: Tensor, compaction: int, given: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """(numbers of the wanted rows, or None for all; whether there were more than fit, 0-d bool, or None if impossible).

    compaction: EXACT (on a GPU it waits for the device), EVERY row, GIVEN, or a number of rows: that many, the wanted
    first.
    """
    if compaction == GIVEN:
        return given, None
    if compaction == EVERY or compaction >= wanted.numel():
        return None, None
    if compaction == EXACT:
        index = wanted.nonzero()[:, 0]
        return None if index.numel() == wanted.numel() else index, None
    return true_first(wanted)[:compaction], wanted.sum() > compaction


def scatter_rows(values: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """Values of some rows among `count`, the others 0."""
    if rows is None:
        return values
    out = torch.zeros((count, *values.shape[1:]), dtype=values.dtype, device=values.device)
    return out.index_copy_(0, rows, values)


def head_statistics(
    head: LinearHead, targets: Tensor, transform: Transform, rows: Tensor | None, max_chunk_bytes: int, backend: str
) -> tuple[Tensor, ...]:
    """(logp, entropy, shift, log2_sum) [N] of the head; 0 at rows that are not in `rows`."""
    count = targets.numel()
    if rows is not None:
        targets, transform = targets[rows], transform.at(rows)
    tiles = column_tiles(targets.numel(), head.vocabulary, head.tile_bytes(), max_chunk_bytes)
    logits = Logits(head, rows, tiles)
    results = empty_results(logits.buffer, targets.numel())
    whole = head.shard is None
    state = empty_state(results) if tiles.column_count > 1 or not whole else None
    for at, columns, tile in logits:
        fold_statistics(
            tile[None], targets[at], transform.at(at), tuple(result[at] for result in results), backend,
            first_column=head.first + columns.start, vocabulary=head.vocabulary, first=columns.start == 0,
            last=whole and columns.stop == head.vocabulary,
            state=None if state is None else state[:, at],
        )  # fmt: skip
    if head.shard is not None and state is not None and targets.numel():
        finish_statistics(head.shard.gather(state).wait(), targets, transform, results, backend)
    return tuple(scatter_rows(result, rows, count) for result in results)


@torch.library.custom_op("a3po::linear_statistics", mutates_args=())
def _linear_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    main_grad: Tensor | None, targets: Tensor, lora_scale: float, vocabulary: int, dtype: torch.dtype,
    weight_dtype: torch.dtype, temperature: Tensor | None, temperature_value: float, logit_scale: float,
    softcap: float, ignore_index: int, max_chunk_bytes: int, forward_rows: int, backward_rows: int, backend: str,
    group: str, grad_hidden: str, shard_numbers: list[int], rows_given: Tensor | None,
    backward_rows_given: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logp, entropy, shift, log2_sum) [N] of hidden [N, H]; the rows to compute where forward_rows is GIVEN."""
    shard = Shard.of(group, grad_hidden, shard_numbers)
    head = LinearHead(hidden, weight, bias, lora_a, lora_b, lora_scale, vocabulary, dtype, shard)
    transform = Transform(temperature, temperature_value, logit_scale, softcap, ignore_index)
    rows, overflow = rows_where(targets != ignore_index, forward_rows, rows_given)
    with without_autocast(hidden.device):
        results = head_statistics(head, targets, transform, rows, max_chunk_bytes, backend)
    if overflow is not None:
        results = tuple(result.masked_fill(overflow, torch.nan) for result in results)
    return results  # type: ignore[return-value]


@_linear_statistics.register_fake
def _(hidden, weight, bias, lora_a, lora_b, main_grad, targets, lora_scale, vocabulary, dtype, *_):
    return empty_results(hidden.new_empty(0, dtype=dtype), targets.shape[0])


@torch.library.custom_op("a3po::linear_gradient", mutates_args=("main_grad",))
def _linear_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    main_grad: Tensor | None, targets: Tensor, shift: Tensor, log_sum: Tensor, entropy: Tensor,
    grad_logp: Tensor | None, grad_entropy: Tensor | None, wanted: list[bool], lora_scale: float, vocabulary: int,
    dtype: torch.dtype, weight_dtype: torch.dtype, temperature: Tensor | None, temperature_value: float,
    logit_scale: float, softcap: float, ignore_index: int, max_chunk_bytes: int, forward_rows: int, backward_rows: int,
    backend: str, group: str, grad_hidden: str, shard_numbers: list[int], backward_rows_given: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The wanted gradients of hidden, weight, bias, lora_a and lora_b, in their parameter's dtype; [0] if unwanted."""
    shard = Shard.of(group, grad_hidden, shard_numbers)
    head = LinearHead(hidden, weight, bias, lora_a, lora_b, lora_scale, vocabulary, dtype, shard)
    transform = Transform(temperature, temperature_value, logit_scale, softcap, ignore_index)
    count = targets.numel()
    active = targets != ignore_index
    given = [gradient for gradient in (grad_logp, grad_entropy) if gradient is not None]
    active &= torch.stack([gradient != 0 for gradient in given]).any(0)
    rows, overflow = rows_where(active, backward_rows, backward_rows_given)
    if backward_rows == GIVEN and rows is not None:
        overflow = active.index_fill(0, rows, False).any()
    # Rows that have no gradient but are multiplied all the same, whatever their hidden states hold.
    idle = None if backward_rows == EXACT else active
    if rows is not None:
        idle = None if idle is None else idle[rows]
        targets, shift, log_sum, entropy = targets[rows], shift[rows], log_sum[rows], entropy[rows]
        grad_logp, grad_entropy = at_rows(grad_logp, rows), at_rows(grad_entropy, rows)
        transform = transform.at(rows)
    if overflow is not None:
        # Rows were left out that have a gradient: NaN everywhere, not a sum that lacks them.
        grad_logp = None if grad_logp is None else grad_logp.masked_fill(overflow, torch.nan)
        grad_entropy = None if grad_entropy is None else grad_entropy.masked_fill(overflow, torch.nan)
    number = count if rows is None else rows.numel()
    tiles = column_tiles(number, vocabulary, head.tile_bytes(), max_chunk_bytes)

    def to_gradient(at: slice, columns: slice, tile: Tensor) -> tuple[Tensor, Tensor | None]:
        write_gradient(
            tile[None], tile[None], targets[at], shift[at], log_sum[at], entropy[at], at_rows(grad_logp, at),
            at_rows(grad_entropy, at), transform.at(at), backend, head.first + columns.start,
        )  # fmt: skip
        return tile, None

    with without_autocast(hidden.device):
        logits = Logits(head, rows, tiles)
        gradients = head_gradients(
            head, logits, to_gradient, tuple(wanted), weight_dtype,
            active=idle, main_grad=main_grad,
        )  # fmt: skip
    if gradients.hidden is not None:
        d_hidden = scatter_rows(gradients.hidden.to(hidden.dtype), rows, count)
        if overflow is not None:
            d_hidden.masked_fill_(overflow, torch.nan)
        gradients = gradients._replace(hidden=d_hidden)
    weight_sum = main_grad if main_grad is not None else gradients.weight
    if overflow is not None and wanted[1] and weight_sum is not None:
        weight_sum[:1].masked_fill_(overflow, torch.nan)  # even where no row was multiplied
    out = []
    for gradient, parameter in zip(gradients, head.parameters, strict=True):
        if gradient is None or parameter is None:
            out.append(hidden.new_empty(0))
        else:
            out.append(gradient if parameter is weight else gradient.to(parameter.dtype))
    return tuple(out)  # type: ignore[return-value]


@_linear_gradient.register_fake
def _(hidden, weight, bias, lora_a, lora_b, main_grad, *arguments):
    wanted, weight_dtype = arguments[6], arguments[10]
    out = []
    for want, parameter in zip(wanted, (hidden, weight, bias, lora_a, lora_b), strict=True):
        absent = not want or parameter is None or (parameter is weight and main_grad is not None)
        dtype = weight_dtype if parameter is weight else None
        out.append(hidden.new_empty(0) if absent else torch.empty_like(parameter, dtype=dtype))
    return tuple(out)


_gradient_plainly = plainly(_linear_gradient)


def _setup_context(ctx, inputs, output):
    *tensors, targets, lora_scale, vocabulary, dtype, weight_dtype, temperature = inputs[:12]
    _, entropy, shift, log_sum = output
    ctx.save_for_backward(*tensors, targets, shift, log_sum, entropy, temperature)
    ctx.mark_non_differentiable(shift, log_sum)
    ctx.set_materialize_grads(False)
    ctx.head = (lora_scale, vocabulary, dtype, weight_dtype)
    ctx.rest = inputs[12:-2]
    ctx.rows = inputs[-1]


def _backward(ctx, grad_logp, grad_entropy, *_):
    nothing = (None,) * 20
    wanted = list(ctx.needs_input_grad[:5])
    if not any(wanted) or (grad_logp is None and grad_entropy is None):
        return (None,) * 5 + nothing
    *saved, temperature = ctx.saved_tensors
    gradients = _gradient_plainly(*saved, grad_logp, grad_entropy, wanted, *ctx.head, temperature, *ctx.rest, ctx.rows)
    skip_weight = saved[5] is not None
    found = (
        final(gradient, saved[i]) if want and not (skip_weight and i == 1) else None
        for i, (gradient, want) in enumerate(zip(gradients, wanted, strict=True))
    )
    return (*found, *nothing)


_statistics_plainly = plainly_differentiable(_linear_statistics, _setup_context, _backward)


def head_statistics_unchecked(
    head: LinearHead, targets: Tensor, transform: Transform, main_grad: Tensor | None, max_chunk_bytes: int | None,
    forward_rows: int, backward_rows: int, given: tuple[Tensor | None, Tensor | None], backend: str,
) -> TokenStats:  # fmt: skip
    """linear_token_logprobs after its checks, flat [N]. given: the rows, forward and backward, where they are GIVEN."""
    logp, entropy, _, _ = _statistics_plainly(
        *head.parameters, main_grad, targets, head.lora_scale, head.vocabulary, head.dtype,
        weight_gradient_dtype(head.weight), *transform, max_chunk_bytes or default_chunk_bytes(targets.device),
        forward_rows, backward_rows, backend, *Shard.flat(head.shard), *given,
    )  # fmt: skip
    return TokenStats(logp, entropy)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    lora: Lora | None = None,
    main_grad: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    head_dtype: torch.dtype | None = None,
    max_chunk_bytes: int | None = None,
    compaction: str | int = "auto",
    tp_group: Any = None,
    vocab_start: int | tuple[int, int] | None = None,
    hidden_layout: str = "replicated",
    grad_hidden: str | None = None,
    validate: bool = False,
    backend: str = "auto",
) -> TokenStats:
    """Log-probability of each target and entropy of the logits hidden @ weight.T + bias, which never exist as a whole.

    With y = logit_scale * logits, u = softcap * tanh(y / softcap) (u = y without one) and x = u / temperature:
    logp = x[target] - log sum exp x and H = -sum p log p, in nats.

    Differentiable in hidden, weight, bias and the adapter; what does not require a gradient costs no product. dHidden
    and dWeight are summed over tiles in fp32 and rounded once.

    Args:
        hidden: [..., H], fp16, bf16, fp32 or fp64; row i predicts targets[i]. [..., T, H] where the head is split. Or a
            DTensor on the mesh of a DTensor weight: over the ranks that share the vocabulary Replicate, or Shard(its
            last dimension of rows), which is hidden_layout "sequence_sharded"; over others Replicate or a Shard of its
            rows, targets and the like being this rank's. Its gradient is placed as it is, or Partial where grad_hidden
            leaves a sum to be taken.
        weight: [V, H]; frozen or tied weights need nothing special. Its gradient is in its own dtype, or in fp32 where
            `weight.grad_dtype` says so. Or a DTensor: Shard(0) over one dimension of its mesh gives tp_group,
            vocab_start and vocab_size (shards may be uneven or empty), Replicate over all is a head like any other.
            bias and lora's B must then be DTensors as it is, lora's A a Replicate or plain, and main_grad plain, for
            this rank's rows. Its gradient is a DTensor placed as it is, but Partial where it is Replicate and the rows
            are sharded. Of FSDP2 it must be the weight that its module has inside forward or after unshard().
        targets: [...], int32 or int64; a row whose target is `ignore_index` has logp = H = 0 and gradient 0.
        bias: [V].
        vocab_size: the true vocabulary where weight has more rows (padding); those take no part in the softmax.
        lora: (A [r, H], B [V, r], scale) of an adapter: the logits of weight + scale * B @ A, which is not formed.
        main_grad: fp32 [V, H], to which backward adds the weight's gradient; weight.grad then stays as it is.
        temperature: a number, a 0-d tensor, or one per token [...].
        softcap: bound of a tanh softcap, or None.
        logit_scale: multiplies the logits before the softcap.
        ignore_index: the target of a row that is not computed.
        head_dtype: of the products and of the logits; by default autocast's, else the wider of hidden's and weight's.
            torch.float32 is an fp32 head, under autocast too.
        max_chunk_bytes: budget of the tile of logits that exists at a time. By default 1/128 of a GPU's memory,
            between 64 MiB and 1 GiB; 64 MiB on the CPU. A tile has all rows and as many columns as fit; below 1024
            columns the rows are cut as well.
        compaction: "exact" leaves out rows without a gradient (and masked ones), at the price on a GPU of one
            synchronisation forward and one backward; "none" computes every row; "auto" is "exact" on the CPU, and on a
            GPU leaves out the masked rows, with one synchronisation forward ("none" while a CUDA graph is captured and
            under torch.compile). A number n lets backward multiply n rows, those with a gradient first, without a
            synchronisation; if more have one, every gradient is NaN rather than wrong. On the CPU a number is "exact".
        tp_group: a torch.distributed group whose ranks share the vocabulary: weight, bias and lora's B are this rank's
            rows of it (none is fine), targets are global numbers, vocab_size, if given, is the whole vocabulary's, and
            lora's A is the same on every rank. Everything else must be equal on all ranks, the incoming gradients too,
            and backward run on all of them. Four numbers a row are gathered, so that every rank has the same statistics
            to the bit; the gradients of weight, bias and B stay here, that of A is summed. Rows are cut into chunks as
            if the parts were equal: a larger one takes more than max_chunk_bytes.
        vocab_start: the global number of weight's first row, or (first, stop) where the rows from stop on are padding;
            by default the ranks hold equal parts in rank order. Given without vocab_size, the ranks exchange their
            sizes, for which a GPU waits.
        hidden_layout: "replicated", or "sequence_sharded": hidden has this rank's part of the rows, [..., T / ranks, H]
            of the targets' [..., T], in rank order; they are gathered here.
        grad_hidden: what becomes of each rank's part of dHidden: "all_reduce", summed on every rank, in fp32 (the
            default); "reduce_scatter", summed at the rows that "sequence_sharded" gives this rank and 0 elsewhere (the
            default there); "partial", left for the caller to sum.
        validate: on a GPU also check values, not only shapes, which waits for it. The CPU always checks. Over the ranks
            of tp_group one small collective first finds out whether they make the same call.
        backend: "triton", "torch" or "auto" (Triton on a GPU it supports, else torch).

    Returns:
        TokenStats(logprobs, entropy), each [...], in fp32 (fp64 for an fp64 head).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range.
        IndexError: a target outside the vocabulary, on the CPU or with `validate`.
        RuntimeError: on a double backward, which is not implemented.
    """
    if validate and tp_group is not None:
        check_agreement(tp_group, locals())
    split = Split(tp_group, vocab_start, hidden_layout, grad_hidden)
    head, shape = read_head(hidden, weight, bias, lora, vocab_size, main_grad, head_dtype, split)
    check_head_rows(
        head, targets, shape, temperature, softcap, logit_scale, max_chunk_bytes, compaction, backend
    )
    transform = Transform.of(temperature, softcap, logit_scale, ignore_index)
    check_targets(targets, head.total, ignore_index, validate)
    check_temperature(temperature, targets != ignore_index, validate)
    flat = targets.reshape(-1).contiguous()
    backward_rows = read_compaction(compaction, head.hidden, backend)
    forward_rows, rows = (EXACT if backward_rows == EXACT else EVERY), None
    if compaction == "auto" and backward_rows == EXACT and hidden.device.type != "cpu":
        # One wait: the rows of backward are those of forward.
        rows, _ = rows_where(flat != ignore_index, EXACT)
        forward_rows = backward_rows = EVERY if rows is None else GIVEN
    stats = head_statistics_unchecked(
        head, flat, transform, main_grad, max_chunk_bytes,
        forward_rows, backward_rows, (rows, rows), backend,
    )  # fmt: skip
    return TokenStats(stats.logprobs.view(targets.shape), stats.entropy.view(targets.shape))
