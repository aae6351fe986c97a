"""Group-relative advantages of outcome rewards, by the estimators that trainers name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_floating, check_tensor
from ..core.operators import reads_values
from ..core.segments import segment_sum, whole_sum

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
TAKES_LENGTHS = ("opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
EPSILON = 1e-6
# A mean this small beside the mean absolute value is the rounding of values that were centred before.
ROUNDING = 1e-12


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor | None,
    normalize: str | None = None,
    *,
    estimator: str = "grpo",
    lengths: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """Advantages of rollouts from their rewards R, by group, with mean mu and unbiased std sigma.

    - "grpo" (DeepSeekMath): (R - mu) / (sigma + 1e-6). TRL has 1e-4, verl 1e-6.
    - "dr_grpo" (arXiv 2503.20783), the same as "grpo" with normalize="none": R - mu.
    - "rloo" (2402.14740): R - mean of the group's others. No std; TRL's normalize_advantages is left to the caller.
    - "opo" (2505.23585): R - sum(length R) / sum(length) over the group.
    - "reinforce_plus_plus" (2501.03262), of an outcome reward, undiscounted: (R - m) / (s + 1e-6) over the batch, no
      groups. "reinforce_plus_plus_baseline": the same of R - mu. m and s (unbiased) are over rollouts, each once; with
      lengths over tokens, each rollout as often as it has tokens, as verl's masked_whiten and slime do. verl divides by
      sqrt(s^2 + 1e-8). A batch of one value has advantage 0; verl raises.

    A group of one keeps its reward, A = R (mu = 0, sigma = 1), with every estimator that has groups. So in verl, whose
    "grpo" divides by 1 + 1e-6, but for its "rloo_vectorized", which gives 0, as TRL does. Equal rewards of a group give
    exactly 0 where nothing is whitened. Statistics are of this call's rollouts: no collective.

    Args:
        rewards: [S], floating point. Computed in fp64.
        group_ids: [S], integers in any order; rollouts of one prompt share an id. "reinforce_plus_plus" reads none and
            takes None.
        normalize: of "grpo" alone: "std" (None is this), or "none" for R - mu.
        estimator: one of the names above.
        lengths: [S], tokens of each rollout: of "opo", which needs them, and of "reinforce_plus_plus" and its baseline.
        validate: check values on a GPU too, which waits for it.

    Returns:
        [S] advantages in the dtype of rewards, without a gradient.

    Raises:
        ValueError, TypeError: mismatched shapes, dtypes, an unknown name, an argument that the estimator does not take;
            rewards that are NaN or infinite and lengths that are negative or not finite, on the CPU or with validate.
            On a GPU without it these are NaN in their group, or in the batch where the statistics are of the batch.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}; got {estimator!r}")
    if normalize not in (None, "std", "none"):
        raise ValueError(f"normalize must be 'std' or 'none'; got {normalize!r}")
    if estimator != "grpo" and normalize is not None:
        raise ValueError(f"normalize is of estimator 'grpo'; got {normalize!r} with {estimator!r}")
    if lengths is not None and estimator not in TAKES_LENGTHS:
        raise ValueError(f"lengths are of the estimators {', '.join(TAKES_LENGTHS)}; got some with {estimator!r}")
    if estimator == "opo" and lengths is None:
        raise ValueError("lengths must be given with estimator 'opo'; got None")
    _check_rewards(rewards, 1, "[S]")
    if group_ids is not None or estimator != "reinforce_plus_plus":
        _check_ids(rewards, group_ids)
    values = _finite("rewards", rewards, validate)
    counts = _lengths(rewards, lengths, validate)
    if not len(rewards):
        return rewards.detach().clone()
    if estimator == "reinforce_plus_plus":
        return _whiten(values, counts).to(rewards.dtype)
    assert group_ids is not None
    groups = _Groups(group_ids)
    if estimator == "rloo":
        found = groups.without_own(values)
    elif estimator == "opo":
        assert counts is not None
        found = groups.centre(values, counts)
    else:
        found = groups.centre(values)
        if estimator == "grpo" and normalize != "none":
            found = groups.scale(found)
        elif estimator == "reinforce_plus_plus_baseline":
            found = _whiten(found, counts)
    return found.to(rewards.dtype)


