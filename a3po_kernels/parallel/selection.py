"""Exact selection of tokens that lie on several ranks: a radix search, a byte a round, of which only counts cross."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.rounding import bounded_fraction
from .groups import first_rank, gathered, group_rank, group_size, holds, total, total_over

# The number of tokens over all ranks is on the device; this bounds it, and keeps the products within 64 bits.
_MOST = 2**31 - 1
_BYTES = 4  # of a place below 2^31
Key = tuple[Tensor, int]  # int64 [N], and how many of its low bytes order


class Places(NamedTuple):
    """Where this rank's rows lie in rollouts whose tokens are spread over the ranks of cp_group.

    rollout, position: int64 [N], 0 <= position < limit and no two tokens at one place; rollouts: S, on all ranks.
    """

    cp_group: Any
    rollout: Tensor
    rollouts: int
    position: Tensor
    limit: int

    @property
    def by_position(self) -> Key:
        return self.position, width_of(self.limit)

    @property
    def by_rollout(self) -> Key:
        return self.rollout, width_of(self.rollouts)


def width_of(limit: int) -> int:
    """Bytes of the numbers below a limit."""
    return max(-(-max(limit - 1, 0).bit_length() // 8), 1)


def _signed(metric: Tensor) -> tuple[Tensor, torch.dtype]:
    """Integers in the order of the floats (-0 equals 0, NaN is the largest), and their dtype."""
    values = metric + 0.0
    kind = torch.int64 if metric.dtype == torch.float64 else torch.int32
    bits = values.view(kind)
    # Negative floats order backwards as integers: flip their magnitude bits.
    keys = torch.where(bits < 0, ~bits ^ torch.iinfo(kind).min, bits)
    return torch.where(values.isnan(), torch.iinfo(kind).max, keys), kind


def _by_metric(metric: Tensor, high: bool) -> Key:
    """The key of the floats, reversed for `high`."""
    keys, kind = _signed(metric)
    keys = ~keys if high else keys
    # Its top byte carries the sign: with that bit flipped bytes order as the numbers do.
    return (keys ^ torch.iinfo(kind).min).long(), metric.element_size()


def _digits(keys: Sequence[Key]) -> Iterator[Tensor]:
    for values, width in keys:
        for shift in range(8 * width - 8, -1, -8):
            yield (values >> shift) & 255


def _count_digits(digit: Tensor, open_: Tensor, base: Tensor | int, segments: int) -> Tensor:
    """[segments, 256]: how many open rows of each segment have each digit; base: 256 times the row's segment."""
    counts = torch.zeros(segments * 256, dtype=torch.int64, device=digit.device)
    at = digit if isinstance(base, int) else (base + digit).reshape(-1)
    return counts.scatter_add_(0, at, open_.long().reshape(-1)).view(segments, 256)


