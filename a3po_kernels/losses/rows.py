"""Which rows of a batch go through the linear head's products: those that may have a gradient, known on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_tensor
from ..core.layout import TokenLayout, token_layout
from ..core.operators import runs_plainly
from ..core.segments import segment_of, segment_sum, true_first
from ..named_objectives import as_objective
from ..objectives import CustomSurrogate, Objective, PolarityWeights, Ratio, TokenRule
from ..parallel.context import Context
from .batch import check_polarity
from .ratio_weights import reads_rollout

UNITS = ("token", "rollout", "batch")


@dataclass(frozen=True)
class RowPlan:
    """The rows of a batch that may have a gradient, and how many: made ahead, so that the loss need not wait for it.

    rows: int64 [K] in order (None: all N); rest: the other rows with a token (None: none); planned, read: bool [N],
    True at `rows`, and at `rows` and `rest`; boundaries: where each rollout begins among the rows, [S + 1] numbers on
    the host; layout: the N rows and their rollouts; objective: what it was made for; unit: what is never cut, a
    "token", a "rollout" or the "batch"; exact: every row is a token.
    """

    rows: Tensor | None
    rest: Tensor | None
    planned: Tensor
    read: Tensor
    boundaries: tuple[int, ...]
    layout: TokenLayout
    objective: Objective | None
    unit: str
    exact: bool

    @property
    def count(self) -> int:
        return self.layout.count

    @property
    def row_count(self) -> int:
        return self.count if self.rows is None else self.rows.numel()

    def to(self, device: torch.device | str) -> RowPlan:
        """The plan on another device; a copy to a GPU waits for nothing there."""
        wait = torch.device(device).type == "cpu"  # what is copied from a GPU must have arrived when it is read

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=not wait)

        tensors = (self.planned, self.read, self.layout.offsets)
        planned, read, offsets = (x.to(device, non_blocking=not wait) for x in tensors)
        layout = replace(self.layout, offsets=offsets)
        return replace(self, rows=move(self.rows), rest=move(self.rest), planned=planned, read=read, layout=layout)

    def other_rollouts(self, layout: TokenLayout) -> Tensor | None:
        """0-d bool: whether the rollouts of a layout, of as many rows and rollouts, are others; None: they are not."""
        if self.layout.padded and layout.padded:
            return None
        return (self.layout.offsets != layout.offsets).any()


def dependence(objective: Objective, current: list[TokenRule]) -> str:
    """Whose statistics the gradient of a token depends on: the "token"'s own, its "rollout"'s or the "batch"'s.

    current: the rules that select by the current policy. Beside one of them any rule over the batch waits for it.
    """
    own = objective.surrogate.depends_on if isinstance(objective.surrogate, CustomSurrogate) else "token"
    if objective.low_probability is not None or own == "batch":
        return "batch"
    wide = any(isinstance(rule, TokenRule) and rule.scope != "rollout" for rule in objective.shaping)
    # A function may read the whole batch.
    wide = wide or any(isinstance(rule, TokenRule) and callable(rule.metric) for rule in objective.shaping)
    if current and (wide or objective.normalize_over == "selected"):
        return "batch"
    together = objective.ratio_level != "token" or own == "rollout" or reads_rollout(objective)
    return "rollout" if current or together else "token"


def spread(flags: Tensor, tokens: Tensor, offsets: Tensor, unit: str) -> Tensor:
    """The tokens that share a unit with a flagged one."""
    if unit == "token" or not flags.numel():
        return flags
    if unit == "batch" or offsets.numel() < 2:
        return tokens
    some = segment_sum(flags.float(), offsets) > 0
    rows = torch.arange(flags.numel(), device=flags.device)
    rollout = segment_of(offsets, rows).clamp(0, some.numel() - 1)
    return tokens & some[rollout]


def spread_over_ranks(flags: Tensor, tokens: Tensor, offsets: Tensor, unit: str, context: Context) -> Tensor:
    """spread where rollouts lie on several ranks: the tokens here that share a unit with one flagged anywhere."""
    if unit != "rollout":
        return flags if unit == "token" else tokens
    some = context.join(segment_sum(flags.float(), offsets)) > 0
    rows = torch.arange(flags.numel(), device=flags.device)
    return tokens & some[segment_of(offsets, rows).clamp(0, max(some.numel() - 1, 0))]


def _moves_without_advantage(objective: Objective) -> bool:
    """Whether a token may have a gradient where its advantage is 0."""
    surrogates = [objective.surrogate, *(r.replacement for r in objective.shaping if isinstance(r, TokenRule))]
    free = any(isinstance(x, CustomSurrogate) or (isinstance(x, Ratio) and x.penalty) for x in surrogates)
    return bool(free or objective.kl_coef or objective.entropy_coef or objective.log_ratio_coef)


def may_move(objective: Objective, tokens: Tensor, advantages: Tensor, polarity: Tensor) -> Tensor:
    """Bool [N]: the tokens whose own terms may have a gradient, from mask, advantages and polarity alone."""
    possible = tokens
    if not _moves_without_advantage(objective):
        possible = possible & (advantages != 0)
    for rule in objective.shaping:
        if isinstance(rule, PolarityWeights):
            kinds = ((rule.positive, polarity > 0), (rule.negative, polarity < 0), (rule.zero, polarity == 0))
            for factor, where in kinds:
                possible = possible & ~where if factor == 0 else possible
    return possible


def find_rows(
    first: Tensor, second: Tensor, layout: TokenLayout, objective: Objective | None, unit: str, exact: bool
) -> RowPlan:
    """The plan of the rows `first` [N] and the others `second`; on a GPU it waits for their numbers, once."""
    device, count, offsets = first.device, first.numel(), layout.offsets
    running = torch.cat([offsets.new_zeros(1), first.cumsum(0)])
    mine, rest, *boundaries = torch.cat([running[-1:], second.sum().view(1), running[offsets]]).tolist()
    rows = None
    if mine < count:
        rows = true_first(first)[:mine]
    left = None
    if rest:
        left = true_first(second)[:rest]
    planned = first if rows is not None else torch.ones(count, dtype=torch.bool, device=device)
    return RowPlan(rows, left, planned, planned | second, tuple(boundaries), layout, objective, unit, exact)


def _per_token(layout: TokenLayout, values: Tensor) -> Tensor:
    if not layout.is_per_rollout(values):
        return values.reshape(-1)
    return values[layout.row_rollouts()]


def plan_rows(
    mask: Tensor,
    advantages: Tensor,
    *,
    objective: Objective | str,
    cu_seqlens: Tensor | None = None,
    polarity: Tensor | None = None,
    device: torch.device | str | None = None,
) -> RowPlan:
    """The rows of a batch that may have a gradient, for linear_policy_loss(..., plan=).

    They are known as soon as the rollouts are scored: no masked row has a gradient, and without a KL or entropy term
    none of a rollout whose advantage, or whose PolarityWeights, is 0. Made from tensors on the CPU it waits for
    nothing; from tensors on a GPU it waits once. With it the loss itself waits for nothing.

    Args:
        mask: per token, [B, T], or [N] with cu_seqlens; bool or 0/1.
        advantages: per rollout [B] or [S], or per token; per rollout wins where both fit.
        objective: the loss's Objective, or a preset's name.
        cu_seqlens: int32 or int64 [S + 1] offsets of packed rollouts, first 0, last N.
        polarity: +1, -1 or 0, per rollout or per token; the sign of the advantages if None.
        device: where the loss will run; the mask's by default.

    Returns:
        A RowPlan. Where a row outside it turns out to be a token, or one with a gradient, or the rollouts are others,
        the loss is NaN and each gradient holds NaN (on the CPU, and under `validate`, it is a ValueError): a plan of
        another batch is never silently wrong.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range.
    """
    check_tensor("mask", mask)
    if not runs_plainly(mask):
        raise ValueError("plan_rows counts rows and needs real values: no fake or meta tensors, and no tracing")
    objective = as_objective(objective)
    layout = token_layout("mask", mask, cu_seqlens, validate=False)
    layout.check_per_rollout("advantages", advantages)
    if polarity is not None:
        layout.check_per_rollout("polarity", polarity)
        check_polarity(polarity)
    tokens = layout.flat_mask(mask, False)
    assert tokens is not None
    if cu_seqlens is not None:
        rows = torch.arange(layout.count, device=tokens.device)
        tokens = tokens & (rows >= layout.offsets[0]) & (rows < layout.offsets[-1])
    values = _per_token(layout, advantages.detach())
    sign = values if polarity is None else _per_token(layout, polarity.detach())
    possible = may_move(objective, tokens, values, sign)
    rules = [rule for rule in objective.shaping if isinstance(rule, TokenRule) and rule.may_read_current]
    # As if no old log-probs were given: the rules then read the current policy, and need the most rows together.
    unit = dependence(objective, rules)
    mine = spread(possible, tokens, layout.offsets, unit)
    plan = find_rows(mine, tokens & ~mine, layout, objective, unit, False)
    return plan if device is None else plan.to(device)


def check_plan(plan: Any, layout: TokenLayout, device: torch.device, objective: Objective, unit: str) -> None:
    """Raises TypeError or ValueError for a plan of something else."""
    if not isinstance(plan, RowPlan):
        raise TypeError(f"plan must be a RowPlan, from plan_rows; got {type(plan).__name__}")
    rows, rollouts = plan.count, plan.layout.rollouts
    if (rows, rollouts) != (layout.count, layout.rollouts):
        takes = f"{layout.count} rows in {layout.rollouts} rollouts"
        raise ValueError(f"plan must be of {takes}; got one of {rows} in {rollouts}")
    if plan.planned.device != device:
        raise ValueError(f"plan must be on {device}; got {plan.planned.device}: plan_rows(..., device=)")
    if plan.objective != objective:
        raise ValueError("plan was made for another objective")
    if UNITS.index(plan.unit) < UNITS.index(unit):
        raise ValueError(f"plan keeps each {plan.unit} together, and the objective needs the {unit}")
