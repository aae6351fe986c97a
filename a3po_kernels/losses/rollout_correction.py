"""Rollout correction: weights and a mask where the engine that sampled the tokens and the trainer score them apart."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_floating, check_logprobs, check_tensor, check_word, compute_dtype
from ..core.layout import TokenLayout, token_layout
from ..core.segments import segment_max, segment_sum, whole_sum

LEVELS = ("token", "sequence", "geometric", "max")
MODES = ("truncate", "mask", "icepop")
ESTIMATORS = ("k1", "k2", "k3")
EXPONENT = 20.0  # of every exponential, either way
NO_MEAN = 1e-8  # a mean weight that batch_normalize does not divide by, as in verl


class RolloutCorrection(NamedTuple):
    """What rollout_correction returns.

    weights: per token, detached, spelled as the input, fp64 if a log-prob is and fp32 otherwise; 0 where no token is or
    one is rejected: importance_weights= of the losses. keep: bool per token, False where no token is: the mask= of the
    losses. metrics: 0-d device tensors, see rollout_correction.
    """

    weights: Tensor
    keep: Tensor
    metrics: dict[str, Tensor]


def rollout_correction(
    logprobs_trainer: Tensor,
    logprobs_rollout: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    level: str = "token",
    mode: str = "truncate",
    estimator: str = "k1",
    low: float | None = None,
    high: float | None = 2.0,
    veto: float | None = None,
    batch_normalize: bool = False,
    validate: bool = False,
) -> RolloutCorrection:
    """Importance weights pi_trainer / pi_rollout of sampled tokens, bounded, and which tokens to keep.

        correction = rollout_correction(old, sampled, mask)
        policy_loss(..., old_logprobs=old, mask=correction.keep, importance_weights=correction.weights)

    With x = logprobs_trainer - logprobs_rollout the ratio w is e^x at level "token"; e^(sum of x over the rollout's
    tokens) on each of them at "sequence" (the product, as in TRL, verl and slime); and e^(mean of x) at "geometric"
    (slime's; ms-swift calls it "sequence"; verl has it for rejection alone, "seq_mean_k1"). Exponents are clamped to
    +-20, as in verl and slime's mis.py; TRL and slime's built-in functions do not clamp. verl's rejection clamps each
    token's x before it sums, here the sum is clamped. Bounds are inclusive. The modes:

    - "truncate": the weight is w clamped to [low, high]; keep is every token. TIS (Yao et al., 2025); verl's rollout_is
      with one threshold, TRL's token_truncate and sequence_truncate, slime's tis_mode truncate and clip.
    - "icepop": the weight is w inside [low, high] and 0 outside; keep is every token, so that a denominator counts them
      all. IcePop (arXiv 2510.18855: token, .5, 5); verl's rollout_is with two thresholds; TRL's token_mask, and
      sequence_mask, its default with high 3, which is MIS as TRL counts it.
    - "mask": the weight is w inside, and outside keep is False and the weight 0: the token, or at the other levels the
      rollout, leaves the loss and its denominator (rejection, MIS; slime's tis_mode mask). verl's rollout_rs token_k1,
      seq_sum_k1 and seq_mean_k1 keep the same; they bound pi_rollout / pi_trainer, so theirs are 1 / high and 1 / low.
      Their denominators may be from before the rejection: pass `denominator` to the loss.

    "mask" may decide by another estimator of KL(rollout || trainer) than k1 = -log w. Of each token, its x clamped to
    +-20, as verl does: k2 = x^2 / 2 and k3 = e^x - 1 - x, in nats, both 0 at x = 0 and never below. What is kept has
    an estimate of at most `high`: the token's at level "token", the rollout's sum at "sequence", its mean at
    "geometric", its largest token's at "max" (verl's rollout_rs token_k2, seq_sum_k2, seq_mean_k2, seq_max_k2, and
    the same of k3, with `high` as rollout_rs_threshold; AReaL's rejection_sampling, metric kl_k2 and kl_k3, agg sum,
    mean and max). The weight stays w of the level, at "max" the token's e^x.

    Weights of one call and keep of another combine: verl's token TIS with geometric rejection is two calls, and its
    rollout_rs of several options is the `&` of their keeps.

    Args:
        logprobs_trainer: [B, T], or [N] with cu_seqlens, floating point, nats: the trainer's of the policy that sampled
            (the old policy); no gradient passes. Computed in fp64, whatever the dtype.
        logprobs_rollout: the same shape: the inference engine's.
        mask: bool or 0/1, the same shape; None: every row is a token. What other rows hold never matters.
        cu_seqlens: int32 or int64 [S + 1] of packed rollouts, first 0, last N.
        level: "token", "sequence", "geometric", or, with k2 and k3, "max".
        mode: "truncate", "mask" or "icepop"; "mask" with k2 and k3.
        estimator: "k1", "k2" or "k3".
        low, high: bounds of w, 0 <= low <= high, 0 < high; None: none on that side, but not on both. With k2 and k3
            high > 0 bounds the estimate, in nats, and low is None.
        veto: in (0, 1): a rollout with a token whose e^x is below it is rejected whole, whatever the mode, with weight
            0 and keep False (slime's rs_veto_threshold, 1e-4 there).
        batch_normalize: divide the weights by their mean over the kept tokens, or, where a rollout's tokens share one,
            over the rollouts with a kept token, unless it is below 1e-8 (verl's, which is over all ranks where
            torch.distributed runs; here over this call's tokens, without a collective).
        validate: check values on a GPU too, which waits for it.

    Returns:
        RolloutCorrection(weights, keep, metrics). NaN at a token stays NaN in its weight (at "sequence" and
        "geometric", in its rollout's), in the mean of the weights and in kl, and no bound and no veto rejects it. TRL
        takes a sampled NaN for a ratio of 1: pass torch.where(logprobs_rollout.isnan(), logprobs_trainer,
        logprobs_rollout) for that.

    Metrics; a mean over nothing is 0. A unit is a token at level "token", else a rollout with a token; at "max" the
    ratio's is a token. Weights before batch_normalize, 0 of rejected tokens among them.

    - kept, rollouts_kept, vetoed: share of tokens kept, of rollouts with all tokens kept, of rollouts vetoed. verl's
      rollout_rs_masked_fraction is 1 - kept, rollout_rs_seq_masked_fraction 1 - rollouts_kept.
    - eff_sample_size: (sum w)^2 / (n sum w^2) of the n tokens' weights, in [0, 1]. verl: rollout_is_eff_sample_size.
    - weight_mean, weight_std (biased), weight_max, weight_min: of the tokens' weights. verl: rollout_is_mean,
      rollout_is_std, and at level token rollout_is_max, rollout_is_min. TRL: sampling/importance_sampling_ratio/mean,
      max, min, of which the mean of a sequence mode is weight_rollout_mean, the mean over rollouts with a token.
      verl: rollout_is_seq_mean.
    - ratio_mean, ratio_std, ratio_max, ratio_min: of w before the bounds, over units. verl: at level sequence
      rollout_is_max, rollout_is_min.
    - fraction_high, fraction_low: share of units with w above high, below low; a bound that is None is taken as the
      other's inverse here, as in verl. verl: rollout_is_ratio_fraction_high, rollout_is_ratio_fraction_low. With k2 and
      k3, of the estimate (verl: rollout_rs_<option>_fraction_high), and 0.
    - estimate_mean, estimate_max: of the estimate, -log w with k1, over units. verl: at level token
      rollout_rs_<option>_mean, _max, else rollout_rs_<option>_seq_mean, _seq_max.
    - kl = mean of -x, k3_kl = mean of e^x - 1 - x, chi2_token = mean of e^2x - 1 over tokens, chi2_seq = the same of
      the product over rollouts: estimates of KL(rollout || trainer) and chi2(trainer || rollout) by verl's names.
    - logp_difference_mean, logp_difference_max: of |x|. TRL: sampling/sampling_logp_difference/mean, max.
    - batch_norm_factor: what batch_normalize divided by; 1 without it. verl: rollout_is_batch_norm_factor.

    verl's and TRL's means over rollouts count rows without a token (verl: weight 0, ratio 1; TRL: ratio 1).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range.
    """
    _check_options(level, mode, estimator, low, high, veto, batch_normalize)
    low, high = (None if bound is None else float(bound) for bound in (low, high))
    check_tensor("logprobs_trainer", logprobs_trainer)
    check_floating("logprobs_trainer", logprobs_trainer)
    layout = token_layout("logprobs_trainer", logprobs_trainer, cu_seqlens, validate=validate)
    layout.check_per_token("logprobs_rollout", logprobs_rollout)
    trainer, rollout = layout.flat(logprobs_trainer, torch.float64), layout.flat(logprobs_rollout, torch.float64)
    tokens = layout.flat_mask(mask, validate)
    assert trainer is not None and rollout is not None
    check_logprobs("logprobs_trainer", trainer, tokens, validate)
    check_logprobs("logprobs_rollout", rollout, tokens, validate)
    tokens = torch.ones_like(trainer, dtype=torch.bool) if tokens is None else tokens
    batch = _Batch(layout, tokens)
    x = (trainer - rollout).masked_fill(~tokens, 0.0)
    total = batch.per_rollout(x)
    each_weighed = level in ("token", "max")
    exponent = x if each_weighed else total if level == "sequence" else total / batch.counts.clamp(min=1.0)
    unit_ratio = _exp(exponent)  # of each unit
    ratio = unit_ratio if each_weighed else unit_ratio[batch.rollout]

    floor, ceiling = 0.0 if low is None else low, math.inf if high is None else high
    if estimator == "k1":
        estimate = -exponent.clamp(-EXPONENT, EXPONENT)
        outside = (ratio < floor) | (ratio > ceiling)  # not NaN
        above = unit_ratio > (1.0 / low if high is None and low else ceiling)
        below = unit_ratio < (1.0 / high if low is None and high else floor)
    else:
        estimate = _estimate(batch, x, estimator, level)
        above = estimate > ceiling  # not NaN
        below = torch.zeros_like(above)
        outside = above if level == "token" else above[batch.rollout]
    weights = ratio.clamp(floor, ceiling) if mode == "truncate" else ratio.masked_fill(outside, 0.0)
    vetoed = torch.zeros_like(total, dtype=torch.bool)
    if veto is not None:
        vetoed = (batch.per_rollout((x < math.log(veto)).double()) > 0) & ~total.isnan()
    rejected = vetoed[batch.rollout] | outside if mode == "mask" else vetoed[batch.rollout]
    keep = tokens & ~rejected
    weights = weights.masked_fill(~keep, 0.0)

    metrics = _metrics(batch, x, total, unit_ratio, each_weighed, weights, keep)
    metrics |= _decision(batch, level == "token", estimate, above, below)
    metrics["vetoed"] = batch.rollout_mean(vetoed.double())
    metrics["batch_norm_factor"] = torch.ones_like(metrics["kept"])
    if batch_normalize:
        mean = _mean_weight(batch, weights, keep, each_weighed)
        metrics["batch_norm_factor"] = mean.masked_fill(mean <= NO_MEAN, 1.0)
        weights = weights / metrics["batch_norm_factor"]
    dtype = compute_dtype(torch.promote_types(logprobs_trainer.dtype, logprobs_rollout.dtype))
    return RolloutCorrection(
        weights.to(dtype).reshape(layout.shape), keep.reshape(layout.shape),
        dict(zip(metrics, torch.stack(list(metrics.values())).to(dtype).unbind(), strict=True)),
    )  # fmt: skip


def _check_options(
    level: Any, mode: Any, estimator: Any, low: Any, high: Any, veto: Any, batch_normalize: Any
) -> None:
    for name, value, known in (("level", level, LEVELS), ("mode", mode, MODES), ("estimator", estimator, ESTIMATORS)):
        check_word(name, value, known)
    for name, value in (("low", low), ("high", high), ("veto", veto)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
            raise TypeError(f"{name} must be a number or None; got {type(value).__name__}")
    if estimator == "k1" and level == "max":
        raise ValueError("level 'max' is of the estimators k2 and k3; got estimator 'k1'")
    if estimator != "k1" and mode != "mask":
        raise ValueError(f"estimator {estimator!r} decides what to reject: mode must be 'mask'; got {mode!r}")
    if estimator != "k1" and low is not None:
        raise ValueError(f"low must be None with estimator {estimator!r}, which is never below 0; got {low}")
    if estimator != "k1" and high is None:
        raise ValueError(f"high must be a number with estimator {estimator!r}; got None")
    if high is None and not low:
        raise ValueError(f"low must be above 0 where high is None: no weight would be bounded; got {low}")
    if low is not None and not 0 <= low < math.inf:
        raise ValueError(f"low must be finite and at least 0; got {low}")
    if high is not None and not 0 < high < math.inf:
        raise ValueError(f"high must be positive and finite; got {high}")
    if low is not None and high is not None and low > high:
        raise ValueError(f"low must not be above high; got {low} and {high}")
    if veto is not None and not 0 < veto < 1:
        raise ValueError(f"veto must lie in (0, 1); got {veto}")
    if not isinstance(batch_normalize, bool):
        raise TypeError(f"batch_normalize must be a bool; got {type(batch_normalize).__name__}")


class _Batch:
    """The tokens of a batch and means over them and over the rollouts that have one, in fp64 and a fixed order."""

    def __init__(self, layout: TokenLayout, tokens: Tensor):
        self.offsets, self.tokens = layout.offsets, tokens
        self.rollout = layout.row_rollouts()
        self.counts = self.per_rollout(tokens.double())
        self.present = self.counts > 0
        self._tokens = whole_sum(self.counts).clamp(min=1.0)
        self._rollouts = whole_sum(self.present.double()).clamp(min=1.0)

    def per_rollout(self, values: Tensor) -> Tensor:
        return segment_sum(values, self.offsets)

    def token_mean(self, values: Tensor) -> Tensor:
        return whole_sum(self.per_rollout(values.masked_fill(~self.tokens, 0.0))) / self._tokens

    def rollout_mean(self, values: Tensor) -> Tensor:
        return whole_sum(values.masked_fill(~self.present, 0.0)) / self._rollouts


def _exp(exponent: Tensor) -> Tensor:
    return exponent.clamp(-EXPONENT, EXPONENT).exp()


def _estimate(batch: _Batch, x: Tensor, estimator: str, level: str) -> Tensor:
    """k2 or k3 of each unit: of the tokens, or their rollouts' sum, mean or maximum."""
    near = x.clamp(-EXPONENT, EXPONENT)
    each = 0.5 * near.square() if estimator == "k2" else near.expm1() - near
    if level == "token":
        return each
    if level == "max":
        return segment_max(each, batch.offsets)  # 0 where no token is
    total = batch.per_rollout(each)
    return total if level == "sequence" else total / batch.counts.clamp(min=1.0)


def _largest(values: Tensor, where: Tensor) -> Tensor:
    """The largest of some values, NaN if one is; 0 of none."""
    found = torch.cat([values.masked_fill(~where, -math.inf), values.new_full((1,), -math.inf)]).amax()
    return found.masked_fill(~where.any(), 0.0)


def _mean_weight(batch: _Batch, weights: Tensor, keep: Tensor, tokens: bool) -> Tensor:
    """The mean weight of the kept tokens, or of the rollouts with one, whose tokens share a weight."""
    kept, total = batch.per_rollout(keep.double()), batch.per_rollout(weights)
    if not tokens:
        kept, total = (kept > 0).double(), total / kept.clamp(min=1.0)
    return whole_sum(total) / whole_sum(kept).clamp(min=1.0)


def _metrics(
    batch: _Batch, x: Tensor, total: Tensor, unit_ratio: Tensor, by_token: bool, weights: Tensor, keep: Tensor
) -> dict[str, Tensor]:
    tokens, units = batch.tokens, batch.tokens if by_token else batch.present
    token_mean, rollout_mean = batch.token_mean, batch.rollout_mean
    unit_mean = token_mean if by_token else rollout_mean
    weight_mean, square, ratio_mean = token_mean(weights), token_mean(weights.square()), unit_mean(unit_ratio)
    return {
        "kept": token_mean(keep.double()),
        "rollouts_kept": rollout_mean((batch.per_rollout(keep.double()) == batch.counts).double()),
        "eff_sample_size": (weight_mean.square() / square).masked_fill(square == 0, 0.0),
        "weight_mean": weight_mean,
        "weight_std": token_mean((weights - weight_mean).square()).sqrt(),
        "weight_max": _largest(weights, tokens),
        "weight_min": -_largest(-weights, tokens),
        "weight_rollout_mean": rollout_mean(batch.per_rollout(weights) / batch.counts),
        "ratio_mean": ratio_mean,
        "ratio_std": unit_mean((unit_ratio - ratio_mean).square()).sqrt(),
        "ratio_max": _largest(unit_ratio, units),
        "ratio_min": -_largest(-unit_ratio, units),
        "kl": token_mean(-x),
        "k3_kl": token_mean(x.clamp(-EXPONENT, EXPONENT).expm1() - x),
        "chi2_token": token_mean((2 * x.clamp(-EXPONENT, EXPONENT)).expm1()),
        "chi2_seq": rollout_mean((2 * total.clamp(-EXPONENT, EXPONENT)).expm1()),
        "logp_difference_mean": token_mean(x.abs()),
        "logp_difference_max": _largest(x.abs(), tokens),
    }


def _decision(batch: _Batch, by_token: bool, estimate: Tensor, above: Tensor, below: Tensor) -> dict[str, Tensor]:
    """What the bounds met, of the units that they are of."""
    unit_mean, units = (batch.token_mean, batch.tokens) if by_token else (batch.rollout_mean, batch.present)
    return {
        "fraction_high": unit_mean(above.double()),
        "fraction_low": unit_mean(below.double()),
        "estimate_mean": unit_mean(estimate),
        "estimate_max": _largest(estimate, units),
    }
