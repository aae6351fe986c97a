"""The linear head in one pass: each chunk's logits give statistics, coefficients and, in place, their own gradient.

6 N V H operations and no recomputation. The gradient is formed in forward, and scaled by the incoming one in backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import compute_dtype
from ..core.tiles import Tiles, row_tiles
from ..core.transform import Transform
from ..objectives import Objective
from ..ops.linear_head import Gradients, LinearHead, Logits, head_gradients
from ..ops.linear_token_logprobs import head_statistics, scatter_rows, weight_gradient_dtype
from ..ops.surrogate import merge_sums
from ..ops.token_logprobs import TokenStats, empty_results, fold_statistics, write_gradient
from ..schedules import Value
from .shaping import ShapedTokens
from .stages import TokenBatch, shape, token_terms


class Chunks(NamedTuple):
    """The rows of a pass (None: all), the rollouts [S + 1] they are cut into in that order, and how they are tiled."""

    rows: Tensor | None
    offsets: Tensor
    tiles: Tiles


def whole_rollouts(boundaries: list[int], tiles: Tiles) -> Tiles | None:
    """Tiles cut between rollouts only, or None where one is longer than a tile may be."""
    slices, start = [], 0
    for begin, end in itertools.pairwise(boundaries):
        if end - begin > tiles.rows:
            return None
        if end - start > tiles.rows:
            slices.append(slice(start, begin))
            start = begin
    slices.append(slice(start, boundaries[-1]))
    return tiles._replace(cuts=tuple(slices))


def plan_chunks(
    head: LinearHead, offsets: Tensor, rows: Tensor | None, unit: str, length: int | None, max_bytes: int
) -> Chunks | None:
    """How to go through the rows in one pass, or None where a chunk cannot hold a whole unit.

    unit: what must lie in one chunk, a "token", a "rollout" or the "batch"; length: of every rollout where the batch is
    padded and rows is None.
    """
    count = head.hidden.shape[0] if rows is None else rows.numel()
    if rows is not None:
        offsets = torch.searchsorted(rows, offsets)
    tiles: Tiles | None = row_tiles(count, head.vocabulary, head.tile_bytes(), max_bytes)
    assert tiles is not None
    if unit == "token" or tiles.row_count <= 1:
        return Chunks(rows, offsets, tiles)
    if unit == "batch" or (rows is None and length is None and offsets.device.type != "cpu"):
        return None
    # The evenly cut tiles may be shorter than the budget allows: rollouts take what it does.
    longest = max(max_bytes // (head.tile_bytes() * head.vocabulary), 1)
    boundaries = offsets.tolist() if rows is not None or length is None else list(range(0, count + 1, length))
    tiles = whole_rollouts(boundaries, tiles._replace(rows=longest))
    return None if tiles is None else Chunks(rows, offsets, tiles)


class OnePass(NamedTuple):
    """loss 0-d (attached to nothing), statistics and weights flat [N], sums as in ops.surrogate, and the gradients."""

    loss: Tensor
    stats: TokenStats
    shaped: ShapedTokens
    sums: Tensor
    gradients: Gradients


def one_pass(
    head: LinearHead, objective: Objective, batch: TokenBatch, targets: Tensor, transform: Transform, chunks: Chunks,
    rest: Tensor | None, shaped: ShapedTokens | None, scale: Tensor | Callable[[Tensor], Tensor], step: Value,
    wanted: tuple[bool, ...], max_bytes: int, backend: str,
) -> OnePass:  # fmt: skip
    """Goes through the chunks, then takes the statistics of the rows `rest`, which have no gradient (None without any).

    shaped: the tokens' weights where they are known already. scale: loss_scale's [S]; where it depends on
    a selection that only the batch's one chunk can make, the function that gives it of the weights [N].
    """
    rows, count = chunks.rows, targets.numel()
    mine = batch if rows is None else batch.at(rows, chunks.offsets)
    my_targets = targets if rows is None else targets[rows]
    my_transform = transform.at(rows)
    logits = Logits(head, rows, chunks.tiles)
    results = empty_results(logits.buffer, my_targets.numel())
    weights, sums = torch.zeros_like(results[0]), []
    my_shaped = shaped if shaped is None else _shaped_at(shaped, rows)
    beta: Value = 1.0

    def to_gradient(at: slice, columns: slice, tile: Tensor) -> None:
        nonlocal beta
        found = tuple(result[at] for result in results)
        logp, entropy, shift, log_sum = found
        fold_statistics(tile[None], my_targets[at], my_transform.at(at), found, backend)
        part = mine.at(at, chunks.offsets.clamp(at.start, at.stop) - at.start)
        stats = TokenStats(logp, entropy)
        here = shape(objective, part, stats, step, backend) if my_shaped is None else _shaped_at(my_shaped, at)
        factor = scale if isinstance(scale, Tensor) else scale(scatter_rows(here.weights, rows, count))
        terms = token_terms(objective, part, stats, here, factor, backend)
        weights[at], beta = here.weights, here.beta
        sums.append(terms.sums)
        d_entropy = terms.d_entropy if terms.d_entropy.numel() else None
        write_gradient(
            tile[None], tile[None], my_targets[at], shift, log_sum, entropy, terms.d_logp, d_entropy,
            my_transform.at(at), backend,
        )  # fmt: skip

    gradients = head_gradients(
        head, logits, to_gradient, wanted, compute_dtype(head.dtype), active=mine.tokens if rows is None else None
    )
    logp, entropy = (scatter_rows(result, rows, count) for result in results[:2])
    weights = scatter_rows(weights, rows, count)
    if rest is not None and isinstance(scale, Tensor):
        others = TokenStats(*head_statistics(head, targets, transform, rest, max_bytes, backend)[:2])
        left = torch.zeros_like(batch.tokens).index_fill_(0, rest, True)
        part = replace(batch, tokens=left)
        here = shape(objective, part, others, step, backend) if shaped is None else shaped
        sums.append(token_terms(objective, part, others, here, scale, backend).sums)
        logp, entropy, weights = logp + others.logprobs, entropy + others.entropy, weights + here.weights * left
    total = merge_sums(torch.stack(sums))
    full = ShapedTokens(weights, None, beta) if shaped is None else shaped
    return OnePass(total[0].clone(), TokenStats(logp, entropy), full, total, gradients)


def _shaped_at(shaped: ShapedTokens, rows: slice | Tensor | None) -> ShapedTokens:
    if rows is None:
        return shaped
    selected = None if shaped.selected is None else shaped.selected[rows]
    return ShapedTokens(shaped.weights[rows], selected, shaped.beta)


class _Attach(torch.autograd.Function):
    """Gives a loss gradients that are known already; backward scales them, in place, by the incoming one."""

    @staticmethod
    def forward(ctx, loss, gradients, rows, main_grad, *parameters):
        ctx.save_for_backward(*gradients)
        ctx.rows, ctx.main_grad, ctx.spent = rows, main_grad, False
        ctx.forms = [None if p is None else (p.shape[0], p.dtype) for p in parameters]
        ctx.weight_dtype = weight_gradient_dtype(parameters[1])
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        if ctx.spent:
            raise RuntimeError(
                "the one-pass route scales the gradient it holds in place, so backward runs once; route='recompute' "
                "allows a second backward"
            )
        ctx.spent = True
        gradients: list[Any] = list(ctx.saved_tensors)
        out: list[Tensor | None] = []
        for position, (gradient, form) in enumerate(zip(gradients, ctx.forms, strict=True)):
            if gradient is None or form is None:
                out.append(None)
                continue
            count, dtype = form
            if position == 1 and ctx.main_grad is not None:
                ctx.main_grad.addcmul_(gradient, grad_loss.to(gradient.dtype))
                out.append(None)
                continue
            gradient = gradient.mul_(grad_loss).to(ctx.weight_dtype if position == 1 else dtype)
            out.append(scatter_rows(gradient, ctx.rows, count) if position == 0 else gradient)
        return (None,) * 4 + tuple(out)


def attach(
    loss: Tensor, gradients: Gradients, rows: Tensor | None, main_grad: Tensor | None, head: LinearHead
) -> Tensor:
    """The loss, differentiable in the head's hidden states and parameters."""
    return _Attach.apply(loss, gradients, rows, main_grad, *head.parameters)