def multi_reward_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    weights: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """GDPO (arXiv 2601.05242): each reward normalised in its group, then their weighted sum whitened over the batch.

    A_k = (R_k - mu_k) / (sigma_k + 1e-6) as group_advantages does, S = sum of w_k A_k, and A = (S - m) / (s + 1e-6). m
    and s (unbiased) are over rollouts, as in the paper and TRL's normalize_then_sum (1e-4 for both 1e-6); with lengths
    over tokens, as in verl (sqrt(s^2 + 1e-8) for s + 1e-6). A group of one has A_k = R_k; TRL gives 0. To sum
    first and normalise then: group_advantages(rewards @ weights, group_ids).

    Args:
        rewards: [S, K], floating point.
        group_ids: [S], integers in any order.
        weights: [K], floating point; None: all 1.
        lengths: [S], tokens of each rollout; None: each rollout counts once.
        validate: check values on a GPU too, which waits for it.

    Returns:
        [S] advantages in the dtype of rewards, without a gradient.

    Raises:
        ValueError, TypeError: mismatched shapes or dtypes; rewards or weights that are NaN or infinite and lengths that
            are negative or not finite, on the CPU or with validate. On a GPU without it the advantages are NaN.
    """
    _check_rewards(rewards, 2, "[S, K]")
    if not rewards.shape[1]:
        raise ValueError(f"rewards must have shape [S, K] with K >= 1; got {list(rewards.shape)}")
    _check_ids(rewards, group_ids)
    values = _finite("rewards", rewards, validate)
    counts = _lengths(rewards, lengths, validate)
    if weights is None:
        factors = torch.ones_like(values[:1])
    else:
        check_tensor("weights", weights, tuple(rewards.shape[1:]), device=rewards.device)
        check_floating("weights", weights)
        factors = _finite("weights", weights, validate)[None]
    if not len(rewards):
        return rewards.detach().new_empty(0)
    groups = _Groups(group_ids)
    shaped = torch.stack([groups.scale(groups.centre(column)) for column in values.unbind(1)], 1)
    return _whiten((shaped * factors).sum(1), counts).to(rewards.dtype)


