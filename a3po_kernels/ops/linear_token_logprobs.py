"""Per-token log-probability and entropy of hidden @ weight.T, whose logits exist a tile at a time.

Forward forms every tile once (2 N V H operations). Backward forms them again for the rows that have a gradient, a share
f, and takes two products of each (6 f N V H).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import INDEX_DTYPES, LOGIT_DTYPES, check_backend, check_floating, check_tensor, check_transform
from ._linear_head import LinearHead, Logits, head_gradients
from ._tiles import column_tiles, default_chunk_bytes
from ._transform import Transform
from .token_logprobs import TokenStats, check_targets, empty_results, fold_statistics, write_gradient

Lora = tuple[Tensor, Tensor, float]


def rows_where(wanted: Tensor, exact: bool) -> Tensor | None:
    """The numbers of the wanted rows, or None for all: on a GPU an exact count waits for the device."""
    if not exact:
        return None
    index = wanted.nonzero()[:, 0]
    return None if index.numel() == wanted.numel() else index


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
    state = None
    if tiles.column_count > 1:
        state = torch.empty((4, targets.numel()), dtype=results[0].dtype, device=targets.device)
    for at, columns, tile in logits:
        fold_statistics(
            tile[None], targets[at], transform.at(at), tuple(result[at] for result in results), backend,
            first_column=columns.start, first=columns.start == 0, last=columns.stop == head.vocabulary,
            state=None if state is None else state[:, at],
        )  # fmt: skip
    return tuple(scatter_rows(result, rows, count) for result in results)


@torch.library.custom_op("a3po::linear_statistics", mutates_args=())
def _linear_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    main_grad: Tensor | None, targets: Tensor, lora_scale: float, vocabulary: int, dtype: torch.dtype,
    weight_dtype: torch.dtype, temperature: Tensor | None, temperature_value: float, logit_scale: float,
    softcap: float, ignore_index: int, max_chunk_bytes: int, exact: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logp, entropy, shift, log2_sum) [N] of hidden [N, H]."""
    head = LinearHead(hidden, weight, bias, lora_a, lora_b, lora_scale, vocabulary, dtype)
    transform = Transform(temperature, temperature_value, logit_scale, softcap, ignore_index)
    rows = rows_where(targets != ignore_index, exact)
    with torch.autocast(hidden.device.type, enabled=False):
        return head_statistics(head, targets, transform, rows, max_chunk_bytes, backend)  # type: ignore[return-value]


@_linear_statistics.register_fake
def _(hidden, weight, bias, lora_a, lora_b, main_grad, targets, lora_scale, vocabulary, dtype, *_):
    return empty_results(hidden.new_empty(0, dtype=dtype), targets.shape[0])


@torch.library.custom_op("a3po::linear_gradient", mutates_args=("main_grad",))
def _linear_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    main_grad: Tensor | None, targets: Tensor, shift: Tensor, log_sum: Tensor, entropy: Tensor,
    grad_logp: Tensor | None, grad_entropy: Tensor | None, wanted: list[bool], lora_scale: float, vocabulary: int,
    dtype: torch.dtype, weight_dtype: torch.dtype, temperature: Tensor | None, temperature_value: float,
    logit_scale: float, softcap: float, ignore_index: int, max_chunk_bytes: int, exact: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    """The wanted gradients of (hidden, weight, bias, lora_a, lora_b), each in its parameter's dtype; [0] if unwanted."""
    head = LinearHead(hidden, weight, bias, lora_a, lora_b, lora_scale, vocabulary, dtype)
    transform = Transform(temperature, temperature_value, logit_scale, softcap, ignore_index)
    count = targets.numel()
    active = targets != ignore_index
    given = [gradient for gradient in (grad_logp, grad_entropy) if gradient is not None]
    active &= torch.stack([gradient != 0 for gradient in given]).any(0)
    rows = rows_where(active, exact)
    per_row: list[Tensor | None] = [targets, shift, log_sum, entropy, grad_logp, grad_entropy]
    if rows is not None:
        per_row = [None if x is None else x[rows] for x in per_row]
        transform = transform.at(rows)
    number = count if rows is None else rows.numel()
    tiles = column_tiles(number, vocabulary, head.tile_bytes(), max_chunk_bytes)

    def to_gradient(at: slice, columns: slice, tile: Tensor) -> None:
        mine = [None if x is None else x[at] for x in per_row]
        write_gradient(tile[None], tile[None], *mine, transform.at(at), backend, columns.start)  # type: ignore[arg-type]

    with torch.autocast(hidden.device.type, enabled=False):
        logits = Logits(head, rows, tiles)
        gradients = head_gradients(
            head, logits, to_gradient, tuple(wanted), weight_dtype,
            active=active if rows is None and not exact else None, main_grad=main_grad,
        )  # fmt: skip
    if gradients.hidden is not None:
        gradients = gradients._replace(hidden=scatter_rows(gradients.hidden.to(hidden.dtype), rows, count))
    out = []
    for gradient, parameter in zip(gradients, head.parameters, strict=True):
        if gradient is None or parameter is None:
            out.append(hidden.new_empty(0))
        else:
            out.append(gradient if parameter is weight else gradient.to(parameter.dtype))
    return out


@_linear_gradient.register_fake
def _(hidden, weight, bias, lora_a, lora_b, main_grad, *arguments):
    wanted, weight_dtype = arguments[6], arguments[10]
    out = []
    for want, parameter in zip(wanted, (hidden, weight, bias, lora_a, lora_b), strict=True):
        absent = not want or parameter is None or (parameter is weight and main_grad is not None)
        dtype = weight_dtype if parameter is weight else None
        out.append(hidden.new_empty(0) if absent else torch.empty_like(parameter, dtype=dtype))
    return out


def _setup_context(ctx, inputs, output):
    *tensors, targets, lora_scale, vocabulary, dtype, weight_dtype, temperature = inputs[:12]
    _, entropy, shift, log_sum = output
    ctx.save_for_backward(*tensors, targets, shift, log_sum, entropy, temperature)
    ctx.mark_non_differentiable(shift, log_sum)
    ctx.set_materialize_grads(False)
    ctx.head = (lora_scale, vocabulary, dtype, weight_dtype)
    ctx.rest = inputs[12:]


def _backward(ctx, grad_logp, grad_entropy, *_):
    nothing = (None,) * 14
    wanted = list(ctx.needs_input_grad[:5])
    if not any(wanted) or (grad_logp is None and grad_entropy is None):
        return (None,) * 5 + nothing
    *saved, temperature = ctx.saved_tensors
    gradients = _linear_gradient(*saved, grad_logp, grad_entropy, wanted, *ctx.head, temperature, *ctx.rest)
    skip_weight = saved[5] is not None
    found = (
        gradient if want and not (skip_weight and i == 1) else None
        for i, (gradient, want) in enumerate(zip(gradients, wanted, strict=True))
    )
    return (*found, *nothing)


_linear_statistics.register_autograd(_backward, setup_context=_setup_context)
