"""What a loss reduces over other ranks: the groups that it was given, checked against what the objective asks for."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..core.layout import TokenLayout
from ..objectives import Objective, TokenRule
from ..parallel.context import Context, read_context
from ..parallel.data import fold_metrics
from ..parallel.groups import check_all_or_one, check_group, check_not_the_same_tokens, holds
from ..parallel.vocabulary import Shard


class Ranks(NamedTuple):
    """group: of data-parallel ranks (None: the default); reduce_metrics: whether metrics are those of all ranks.

    context: the ranks that share the batch's rollouts; None where each rollout is whole on its rank.
    """

    group: Any
    reduce_metrics: bool
    context: Context | None

    @classmethod
    def read(
        cls, layout: TokenLayout, objective: Objective, group: Any, reduce_metrics: Any, cp_group: Any, positions: Any,
        shard: Shard | None,
    ) -> Ranks:  # fmt: skip
        """Raises TypeError or ValueError for a group that is none, that nothing would be reduced over, or that holds
        ranks with the same tokens."""
        if not isinstance(reduce_metrics, bool):
            raise TypeError(f"reduce_metrics must be True or False; got {type(reduce_metrics).__name__}")
        check_group("group", group)
        rules = [rule for rule in objective.shaping if isinstance(rule, TokenRule)]
        wide = any(rule.scope == "global" for rule in rules)
        if group is not None and not (wide or reduce_metrics):
            raise ValueError(
                "group is what rules of scope 'global' select over and reduce_metrics=True reduces over; got a group, "
                "and neither (for the divisor of a whole step: denominator=global_denominator(..., group=))"
            )
        if shard is not None and (wide or reduce_metrics):
            check_not_the_same_tokens("group", group, shard.process_group)
        if shard is not None and cp_group is not None:
            check_not_the_same_tokens("cp_group", cp_group, shard.process_group)
        context = read_context(layout, cp_group, positions, layout.padded, _ordered(objective))
        if cp_group is not None and group is not None:
            check_all_or_one(group, cp_group)
        return cls(group, reduce_metrics, context)

    def reduced(self, metrics: Tensor, tokens: Tensor, polarity: Tensor) -> Tensor:
        """METRICS, of all ranks where that was asked for; tokens [N] bool: those with statistics."""
        if not self.reduce_metrics:
            return metrics
        groups = [self.group]
        if self.context is not None and not holds(self.group, self.context.cp_group):
            groups.insert(0, self.context.cp_group)
        positive, negative = (tokens & (polarity > 0)).sum(), (tokens & (polarity < 0)).sum()
        return fold_metrics(metrics, tokens.sum(), positive, negative, groups)


def _ordered(objective: Objective) -> str | None:
    """What of an objective needs the order of a rollout's tokens: whatever gives a tie to the earlier one."""
    if objective.low_probability is not None:
        return "Lp-Reg's candidates, whose ties go to the earlier position"
    for rule in objective.shaping:
        if isinstance(rule, TokenRule) and rule.quantile is None:
            return f"a TokenRule of scope {rule.scope!r}, whose ties go to the earlier position"
    return None
