"""The N-sized arguments of a policy loss: one place that checks and reads them, for every call."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_floating, check_logprobs, check_temperature, refuse_dtensor
from ..core.layout import TokenLayout
from ..core.operators import reads_values
from ..core.segments import segment_sum
from ..objectives import CustomSurrogate, Objective, PolarityWeights, TokenRule
from ..ops.token_logprobs import check_targets
from ..ops.tokens import ReadTokens, read_tokens
from ..parallel.context import check_positions, joined_with_length
from ..parallel.selection import Places
from ..schedules import Value
from .ranks import Ranks
from .scales import as_number, scales_at


class TokenArguments(NamedTuple):
    """What a caller may give of each token or rollout; policy_loss says what each is."""

    advantages: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    mask: Tensor | None = None
    polarity: Tensor | None = None
    old_entropy: Tensor | None = None
    min_p_logprobs: Tensor | None = None
    importance_weights: Tensor | None = None
    step: Any = 0
    denominator: Any = None
    max_length: Any = None
    scores: Any = None
    group: Any = None
    reduce_metrics: Any = False
    cp_group: Any = None
    positions: Any = None
    shard: Any = None


@dataclass(frozen=True)
class TokenBatch:
    """N tokens as flat [N] tensors in the statistics' dtype; 0 or anything where tokens is False.

    targets: int64, ignore_index where no token is (None without logits). offsets: int64 [S + 1] of the rollouts,
    rollout: int32 [N], counts: [S] tokens of each, own_counts: of those the ones on this rank. weights: the factors of
    the objective's leading PolarityWeights. divisor, max_length: what the aggregation divides by, where the caller
    says. scores: the caller's, by name. position: int64, the place in its rollout; None where no function of the tokens
    may ask for it, or nobody said. importance_each: whether each token has an importance weight of its own, or its
    rollout one. ranks: what crosses ranks. uneven: 0-d bool, whether ranks that share rollouts hold blocks of other
    lengths; None where they may. scales: of each shaping rule what scales_at gives.
    """

    layout: TokenLayout
    offsets: Tensor
    targets: Tensor | None
    tokens: Tensor
    rollout: Tensor
    counts: Tensor
    own_counts: Tensor
    weights: Tensor
    advantages: Tensor
    polarity: Tensor
    old: Tensor | None
    old_entropy: Tensor | None
    reference: Tensor | None
    importance: Tensor | None
    proxy: Tensor | None
    step: Any
    denominator: Tensor | float | None
    max_length: float
    scores: dict[str, Tensor]
    position: Tensor | None
    importance_each: bool
    ranks: Ranks
    uneven: Tensor | None
    scales: tuple[tuple[Value, ...], ...]

    @classmethod
    def read(
        cls, layout: TokenLayout, objective: Objective, given: TokenArguments, dtype: torch.dtype, backend: str, *,
        targets: Tensor | None = None, vocabulary: int = 0, ignore_index: int = -100, temperature: Any = 1.0,
        validate: bool = False,
    ) -> TokenBatch:  # fmt: skip
        """Checks everything before anything is launched, then reads it in one launch.

        Raises:
            ValueError, TypeError: an argument of the wrong shape, dtype, device or range, or one that the objective
                needs and did not get.
            IndexError: a target outside the vocabulary, where values may be read.
        """
        ranks = Ranks.read(
            layout, objective, given.group, given.reduce_metrics, given.cp_group, given.positions, given.shard
        )
        context = ranks.context
        length = _check(layout, objective, given, validate)
        if context is not None and given.max_length is None:
            length *= context.ranks  # of the whole rollout, where ranks hold as much of it each
        by_length = objective.aggregation == "seq-mean-token-sum-norm" and given.denominator is None
        # The same on every rank, whatever T is here.
        blocks = layout.padded and (given.positions is None or (by_length and given.max_length is None))
        step = as_number(given.step, layout.offsets.device)
        scales = scales_at(objective, step, layout.offsets.device, validate)
        if reads_values(given.advantages, validate):
            tokens = None if given.mask is None else given.mask != 0
            if targets is not None:
                masked = targets if tokens is None else torch.where(tokens, targets, ignore_index)
                check_targets(masked, vocabulary, ignore_index, validate)
                tokens = masked != ignore_index
                check_temperature(temperature, tokens, validate)
            for name in ("old_logprobs", "ref_logprobs", "min_p_logprobs"):
                check_logprobs(name, getattr(given, name), tokens, validate)
        spread = (given.advantages, given.polarity, given.importance_weights)
        per_rollout = [x is not None and layout.is_per_rollout(x) for x in spread]
        read = read_tokens(
            targets, given.mask, layout.offsets, layout.count, dtype, *spread, per_rollout, _leading(objective),
            ignore_index, backend,
        )  # fmt: skip
        _check_divisor(objective, given.denominator, read, validate)
        _check_importance(read, validate)
        counts, uneven = read.counts, None
        if context is None:
            position = _positions(layout, read.rollout) if calls_functions(objective) else None
        else:
            check_positions(context, read.tokens, read.rollout, validate)
            if blocks:
                counts, uneven = joined_with_length(context, counts, layout.shape[-1], validate)
            else:
                counts = context.join(counts)
            position = context.position
        return cls(
            layout, layout.offsets, read.targets, read.tokens, read.rollout, counts, read.counts, read.weights,
            read.advantages, read.polarity, layout.flat(given.old_logprobs, dtype),
            layout.flat(given.old_entropy, dtype), layout.flat(given.ref_logprobs, dtype), read.importance,
            layout.flat(given.min_p_logprobs, dtype), step, as_number(given.denominator, layout.offsets.device), length,
            {name: values.detach().reshape(-1).to(dtype) for name, values in (given.scores or {}).items()},
            position, not per_rollout[2], ranks, uneven, scales,
        )  # fmt: skip

    def at(self, rows: slice | Tensor, offsets: Tensor) -> TokenBatch:
        """Some rows, in the rollouts that `offsets` cut them into."""
        per_token = (
            "targets", "tokens", "rollout", "weights", "advantages", "polarity", "old", "old_entropy", "reference",
            "importance", "proxy", "position",
        )  # fmt: skip
        given: dict[str, Any] = {name: getattr(self, name) for name in per_token}
        given = {name: None if values is None else values[rows] for name, values in given.items()}
        scores = {name: values[rows] for name, values in self.scores.items()}
        return replace(self, offsets=offsets, scores=scores, **given)


    def join(self, values: Tensor) -> Tensor:
        """The sum over the ranks that share the batch's rollouts, differentiable."""
        return values if self.ranks.context is None else self.ranks.context.join(values)

    def sums(self, values: Tensor) -> Tensor:
        """[S]: the sums of values [N] over the tokens of each rollout, on all ranks that share it."""
        return self.join(segment_sum(torch.where(self.tokens, values, torch.zeros_like(values)), self.offsets))

    @property
    def places(self) -> Places | None:
        """Where a selection finds the tokens of rollouts that ranks share; None: they are whole here."""
        context = self.ranks.context
        return None if context is None else context.places(self.rollout, self.layout.rollouts)


