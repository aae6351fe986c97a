"""Metrics of a batch whose tokens lie on several ranks; each reduction is asked for by name, none is implicit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.forms import METRICS
from .groups import gathered, group_size

# What each mean is over: the computed tokens unless it is named here; None: no mean.
_OVER = {
    "selected_fraction_positive": "positive", "selected_fraction_negative": "negative", "active_fraction": "all",
    "ratio_max": None, "weight": None, "token_count": None,
}  # fmt: skip
_KINDS = ("computed", "positive", "negative", "all")
_LARGEST, _FIRST, _COUNT = (METRICS.index(name) for name in ("ratio_max", "weight", "token_count"))


def _divisors(counts: Tensor) -> Tensor:
    """[M]: what the mean of each metric is over, of the counts of _KINDS; 1 for what is no mean."""
    given = dict(zip(_KINDS, counts.unbind(), strict=True))
    kinds = (_OVER.get(name, "computed") for name in METRICS)
    return torch.stack([counts.new_ones(()) if kind is None else given[kind] for kind in kinds])


def fold_metrics(
    metrics: Tensor, computed: Tensor, positive: Tensor, negative: Tensor, groups: Sequence[Any]
) -> Tensor:
    """METRICS [M] of the tokens of all ranks, from this rank's and the numbers (0-d) of tokens that its means are over.

    computed: tokens with statistics; positive, negative: those of that polarity. groups: one collective each, the next
    one of what the former gave. The ranks are added in one order, in fp64: the same bits on every rank.
    """
    groups = [group for group in groups if group_size(group) > 1]
    if not groups:
        return metrics
    known = metrics.double()
    counts = torch.stack([computed.double(), positive.double(), negative.double(), known[_COUNT]])
    values = torch.cat([known * _divisors(counts), counts])
    for group in groups:
        ranks = gathered(values, group)
        values = ranks.sum(0)
        values[_LARGEST], values[_FIRST] = ranks[:, _LARGEST].amax(), ranks[0, _FIRST]
    sums, counts = values.split([len(METRICS), len(_KINDS)])
    return (sums / _divisors(counts).clamp(min=1.0)).to(metrics.dtype)
