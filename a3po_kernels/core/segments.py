"""The rollouts of a batch as segments of its rows, and rows in an order."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """[S] sums of values [N] over the segments of offsets [S + 1], in a fixed order on every device."""
    return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0.0)


def segment_max(values: Tensor, offsets: Tensor) -> Tensor:
    """[S] maxima of values [N] over the segments of offsets [S + 1], NaN if one is; -inf of an empty one."""
    return torch.segment_reduce(values, "max", offsets=offsets, unsafe=True, initial=-torch.inf)


def whole_sum(values: Tensor) -> Tensor:
    """[]: the sum of values [N] in that fixed order; 0 of nothing."""
    count = values.shape[0]
    if not count:
        return values.new_zeros(())
    return segment_sum(values, torch.arange(0, count + 1, count, device=values.device))[0]


def segment_of(offsets: Tensor, rows: Tensor) -> Tensor:
    """int64, like rows: the segment of offsets [S + 1] that each row lies in; -1 before the first, S after the last."""
    return torch.searchsorted(offsets, rows, right=True) - 1


def true_first(flags: Tensor) -> Tensor:
    """int64 [N]: the numbers of the rows whose flag is True, then the others', each in order; it waits for nothing."""
    return torch.sort((~flags).to(torch.int8), stable=True).indices