def _check_divisor(objective: Objective, denominator: Any, read: ReadTokens, validate: bool) -> None:
    """Raises ValueError for a denominator of 0 where tokens would be divided by it, not where there is none."""
    known = not isinstance(denominator, Tensor) or reads_values(denominator, validate)
    if denominator is None or not known or not reads_values(read.counts, validate) or denominator != 0:
        return
    counted = read.tokens
    if objective.normalize_over == "selected":
        if any(isinstance(rule, TokenRule) for rule in objective.shaping):
            return  # which may have dropped them all
        counted = counted & (read.weights != 0)
    count = int(counted.sum())
    if count:
        raise ValueError(
            f"denominator must be positive where there are tokens: 0 would give a loss and a gradient of 0; got 0 with "
            f"{count} tokens"
        )


def _check_importance(read: ReadTokens, validate: bool) -> None:
    """Raises ValueError for a weight below 0 at a token, which would turn its gradient round."""
    if read.importance is None or not reads_values(read.importance, validate):
        return
    wrong = read.importance[read.tokens & (read.importance < 0)]
    if wrong.numel():
        raise ValueError(
            f"importance_weights must be at least 0: ratios, not their logarithms; got {wrong[0].item():g}"
        )


def _positions(layout: TokenLayout, rollout: Tensor) -> Tensor:
    rows = torch.arange(layout.count, device=rollout.device)
    starts = layout.offsets[rollout.long()] if layout.rollouts else rows
    return rows - starts


def calls_functions(objective: Objective) -> bool:
    """Whether a surrogate or a rule's metric is a function of the batch's tokens."""
    rules = [rule for rule in objective.shaping if isinstance(rule, TokenRule)]
    surrogates = [objective.surrogate, *(rule.replacement for rule in rules)]
    return any(isinstance(x, CustomSurrogate) for x in surrogates) or any(callable(rule.metric) for rule in rules)


def leading_weights(objective: Objective) -> int:
    """How many of the shaping rules are PolarityWeights of numbers, before any other."""
    kinds = [isinstance(rule, PolarityWeights) and not rule.scheduled for rule in objective.shaping]
    return kinds.index(False) if False in kinds else len(kinds)


