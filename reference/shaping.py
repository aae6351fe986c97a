"""Shaping weights, the tokens that rules select, and what a rule's metric may read (SPEC section 3)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .objectives import Objective, PolarityWeights, TokenRule
from .selection import pick, quota, scopes_of


class Shaping(NamedTuple):
    weights: dict[int, float]  # of every token, by its row
    selected: set[int]  # by any rule
    replacements: dict[int, object]  # the surrogate of the rows whose rule has one


def shape_tokens(objective: Objective, batch: Batch, logprobs: Tensor, entropy: Tensor, step) -> Shaping:
    """The product of the shaping factors of every token, in the order listed, and the tokens that a rule selected.

    A token whose product is exactly 0 is dropped: it has no surrogate, KL or entropy term and later rules pass it over.
    """
    weights = {row: 1.0 for row in batch.rows}
    selected: set[int] = set()
    replacements: dict[int, object] = {}
    for part in objective.shaping:
        if isinstance(part, PolarityWeights):  # PSR, NSR, W-REINFORCE, arXiv 2506.01347
            factor = {sign: scale_at(x, step) for sign, x in ((1, part.positive), (-1, part.negative), (0, part.zero))}
            for row in weights:
                weights[row] *= factor[batch.polarity[row]]
            continue
        eligible = [
            [row for row in rows if part.polarity in (None, batch.polarity[row]) and weights[row] != 0]
            for rows in batch.tokens
        ]
        if callable(part.metric):
            seen = TokenValues(part.source, batch, weights, selected, logprobs, entropy, step)
            values = part.metric(seen).detach().tolist()
        else:
            values = rule_metric(part, batch, logprobs, entropy).tolist()
        for rows in scopes_of(eligible, part.scope):
            chosen = set(choose(part, values, rows))
            for row in rows:
                weights[row] *= scale_at(part.selected_scale if row in chosen else part.rest_scale, step)
                if row in chosen and part.replacement is not None:
                    replacements[row] = part.replacement
            selected |= chosen
    return Shaping(weights, selected, replacements)


def choose(rule: TokenRule, values: list[float], rows: list[int]) -> list[int]:
    """The rows of one scope that a rule selects: its quota or its quantile, then its threshold."""
    if not rows:
        return []
    if rule.quantile is None:
        chosen = pick(values, rows, quota(len(rows), rule.ratio, rule.rounding), rule.side)
    else:
        rank = {row: math.inf if math.isnan(values[row]) else values[row] for row in rows}  # NaN is the largest value
        bound = quantile(list(rank.values()), rule.quantile)
        chosen = [row for row in rows if (rank[row] >= bound if rule.side == "high" else rank[row] <= bound)]
    if rule.threshold is None:
        return chosen
    if rule.metric == "probability":  # sorted by its logarithm, but the threshold is a probability
        values = torch.tensor(values, dtype=torch.float64).exp().tolist()
    above = rule.side == "high"
    return [row for row in chosen if (values[row] > rule.threshold if above else values[row] < rule.threshold)]


def quantile(values: list[float], share: float) -> float:
    """torch.quantile's linear interpolation; between an infinite value and another the infinite one, -inf first."""
    place = (len(values) - 1) * share
    low, high = (sorted(values)[round_to(place)] for round_to in (math.floor, math.ceil))
    if low == high or low == -math.inf:
        return low
    if high == math.inf:
        return high
    return low + (place - math.floor(place)) * (high - low)


def rule_metric(rule: TokenRule, batch: Batch, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """What a rule sorts tokens by; a log-probability sorts as its probability does. On-policy, current is old."""
    on_policy = batch.old_logprobs is None
    if rule.metric == "probability":
        return logprobs.detach() if rule.source == "current" or on_policy else batch.old_logprobs
    if rule.metric != "entropy":
        if rule.metric not in batch.scores:
            raise ValueError(f"a rule's metric is {rule.metric!r}, of which scores has only {sorted(batch.scores)}")
        return batch.scores[rule.metric]
    if rule.source == "current":
        return entropy.detach()
    if batch.old_entropy is not None:
        return batch.old_entropy
    if on_policy:
        return entropy.detach()
    raise ValueError("a rule on the old policy's entropy needs old_entropy when old_logprobs is given")


def scale_at(scale, step) -> float:
    return float(scale(step) if callable(scale) else scale)


class TokenValues:
    """What a metric that is a function reads: [N] over all rows, 0 where a row is no token, without gradients.

    Weights and advantages (the weights in them) are those of the shaping steps before the rule.
    """

    def __init__(self, source, batch: Batch, weights: dict[int, float], selected: set[int], logprobs, entropy, step):
        self._source, self._batch, self._logprobs, self._entropy = source, batch, logprobs.detach(), entropy.detach()
        self.step = step
        self.mask = torch.zeros(len(batch.rollout), dtype=torch.bool)
        self.mask[batch.rows] = True
        self.rollout = torch.tensor(batch.rollout, dtype=torch.long)
        self.position = torch.tensor(batch.position, dtype=torch.long)
        self.weights = torch.zeros_like(self._logprobs)
        self.selected = torch.zeros_like(self.mask)
        for row, weight in weights.items():
            self.weights[row] = weight
            self.selected[row] = row in selected
        self.advantages = self._of_tokens(batch.advantages) * self.weights
        self.polarity = self._of_tokens(torch.tensor(batch.polarity).to(self._logprobs.dtype))
        self.scores = {name: self._of_tokens(values) for name, values in batch.scores.items()}

    def _of_tokens(self, values: Tensor) -> Tensor:
        return torch.where(self.mask, values, torch.zeros_like(values))

    def _current(self, name: str, values: Tensor) -> Tensor:
        if self._source != "current":
            raise ValueError(f"a metric that reads {name} of the current policy needs source 'current'")
        return self._of_tokens(values)

    @property
    def logprobs(self) -> Tensor:
        return self._current("logprobs", self._logprobs)

    @property
    def entropy(self) -> Tensor:
        return self._current("entropy", self._entropy)

    @property
    def old_logprobs(self) -> Tensor:
        return self._of_tokens(self._logprobs if self._batch.old_logprobs is None else self._batch.old_logprobs)

    @property
    def ref_logprobs(self) -> Tensor:
        if self._batch.ref_logprobs is None:
            raise ValueError("a metric reads ref_logprobs, which was not given")
        return self._of_tokens(self._batch.ref_logprobs)

    @property
    def log_ratio(self) -> Tensor:
        return self.logprobs - self.old_logprobs

    @property
    def ratio(self) -> Tensor:
        return self.log_ratio.clamp(-20.0, 20.0).exp()

    def rollout_sum(self, values: Tensor) -> Tensor:
        """[N]: at each row the sum over its rollout's tokens."""
        sums = torch.zeros_like(values)
        for row, s in enumerate(self._batch.rollout):
            sums[row] = values[self._batch.tokens[s]].sum()
        return sums

    def rollout_mean(self, values: Tensor) -> Tensor:
        counts = torch.tensor([max(1, len(self._batch.tokens[s])) for s in self._batch.rollout])
        return self.rollout_sum(values) / counts

    def batch_sum(self, values: Tensor) -> Tensor:
        """[N]: at each row the sum over all tokens of the batch."""
        return values[self._batch.rows].sum().expand(len(values))

    def batch_mean(self, values: Tensor) -> Tensor:
        return self.batch_sum(values) / max(1, len(self._batch.rows))
