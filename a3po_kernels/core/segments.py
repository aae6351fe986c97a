"""Sums over the rollouts of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """[S] sums of values [N] over the segments of offsets [S + 1], in a fixed order on every device."""
    return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0.0)