class _Groups:
    """The rollouts of a batch sorted by group, each group a segment: no host sync, no float atomics. All in fp64."""

    def __init__(self, ids: Tensor):
        self.order = torch.sort(ids, stable=True).indices
        ids = ids[self.order]
        new = torch.cat([torch.zeros_like(ids[:1]), (ids[1:] != ids[:-1]).to(ids.dtype)])
        self.group = new.long().cumsum(0)
        sizes = torch.zeros_like(self.group).scatter_add_(0, self.group, torch.ones_like(self.group))
        self.offsets = torch.cat([torch.zeros_like(sizes[:1]), sizes.cumsum(0)])
        self.size = self._spread(sizes.double())

    def _spread(self, per_group: Tensor) -> Tensor:
        """[S], in the caller's order, of a value per group."""
        sorted_values = per_group[self.group]
        return torch.empty_like(sorted_values).scatter_(0, self.order, sorted_values)

    def sum(self, values: Tensor) -> Tensor:
        return self._spread(segment_sum(values[self.order], self.offsets))

    def lowest(self, values: Tensor) -> Tensor:
        offsets = self.offsets
        return self._spread(
            torch.segment_reduce(values[self.order], "min", offsets=offsets, unsafe=True, initial=None)
        )

    def centre(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """values less their group's (weighted) mean; of a group of one, or without any weight, as they are."""
        # Relative to the group's minimum, so that equal rewards give exactly zero.
        raised = values - self.lowest(values)
        if weights is None:
            mean, alone = self.sum(raised) / self.size, self.size <= 1
        else:
            total = self.sum(weights)
            mean, alone = self.sum(weights * raised) / total, (self.size <= 1) | (total == 0)
        return torch.where(alone, values, raised - mean)

    def without_own(self, values: Tensor) -> Tensor:
        """values less the mean of their group's others; of a group of one as they are."""
        raised = values - self.lowest(values)
        others = (self.sum(raised) - raised) / (self.size - 1).clamp(min=1.0)
        return torch.where(self.size > 1, raised - others, values)

    def scale(self, centred: Tensor) -> Tensor:
        """Centred values over their group's unbiased std; of a group of one as they are."""
        spread = self.sum(centred.square()) / (self.size - 1).clamp(min=1.0)
        return torch.where(self.size > 1, centred / (spread.sqrt() + EPSILON), centred)


def _whiten(values: Tensor, counts: Tensor | None) -> Tensor:
    """(values - mean) / (unbiased std + 1e-6) of [S] values, S > 0, each taken counts times."""
    counts = torch.ones_like(values) if counts is None else counts
    number = whole_sum(counts)
    # From the lowest, so that equal values give exactly zero; a mean that is rounding alone leaves zeros zero.
    lowest = values.amin()
    mean = lowest + whole_sum(counts * (values - lowest)) / number.clamp(min=1.0)
    size = whole_sum(counts * values.abs()) / number.clamp(min=1.0)
    centred = values - mean.masked_fill(mean.abs() <= ROUNDING * size, 0.0)
    spread = whole_sum(counts * centred.square()) / (number - 1).clamp(min=1.0)
    return centred / (spread.sqrt() + EPSILON)


def _check_rewards(rewards: Any, ndim: int, takes: str) -> None:
    if not isinstance(rewards, Tensor) or not rewards.dtype.is_floating_point:
        raise TypeError(f"rewards must be a floating-point tensor; got {getattr(rewards, 'dtype', type(rewards))}")
    if rewards.ndim != ndim:
        raise ValueError(f"rewards must have shape {takes}; got {list(rewards.shape)}")


def _check_ids(rewards: Tensor, group_ids: Any) -> None:
    if not isinstance(group_ids, Tensor) or group_ids.dtype.is_floating_point:
        raise TypeError(f"group_ids must be an integer tensor; got {getattr(group_ids, 'dtype', type(group_ids))}")
    if group_ids.shape != rewards.shape[:1]:
        raise ValueError(
            f"rewards and group_ids must share a shape [S]; got {list(rewards.shape)} and {list(group_ids.shape)}"
        )
    if group_ids.device != rewards.device:
        raise ValueError(f"group_ids must be on {rewards.device}; got {group_ids.device}")


def _finite(name: str, given: Tensor, validate: bool) -> Tensor:
    """In fp64, NaN where not finite; ValueError where values may be read."""
    values = given.detach().double()
    if reads_values(given, validate) and not bool(values.isfinite().all()):
        at = (~values.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite; got {values[tuple(at)].item()} at {at}")
    return values.masked_fill(~values.isfinite(), torch.nan)


def _lengths(rewards: Tensor, lengths: Any, validate: bool) -> Tensor | None:
    """In fp64, NaN where not a length; ValueError where values may be read."""
    if lengths is None:
        return None
    check_tensor("lengths", lengths, tuple(rewards.shape[:1]), device=rewards.device)
    if lengths.dtype == torch.bool:
        raise TypeError("lengths must be a tensor of numbers; got torch.bool")
    counts = _finite("lengths", lengths, validate)
    if reads_values(lengths, validate) and bool((counts < 0).any()):
        raise ValueError(f"lengths must be at least 0; got {counts.min().item()}")
    return counts.masked_fill(counts < 0, torch.nan)
