"""The linear head in one pass: each chunk's logits give statistics, coefficients and, in place, their own gradient.

6 N V H operations and no recomputation. The gradient is formed in forward, and scaled by the incoming one in backward.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.autograd import final
from ..core.checks import compute_dtype
from ..core.segments import true_first
from ..core.tiles import Tiles, row_tiles
from ..core.transform import Transform
from ..objectives import CustomSurrogate, Objective, TokenRule
from ..ops.head_arguments import weight_gradient_dtype
from ..ops.linear_head import Gradients, LinearHead, Logits, head_gradients
from ..ops.linear_token_logprobs import head_statistics, scatter_rows
from ..ops.one_launch import scale_gradient, write_statistics_and_gradient
from ..ops.token_logprobs import (
    TokenStats,
    empty_results,
    empty_state,
    finish_statistics,
    fold_statistics,
    write_gradient,
)
from ..parallel.vocabulary import Gathering
from .batch import TokenBatch
from .rows import RowPlan
from .shaping import ShapedTokens, shape
from .stages import policy_inputs, surrogate_form, token_terms, why_not_beside

# Share of a chunk's rows without a gradient from which gathering the others costs less than multiplying all.
_WORTH_GATHERING = 0.05


def whole_rollouts(boundaries: tuple[int, ...], tiles: Tiles) -> Tiles | None:
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


def plan_chunks(head: LinearHead, plan: RowPlan, unit: str, max_bytes: int) -> Tiles | None:
    """How to go through the plan's rows in one pass, or None where a chunk cannot hold a whole unit."""
    common = head.vocabulary if head.shard is None else head.shard.common
    tiles = row_tiles(plan.row_count, head.vocabulary, head.tile_bytes(), max_bytes, common)
    if tiles.row_count > 1 and head.shard is not None:
        # Two tiles at a time: one is formed while what crosses ranks for the other is on its way.
        max_bytes = max_bytes // 2
        tiles = row_tiles(plan.row_count, head.vocabulary, head.tile_bytes(), max_bytes, common)
    if unit == "token" or tiles.row_count <= 1:
        return tiles
    if unit == "batch":
        return None
    # The evenly cut tiles may be shorter than the budget allows: rollouts take what it does.
    longest = max(max_bytes // (head.tile_bytes() * common), 1)
    return whole_rollouts(plan.boundaries, tiles._replace(rows=longest))


class OnePass(NamedTuple):
    """loss 0-d (attached to nothing), statistics and weights flat [N], METRICS, the gradients, and what they lack.

    unit: 0-d, a factor of the gradients that was kept out of an fp16 chunk, or None.
    """

    loss: Tensor
    stats: TokenStats
    weights: Tensor
    metrics: Tensor
    gradients: Gradients
    unit: Tensor | None


class _Units(NamedTuple):
    """What is kept out of an fp16 chunk, whose gradient is then of order one, and out of its sums.

    inner [S]: what is left of the rollouts' factors; unit 0-d: a factor of every sum; rows [N] in (0, 1], or None: a
    factor of each row. unit and rows are powers of two.
    """

    inner: Tensor
    unit: Tensor | None
    rows: Tensor | None


def _fp16_units(scale: Tensor, rollout: Tensor, each: bool) -> _Units:
    """Of the factors [S] of the rollouts, which differ if `each` has its own; rollout: int32 [N]."""
    powers = torch.where(scale > 0, torch.exp2(torch.ceil(torch.log2(scale))), 0.0)
    largest = powers.amax() if powers.numel() else powers.new_zeros(())
    unit = torch.where(largest > 0, largest, 1.0)
    if not each:
        return _Units(scale / unit, unit, None)
    inner = torch.where(powers > 0, scale / powers, scale)  # NaN stays NaN
    return _Units(inner, unit, (powers / unit)[rollout])


def _most_kept(objective: Objective, plan: RowPlan, rollouts: int) -> int:
    """No more rows than this have a gradient after the rules that drop tokens, from the numbers of rows alone."""
    most = plan.row_count
    own = isinstance(objective.surrogate, CustomSurrogate) and objective.surrogate.depends_on != "token"
    if objective.ratio_level != "token" or own:
        return most  # the gradient reaches the dropped tokens of a rollout too
    for rule in objective.shaping:
        if not isinstance(rule, TokenRule) or rule.rest_scale != 0 or rule.polarity is not None:
            continue
        if rule.quantile is not None:
            continue  # of ties it keeps any number
        lengths = [most] if rule.scope == "batch" else [b - a for a, b in itertools.pairwise(plan.boundaries)]
        if rule.scope == "batch" or (rule.scope == "rollout" and len(lengths) == rollouts):
            share = Fraction(str(rule.ratio))
            most = min(most, sum(max(math.ceil(length * share), 1) for length in lengths))
    return most


def one_pass(
    head: LinearHead, objective: Objective, batch: TokenBatch, transform: Transform, plan: RowPlan, tiles: Tiles,
    unit: str, shaped: ShapedTokens | None, scale: Tensor | Callable[[Tensor], Tensor], wanted: tuple[bool, ...],
    max_bytes: int, to_main_grad: bool, backend: str,
) -> OnePass:  # fmt: skip
    """Goes through the chunks, then takes the statistics of the plan's other rows, which have no gradient.

    shaped: the tokens' weights where they are known already. scale: loss_scale's [S]; where it depends on
    a selection that only the batch's one chunk can make, the function that gives it of the weights [N].
    """
    assert batch.targets is not None
    rows, count = plan.rows, batch.tokens.numel()
    mine = batch if rows is None else batch.at(rows, torch.searchsorted(rows, batch.offsets))
    my_targets = mine.targets
    assert my_targets is not None
    my_transform = transform.at(rows)
    my_shaped = _shaped_at(shaped, rows)
    shard = head.shard
    logits = Logits(head, rows, tiles, buffers=2 if shard is not None and tiles.row_count > 1 else 1)
    results = empty_results(logits.buffer, my_targets.numel())
    form = surrogate_form(objective)
    half = head.dtype == torch.float16
    factor: Tensor | None = scale if isinstance(scale, Tensor) else None
    units: _Units | None = None

    def units_of(factor: Tensor) -> _Units:
        if not half:
            return _Units(factor, None, None)
        return _fp16_units(factor, mine.rollout, objective.aggregation == "seq-mean-token-mean")

    if factor is not None:
        units = units_of(factor)
    # A rule that is known already was applied to more than the plan's rows.
    most = _most_kept(objective, plan, batch.offsets.numel() - 1) if shaped is None else plan.row_count
    together = my_shaped is not None and why_not_beside(objective) is None and shard is None

    found_here: ShapedTokens | None = None
    on_their_way: dict[int, Gathering] = {}

    def begin(at: slice, columns: slice, tile: Tensor) -> None:
        """Takes this rank's part of a chunk's statistics and starts to gather all parts."""
        assert shard is not None
        found = tuple(result[at] for result in results)
        state = empty_state(found)
        fold_statistics(
            tile[None], my_targets[at], my_transform.at(at), found, backend, first_column=shard.first, last=False,
            state=state,
        )  # fmt: skip
        on_their_way[at.start] = shard.gather(state)

    def to_gradient(at: slice, columns: slice, tile: Tensor) -> tuple[Tensor, Tensor | None]:
        nonlocal factor, units, found_here
        found = tuple(result[at] for result in results)
        chunk = my_transform.at(at)
        part = mine.at(at, mine.offsets.clamp(at.start, at.stop) - at.start)
        stats = TokenStats(*found[:2])
        if together:
            assert units is not None
            inputs = policy_inputs(objective, part, _shaped_at(my_shaped, at), units.inner)
            write_statistics_and_gradient(tile[None], tile[None], my_targets[at], chunk, found, inputs, form, backend)
            return tile, None
        if shard is None:
            fold_statistics(tile[None], my_targets[at], chunk, found, backend)
        else:
            finish_statistics(on_their_way.pop(at.start).wait(), my_targets[at], chunk, found, backend)
        here = shape(objective, part, stats, backend) if my_shaped is None else _shaped_at(my_shaped, at)
        found_here = here
        if factor is None:
            assert callable(scale)
            factor = scale(scatter_rows(here.weights, rows, count))
            units = units_of(factor)
        assert units is not None
        terms = token_terms(objective, part, stats, here, units.inner, backend)
        d_entropy = terms.d_entropy if terms.d_entropy.numel() else None
        kept = _with_gradient(terms.d_logp, d_entropy, most)
        _, entropy, shift, log_sum = found
        target, d_logp = my_targets[at], terms.d_logp
        if kept is not None:
            tile, chunk = tile.index_select(0, kept), chunk.at(kept)
            target, shift, log_sum, entropy, d_logp = (x[kept] for x in (target, shift, log_sum, entropy, d_logp))
            d_entropy = None if d_entropy is None else d_entropy[kept]
        write_gradient(
            tile[None], tile[None], target, shift, log_sum, entropy, d_logp, d_entropy, chunk, backend, head.first
        )
        return tile, kept

    # One product is rounded once, to the weight's dtype; a sum, and what main_grad gets, stays wide till the end.
    one_chunk = tiles.row_count <= 1 and not half and not to_main_grad
    weight_dtype = weight_gradient_dtype(head.weight) if one_chunk else compute_dtype(head.dtype)
    gradients = head_gradients(
        head, logits, to_gradient, wanted, weight_dtype, active=None if plan.exact else mine.tokens,
        row_factors=lambda: None if units is None else units.rows, begin=None if shard is None else begin,
    )  # fmt: skip
    logp, entropy = (scatter_rows(result, rows, count) for result in results[:2])
    if plan.rest is not None:
        others = head_statistics(head, batch.targets, transform, plan.rest, max_bytes, backend)
        logp, entropy = logp + others[0], entropy + others[1]
    stats = TokenStats(logp, entropy)
    if shaped is None and unit == "batch" and found_here is not None:
        # What the batch's one chunk has selected: sums over other rows too may round another way.
        shaped = _mapped(found_here, lambda values: scatter_rows(values, rows, count))
    # The rules on all rows select what they selected in the chunks.
    shaped = shape(objective, batch, stats, backend) if shaped is None else shaped
    assert factor is not None and units is not None
    terms = token_terms(objective, batch, stats, shaped, factor, backend)
    return OnePass(terms.loss, stats, shaped.weights, terms.metrics, gradients, units.unit)


def _counts_freely(device: torch.device) -> bool:
    """Whether counting rows waits for nothing."""
    return device.type == "cpu"


def _with_gradient(d_logp: Tensor, d_entropy: Tensor | None, most: int) -> Tensor | None:
    """The rows of a chunk that have a gradient, where leaving out the others pays and waits for nothing; else None."""
    count = d_logp.numel()
    moving = d_logp != 0 if d_entropy is None else (d_logp != 0) | (d_entropy != 0)
    if _counts_freely(d_logp.device):
        kept = moving.nonzero()[:, 0]
        return kept if kept.numel() < (1 - _WORTH_GATHERING) * count else None
    if most >= (1 - _WORTH_GATHERING) * count:
        return None
    # Exactly the rows that have one come first; what fills the rest has none and adds zeros.
    return true_first(moving)[:most]


def _mapped(shaped: ShapedTokens, take: Callable[[Tensor], Tensor]) -> ShapedTokens:
    """Each of its per-token tensors, taken so."""
    selected = None if shaped.selected is None else take(shaped.selected)
    replaced = tuple((take(chosen), surrogate) for chosen, surrogate in shaped.replaced)
    return ShapedTokens(take(shaped.weights), selected, shaped.beta, replaced)


def _shaped_at(shaped: ShapedTokens | None, rows: slice | Tensor | None) -> Any:
    return shaped if shaped is None or rows is None else _mapped(shaped, lambda values: values[rows])


class _Attach(torch.autograd.Function):
    """Gives a loss gradients that are known already; backward scales them by the incoming one and casts, at once."""

    @staticmethod
    def forward(ctx, loss, gradients, unit, rows, main_grad, backend, *parameters):
        anchor = loss.new_empty(0)
        ctx.save_for_backward(anchor, unit, *gradients)
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.main_grad, ctx.backend, ctx.spent = rows, main_grad, backend, False
        ctx.forms = [None if p is None else (p.shape[0], p.dtype) for p in parameters]
        ctx.weight_dtype = weight_gradient_dtype(parameters[1])
        return loss.detach(), anchor

    @staticmethod
    def backward(ctx, grad_loss, _):
        if ctx.spent:
            raise RuntimeError(
                "the one-pass route scales the gradient it holds in place, so backward runs once; route='recompute' "
                "allows a second backward"
            )
        ctx.spent = True
        anchor, unit, *gradients = ctx.saved_tensors
        with torch.no_grad():
            out = _scaled(ctx, grad_loss, unit, gradients)
        return (None,) * 6 + tuple(None if gradient is None else final(gradient, anchor) for gradient in out)


def _scaled(
    ctx: Any, grad_loss: Tensor, unit: Tensor | None, gradients: list[Tensor | None]
) -> list[Tensor | None]:
    factor = grad_loss if unit is None else grad_loss.to(unit.dtype) * unit
    out: list[Tensor | None] = []
    for position, (gradient, form) in enumerate(zip(gradients, ctx.forms, strict=True)):
        if gradient is None or form is None:
            out.append(None)
            continue
        count, dtype = form
        if position == 1 and ctx.main_grad is not None:
            ctx.main_grad.addcmul_(gradient, factor.to(ctx.main_grad.dtype))
            out.append(None)
            continue
        dtype = ctx.weight_dtype if position == 1 else dtype
        into = None if gradient.dtype == dtype else torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
        gradient = scale_gradient(gradient, factor, ctx.backend, into)
        out.append(scatter_rows(gradient, ctx.rows, count) if position == 0 else gradient)
    return out


def attach(found: OnePass, rows: Tensor | None, main_grad: Tensor | None, head: LinearHead, backend: str) -> Tensor:
    """The loss, differentiable in the head's hidden states and parameters."""
    return _Attach.apply(found.loss, found.gradients, found.unit, rows, main_grad, backend, *head.parameters)[0]