def _search(
    keys: Sequence[Key], open_: Tensor, left: Tensor, segment: Tensor | None, sum_: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """(chosen, open [N] bool, left [S]): of the lowest `left` [S] of the open rows of each segment, over all ranks.

    Open rows agree in every key; of each segment's `left` are still to be chosen. segment: int64 [N]; None: one.
    """
    segments = left.numel()
    base = 0 if segment is None else segment * 256
    at: Any = 0 if segment is None else segment
    found = torch.zeros_like(open_)
    digits = torch.arange(256, device=left.device)
    for digit in _digits(keys):
        counts = sum_(_count_digits(digit, open_, base, segments))
        reached = (counts.cumsum(1) < left[:, None]).sum(1)
        found = found | (open_ & (digit < reached[at]) & (left[at] > 0))
        left = left - torch.where(digits < reached[:, None], counts, 0).sum(1)
        open_ = open_ & (digit == reached[at])
    return found, open_, left


def _wanted(n: Tensor, ratio: float, ceil: bool, at_least: int, required: int) -> Tensor:
    """How many of n tokens a share is."""
    fraction = bounded_fraction(ratio, _MOST, ceil)
    k = (n * fraction.numerator + (fraction.denominator - 1 if ceil else 0)) // fraction.denominator
    k = k.clamp(min=at_least)
    return torch.where(k < required, 0, torch.minimum(k, n))


def select_global(
    metric: Tensor, eligible: Tensor, ratio: float, high: bool, ceil: bool, at_least: int, required: int,
    group: Any = None, places: Places | None = None,
) -> Tensor:  # fmt: skip
    """Bool [N]: this rank's share of the k lowest (or highest) tokens over all ranks of `group` (None: the default).

    All ranks agree to the token: ties go to the lower rank of the group, then to the earlier row. With `places`, over
    the ranks of their cp_group too, in the group or beside it, and ranks that share rollouts are one in a tie, which
    then goes to the earlier rollout and position. Without an initialised process group it is the batch.
    """
    key = _by_metric(metric, high)
    if places is not None:
        cp_group = places.cp_group

        def over_all(counts: Tensor) -> Tensor:
            return total_over(counts, group, cp_group)

        number = first_rank(group, cp_group) if holds(group, cp_group) else group_rank(group)
        by_rank = torch.full_like(places.position, number), width_of(group_size(group))
        left = _wanted(over_all(eligible.sum().view(1)), ratio, ceil, at_least, required)
        # Other ranks may have more rollouts, or longer ones: all search through as many bytes.
        keys = [key, by_rank, (places.rollout, _BYTES), (places.position, _BYTES)]
        found, open_, left = _search(keys, eligible, left, None, over_all)
        return found | (open_ & (left > 0))
    left = _wanted(total(eligible.sum().view(1), group), ratio, ceil, at_least, required)
    found, open_, left = _search([key], eligible, left, None, lambda counts: total(counts, group))
    if group_size(group) > 1:
        left = left - gathered(open_.sum().view(1), group)[: group_rank(group)].sum(0)
    return found | (open_ & (open_.long().cumsum(0) <= left))


def select_shared(
    metric: Tensor, eligible: Tensor, places: Places, whole: bool, ratio: float, high: bool, ceil: bool,
    at_least: int, required: int,
) -> Tensor:  # fmt: skip
    """Bool [N]: this rank's share of the k lowest (or highest) eligible tokens of each rollout, or the `whole` batch.

    Ties go to the earlier rollout, then to the earlier position.
    """

    def over_ranks(counts: Tensor) -> Tensor:
        return total(counts, places.cp_group)

    segment = None if whole else places.rollout
    if whole:
        n = eligible.sum().view(1)
    else:
        n = torch.zeros(places.rollouts, dtype=torch.int64, device=metric.device)
        n.scatter_add_(0, places.rollout, eligible.long())
    left = _wanted(over_ranks(n), ratio, ceil, at_least, required)
    keys = [_by_metric(metric, high), *([places.by_rollout] if whole else []), places.by_position]
    found, open_, left = _search(keys, eligible, left, segment, over_ranks)
    return found | (open_ & (left[0 if segment is None else segment] > 0))


def order_statistics(metric: Tensor, eligible: Tensor, places: Tensor, group: Any) -> Tensor:
    """[P]: the values at the places [P] (int64, from 0) among the eligible ones of all ranks in rising order."""
    (keys, width), (_, kind) = _by_metric(metric, False), _signed(metric[:0])
    count = places.numel()
    open_ = eligible.expand(count, -1)
    base = 256 * torch.arange(count, device=metric.device)[:, None]
    digits, left, prefix = torch.arange(256, device=metric.device), places + 1, torch.zeros_like(places)
    for digit in _digits([(keys, width)]):
        counts = total(_count_digits(digit.expand(count, -1), open_, base, count), group)
        reached = (counts.cumsum(1) < left[:, None]).sum(1)
        left = left - torch.where(digits < reached[:, None], counts, 0).sum(1)
        open_ = open_ & (digit == reached[:, None])
        prefix = (prefix << 8) | (reached & 255)
    lowest = torch.iinfo(kind).min
    signed = prefix ^ lowest if kind == torch.int64 else (prefix + lowest).to(kind)
    return torch.where(signed < 0, ~signed ^ lowest, signed).view(metric.dtype)