def _leading(objective: Objective) -> tuple[float, float, float]:
    positive = negative = neutral = 1.0
    for rule in objective.shaping[: leading_weights(objective)]:
        assert isinstance(rule, PolarityWeights)
        factors = [value for value in (rule.positive, rule.negative, rule.zero) if not callable(value)]
        positive, negative, neutral = (a * b for a, b in zip((positive, negative, neutral), factors, strict=True))
    return positive, negative, neutral


def check_polarity(polarity: Tensor) -> None:
    """Raises TypeError for bools, whose False would read as neither."""
    if polarity.dtype == torch.bool:
        raise TypeError("polarity takes +1 (correct), -1 (incorrect) and 0; got torch.bool: give 2 * correct.int() - 1")


def reads_old_entropy(objective: Objective) -> bool:
    """Whether a rule selects by the behaviour policy's entropy."""
    rules = (rule for rule in objective.shaping if isinstance(rule, TokenRule))
    return any(rule.metric == "entropy" and rule.source == "old" for rule in rules)


def _check_scalar(name: str, value: object, device: torch.device) -> None:
    """Raises TypeError or ValueError unless value is a number or a 0-d tensor on the device."""
    if isinstance(value, Tensor):
        refuse_dtensor(name, value)
        if value.ndim:
            raise ValueError(f"{name} must be a number or a 0-d tensor; got shape {list(value.shape)}")
        if value.device != device and value.device.type != "cpu":
            raise ValueError(f"{name} must be on {device}; got {value.device}")
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a 0-d tensor; got {type(value).__name__}")


def _max_length(objective: Objective, layout: TokenLayout, max_length: Any, denominator: object) -> float:
    """The length that seq-mean-token-sum-norm divides by."""
    if max_length is not None:
        _check_scalar("max_length", max_length, layout.offsets.device)
        if not isinstance(max_length, numbers.Real) or not 0 < float(max_length) < math.inf:
            raise ValueError(f"max_length must be a positive number; got {max_length}")
        return float(max_length)
    if objective.aggregation != "seq-mean-token-sum-norm" or denominator is not None:
        return 0.0
    if not layout.padded:
        raise ValueError("aggregation 'seq-mean-token-sum-norm' needs max_length or denominator for packed rollouts")
    return float(layout.shape[1])


def _check_scores(layout: TokenLayout, objective: Objective, scores: Any) -> None:
    """Raises unless scores are per-token tensors by name, and hold what the rules ask for."""
    if scores is not None and not isinstance(scores, Mapping):
        raise TypeError(f"scores must be a mapping of names to per-token tensors; got {type(scores).__name__}")
    for name, values in (scores or {}).items():
        layout.check_per_token(f"scores[{name!r}]", values)
    for rule in objective.shaping:
        if isinstance(rule, TokenRule) and not rule.reads_policy and rule.metric not in (scores or {}):
            known = ", ".join(map(repr, scores or {})) or "none"
            raise ValueError(f"a rule's metric is {rule.metric!r}: give scores={{{rule.metric!r}: ...}}; got {known}")


def _check(layout: TokenLayout, objective: Objective, given: TokenArguments, validate: bool) -> float:
    """Everything that can be wrong with the arguments; gives the length of seq-mean-token-sum-norm."""
    device = layout.offsets.device
    for name in ("advantages", "polarity", "importance_weights"):
        values = getattr(given, name)
        if values is None and name != "advantages":
            continue
        layout.check_per_rollout(name, values)
        if name != "polarity":
            check_floating(name, values)
        else:
            check_polarity(values)
    for name in ("old_logprobs", "ref_logprobs", "old_entropy", "min_p_logprobs"):
        if (values := getattr(given, name)) is not None:
            layout.check_per_token(name, values)
    layout.check_mask(given.mask, validate)
    _check_scores(layout, objective, given.scores)
    _check_scalar("step", given.step, device)
    denominator = given.denominator
    if denominator is not None:
        _check_scalar("denominator", denominator, device)
        known = not isinstance(denominator, Tensor) or reads_values(denominator, validate)
        if known and not 0 <= denominator < math.inf:
            raise ValueError(f"denominator must be finite and at least 0; got {denominator}")
    length = _max_length(objective, layout, given.max_length, denominator)
    if objective.kl_coef and given.ref_logprobs is None:
        raise ValueError(f"kl_coef = {objective.kl_coef} needs ref_logprobs; got None")
    on_policy = given.old_logprobs is None
    if objective.low_probability is not None and given.min_p_logprobs is None and not on_policy:
        raise ValueError("Lp-Reg needs min_p_logprobs of the old policy when old_logprobs are given; got None")
    if reads_old_entropy(objective) and given.old_entropy is None and not on_policy:
        raise ValueError("a rule on the old policy's entropy needs old_entropy when old_logprobs are given; got None")
    return length
