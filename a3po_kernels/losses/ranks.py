"""What a loss reduces over other ranks: the groups that it was given, checked against what the objective asks for."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..objectives import Objective, TokenRule
from ..parallel.data import fold_metrics
from ..parallel.groups import check_group


class Ranks(NamedTuple):
    """group: of data-parallel ranks (None: the default); reduce_metrics: whether metrics are those of all its ranks."""

    group: Any
    reduce_metrics: bool

    @classmethod
    def read(cls, objective: Objective, group: Any, reduce_metrics: Any) -> Ranks:
        """Raises TypeError or ValueError for a group that is none, or that nothing would be reduced over."""
        if not isinstance(reduce_metrics, bool):
            raise TypeError(f"reduce_metrics must be True or False; got {type(reduce_metrics).__name__}")
        check_group("group", group)
        wide = any(isinstance(rule, TokenRule) and rule.scope == "global" for rule in objective.shaping)
        if group is not None and not (wide or reduce_metrics):
            raise ValueError(
                "group is what rules of scope 'global' select over and reduce_metrics=True reduces over; got a group, "
                "and neither (for the divisor of a whole step: denominator=global_denominator(..., group=))"
            )
        return cls(group, reduce_metrics)

    def reduced(self, metrics: Tensor, tokens: Tensor, polarity: Tensor) -> Tensor:
        """METRICS, of all ranks where that was asked for; tokens [N] bool: those with statistics."""
        if not self.reduce_metrics:
            return metrics
        positive, negative = (tokens & (polarity > 0)).sum(), (tokens & (polarity < 0)).sum()
        return fold_metrics(metrics, tokens.sum(), positive, negative, [self.group])
