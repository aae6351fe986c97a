"""Rollouts whose tokens are spread over context-parallel ranks: sums that cross, and where each token stands."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import INDEX_DTYPES, check_tensor
from ..core.layout import TokenLayout
from ..core.operators import reads_values
from .groups import check_group, group_rank, group_size, total
from .selection import Places

_LIMIT = 2**31
_LONGEST_OF_BLOCKS = 2**24


class _Joined(torch.autograd.Function):
    """The sum over ranks; a gradient of it on any rank is one of every rank's part."""

    @staticmethod
    def forward(values: Tensor, group: Any) -> Tensor:
        return total(values, group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> Any:
        return _Joined.apply(grad, ctx.group), None


class Context(NamedTuple):
    """The ranks that hold tokens of the same S rollouts, in the same order, and this rank's rows.

    position: int64 [N], each one's place in its rollout, 0 <= position < limit; None where nobody said.
    """

    cp_group: Any
    position: Tensor | None
    limit: int

    @property
    def ranks(self) -> int:
        return group_size(self.cp_group)

    def join(self, values: Tensor) -> Tensor:
        """The sum of values over the ranks, differentiable across them. Every rank must make the call."""
        return values if self.ranks == 1 else _Joined.apply(values, self.cp_group)

    def places(self, rollout: Tensor, rollouts: int) -> Places | None:
        """What a selection needs, of the rows' rollouts [N]."""
        if self.position is None:
            return None
        return Places(self.cp_group, rollout.long(), rollouts, self.position, self.limit)


def read_context(
    layout: TokenLayout, cp_group: Any, positions: Any, contiguous: bool, ordered: str | None
) -> Context | None:
    """The context of a call; None where each rollout lies on this rank alone, its rows in order.

    contiguous: whether ranks may be taken to hold one block of each rollout after another, all of one length; ordered:
    what needs the order of the tokens, or None.

    Raises:
        ValueError, TypeError: no such group, positions of another shape, dtype or device, positions without a cp_group,
            or none where `ordered` needs them.
    """
    check_group("cp_group", cp_group)
    if positions is not None:
        if cp_group is None:
            raise ValueError("positions are of tokens that cp_group spreads over ranks; got them without cp_group")
        check_tensor("positions", positions, layout.shape, INDEX_DTYPES, layout.offsets.device)
        return Context(cp_group, positions.reshape(-1).long(), _LIMIT)
    if cp_group is None or group_size(cp_group) == 1:
        return None
    if not contiguous:
        if ordered is not None:
            raise ValueError(f"packed rollouts under cp_group need positions, for {ordered}; got None")
        return Context(cp_group, None, 0)
    length = layout.shape[-1]
    if length * group_size(cp_group) > _LONGEST_OF_BLOCKS:
        raise ValueError(
            f"blocks of rollouts of up to {_LONGEST_OF_BLOCKS} tokens are taken without positions; got T = {length} on "
            f"each of {group_size(cp_group)} ranks"
        )
    first = group_rank(cp_group) * length
    block = torch.arange(first, first + length, device=layout.offsets.device)
    # The limit says how many rounds a selection takes: not from T, which could be another on another rank.
    return Context(cp_group, block.repeat(layout.rollouts), _LONGEST_OF_BLOCKS)


def joined_with_length(context: Context, counts: Tensor, length: int, validate: bool) -> tuple[Tensor, Tensor]:
    """Counts [S] summed over the ranks, and whether other ranks' blocks have another `length`, 0-d bool.

    Raises ValueError where they have, and values may be read.
    """
    size = torch.full((1,), length, dtype=torch.float64, device=counts.device)
    joined = context.join(torch.cat([counts.double(), size, size.square()]))
    uneven = context.ranks * joined[-1] != joined[-2].square()
    if reads_values(uneven, validate) and bool(uneven):
        raise ValueError(
            "padded blocks must be equally long on all ranks of cp_group, unless positions (and max_length where T "
            f"would be it) are given; got T = {length} here"
        )
    return joined[:-2].to(counts.dtype), uneven


def check_positions(context: Context, tokens: Tensor, rollout: Tensor, validate: bool) -> None:
    """Raises ValueError for places of tokens [N] bool that are none or are taken twice, where values may be read."""
    position = context.position
    if position is None or not reads_values(position, validate):
        return
    held = position[tokens]
    wrong = held[(held < 0) | (held >= context.limit)]
    if wrong.numel():
        raise ValueError(f"positions must lie in [0, 2^31); got {wrong[0].item()}")
    if torch.unique(rollout[tokens].long() * _LIMIT + held).numel() < held.numel():
        raise ValueError("positions must be different for the tokens of a rollout; got one twice")
