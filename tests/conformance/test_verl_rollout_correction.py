"""rollout_correction beside verl 0.9.1's rollout_corr_helper: weights, rejection masks and metrics by verl's names.

Where they differ by design a test states it: k1 bounds the inverse ratio, its clamp is per token, the metric k3_kl has
none, rows without a token count in means over rollouts, NaN where no token is.
"""

from __future__ import annotations

import math

import pytest
import torch

from a3po_kernels import rollout_correction

pytest.importorskip("verl")
from verl.trainer.ppo import rollout_corr_helper as helper

pytestmark = pytest.mark.verl

ROLLOUTS, LENGTH = 12, 10
# Theirs is fp32: a difference of log-probs below 4 carries 2^-22, ten of them 3e-6 into a product; chi2 squares it.
CLOSE = 2e-5
IS_METRICS = {
    "rollout_is_mean": "weight_mean", "rollout_is_std": "weight_std", "rollout_is_eff_sample_size": "eff_sample_size",
    "rollout_is_ratio_fraction_high": "fraction_high", "rollout_is_ratio_fraction_low": "fraction_low",
    "rollout_is_seq_mean": "weight_rollout_mean",
}  # fmt: skip
EXTREMES = {
    "token": {"rollout_is_max": "weight_max", "rollout_is_min": "weight_min"},
    "sequence": {"rollout_is_max": "ratio_max", "rollout_is_min": "ratio_min"},
}
OFF_POLICY = ("kl", "k3_kl", "chi2_token", "chi2_seq")


def batch(seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    old = -4 * torch.rand(ROLLOUTS, LENGTH, generator=generator)
    sampled = old + scale * torch.randn(ROLLOUTS, LENGTH, generator=generator)
    old, sampled = (x - sampled.clamp(min=0.0) for x in (old, sampled))
    lengths = torch.randint(1, LENGTH + 1, (ROLLOUTS,), generator=generator)
    mask = torch.arange(LENGTH) < lengths[:, None]
    mask[0] = torch.arange(LENGTH) % 3 > 0  # a tool's tokens in between
    return old, sampled, mask


def theirs(old, sampled, mask, **options):
    weights, kept, metrics = helper.compute_rollout_correction_and_rejection_mask(old, sampled, mask.float(), **options)
    metrics = {name.removeprefix("rollout_corr/"): value for name, value in metrics.items()}
    return None if weights is None else weights.batch["rollout_is_weights"], kept.bool(), metrics


def same(found, metrics, names):
    for name, our_name in names.items():
        ours, want = found.metrics[our_name].item(), metrics[name]
        assert ours == pytest.approx(want, rel=10 * CLOSE, abs=CLOSE), name


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("low, high", [(None, 1.2), (None, 2.0), (0.5, 1.3), (0.9, 1.1)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_and_metrics(level, low, high, normalize):
    """A threshold is TIS, two are IcePop, each with its metrics."""
    for seed in range(3):
        old, sampled, mask = batch(seed)
        threshold = high if low is None else f"{low}_{high}"
        weights, kept, metrics = theirs(
            old, sampled, mask, rollout_is=level, rollout_is_threshold=threshold, rollout_is_batch_normalize=normalize
        )
        mode = "truncate" if low is None else "icepop"
        found = rollout_correction(
            old, sampled, mask, level=level, mode=mode, low=low, high=high, batch_normalize=normalize
        )
        assert torch.allclose(found.weights, weights, rtol=CLOSE, atol=0)
        assert torch.equal(found.keep, kept) and torch.equal(kept, mask)
        same(found, metrics, IS_METRICS | EXTREMES[level] | {name: name for name in OFF_POLICY})
        if normalize:
            same(found, metrics, {"rollout_is_batch_norm_factor": "batch_norm_factor"})
        else:
            assert "rollout_is_batch_norm_factor" not in metrics and found.metrics["batch_norm_factor"] == 1.0
        if level == "token" and low is not None:
            outside = found.metrics["fraction_high"] + found.metrics["fraction_low"]
            assert outside.item() == pytest.approx(metrics["rollout_is_oob_ratio"], rel=CLOSE)
        assert found.metrics["fraction_high"] > 0 or high == 2.0


@pytest.mark.parametrize("low, high", [(0.9, 1.2), (0.8, 1.05), (0.5, 2.0)])
@pytest.mark.parametrize(
    "option, level", [("token_k1", "token"), ("seq_sum_k1", "sequence"), ("seq_mean_k1", "geometric")]
)
def test_rejection(option, level, low, high):
    """k1 bounds pi_rollout / pi_trainer: verl's lower and upper are 1 / high and 1 / low."""
    rejected = 0
    for seed in range(3):
        old, sampled, mask = batch(seed)
        _, kept, metrics = theirs(
            old, sampled, mask, rollout_rs=option, rollout_rs_threshold=f"{1 / high!r}_{1 / low!r}"
        )
        found = rollout_correction(old, sampled, mask, level=level, mode="mask", low=low, high=high)
        assert torch.equal(found.keep, kept)
        shares = {"rollout_rs_masked_fraction": "kept", "rollout_rs_seq_masked_fraction": "rollouts_kept"}
        for name, ours in shares.items():
            assert 1 - found.metrics[ours].item() == pytest.approx(metrics[name], abs=CLOSE), name
        rejected += int((mask & ~kept).sum())
    assert rejected or (low, high, level) == (0.5, 2.0, "geometric")


# verl's options and ours, with a bound that some of the batch's tokens or rollouts pass and others do not.
OPTIONS = {
    f"{theirs}_{estimator}": (level, estimator, bounds)
    for theirs, level, bounds in (
        ("token", "token", (0.01, 0.1)), ("seq_sum", "sequence", (0.1, 0.4)), ("seq_mean", "geometric", (0.03, 0.06)),
        ("seq_max", "max", (0.05, 0.3)),
    )
    for estimator in ("k2", "k3")
}  # fmt: skip
K1 = {"token_k1": "token", "seq_sum_k1": "sequence", "seq_mean_k1": "geometric"}


def test_every_option_of_verl_is_here():
    assert set(OPTIONS) | set(K1) == helper.SUPPORTED_ROLLOUT_RS_OPTIONS


def names_of(option, level):
    """Of what the bound meets, by verl's names."""
    unit = "" if level == "token" else "_seq"
    return {
        f"rollout_rs_{option}{unit}_mean": "estimate_mean", f"rollout_rs_{option}{unit}_max": "estimate_max",
        f"rollout_rs_{option}_fraction_high": "fraction_high", f"rollout_rs_{option}_fraction_low": "fraction_low",
    }  # fmt: skip


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("option", OPTIONS)
def test_rejection_by_k2_and_k3(option, which):
    """The same tokens, the same metrics, weights w of what is kept."""
    level, estimator, bounds = OPTIONS[option]
    rejected = kept_tokens = 0
    for seed in range(3):
        old, sampled, mask = batch(seed)
        _, kept, metrics = theirs(old, sampled, mask, rollout_rs=option, rollout_rs_threshold=bounds[which])
        options = {"level": level, "mode": "mask", "estimator": estimator, "high": bounds[which]}
        found = rollout_correction(old, sampled, mask, **options)
        assert torch.equal(found.keep, kept)
        same(found, metrics, names_of(option, level))
        for name, ours in (
            ("rollout_rs_masked_fraction", "kept"), ("rollout_rs_seq_masked_fraction", "rollouts_kept"),
        ):  # fmt: skip
            assert 1 - found.metrics[ours].item() == pytest.approx(metrics[name], abs=CLOSE), name
        if level in ("token", "sequence"):
            weights, _, _ = theirs(old, sampled, mask, rollout_is=level, rollout_is_threshold=1e9)
            assert torch.allclose(found.weights, weights * kept, rtol=CLOSE, atol=0)
        rejected += int((mask & ~kept).sum())
        kept_tokens += int(kept.sum())
    assert rejected and kept_tokens


@pytest.mark.parametrize("option", K1)
def test_the_estimate_of_k1(option):
    old, sampled, mask = batch(1)
    _, _, metrics = theirs(old, sampled, mask, rollout_rs=option, rollout_rs_threshold="0.8_1.1")
    found = rollout_correction(old, sampled, mask, level=K1[option], mode="mask", low=1 / 1.1, high=1 / 0.8)
    names = names_of(option, K1[option])
    # verl's are of the inverse ratio: its high is our low.
    high, low = (name for name in names if "fraction" in name)
    same(found, metrics, {**names, high: "fraction_low", low: "fraction_high"})
    assert found.metrics["fraction_low"] > 0 or found.metrics["fraction_high"] > 0


@pytest.mark.parametrize("option", OPTIONS)
def test_k2_and_k3_beyond_the_clamp(option):
    """Both clamp a token's log-ratio before they sum: k2 is 200 at most, k3 e^20 - 21 and e^-20 + 19."""
    level, estimator, _ = OPTIONS[option]
    old, sampled, mask = batch(4, scale=0.0)
    mask[:3] = True
    for row, gap in ((0, 30.0), (1, -30.0), (2, 25.0)):
        old[row, 1], sampled[row, 1] = old[row, 1] - max(-gap, 0.0), old[row, 1] - max(gap, 0.0)
    old[2, 4] = -math.inf
    for high in (1.0, 15.0, 19.5, 30.0, 150.0, 300.0, 1e7, 6e7, 1e9):
        _, kept, metrics = theirs(old, sampled, mask, rollout_rs=option, rollout_rs_threshold=high)
        found = rollout_correction(old, sampled, mask, level=level, mode="mask", estimator=estimator, high=high)
        assert torch.equal(found.keep, kept), high
        name = next(name for name, ours in names_of(option, level).items() if ours == "estimate_max")
        assert found.metrics["estimate_max"].item() == pytest.approx(metrics[name], rel=CLOSE)


def test_several_options_are_several_calls():
    old, sampled, mask = batch(2)
    _, kept, _ = theirs(
        old, sampled, mask, rollout_rs="token_k3,seq_max_k2,seq_mean_k1", rollout_rs_threshold="0.05,0.3,0.9_1.1"
    )
    keep = mask
    for options in (
        {"estimator": "k3", "high": 0.05}, {"level": "max", "estimator": "k2", "high": 0.3},
        {"level": "geometric", "low": 1 / 1.1, "high": 1 / 0.9},
    ):  # fmt: skip
        one = rollout_correction(old, sampled, mask, mode="mask", **options).keep
        assert not torch.equal(one, kept)
        keep = keep & one
    assert torch.equal(keep, kept) and keep.any()


def test_bounds_of_k1_are_of_the_inverse():
    """The same two numbers reject other tokens in verl: of ratios 1.15 and 1 / 1.15 it keeps the second."""
    sampled = torch.full((1, 2), -2.0)
    old, mask = sampled + torch.tensor([[1.15, 1 / 1.15]]).log(), torch.ones(1, 2, dtype=torch.bool)
    _, kept, _ = theirs(old, sampled, mask, rollout_rs="token_k1", rollout_rs_threshold="0.9_1.2")
    assert kept.tolist() == [[False, True]]
    assert rollout_correction(old, sampled, mask, mode="mask", low=0.9, high=1.2).keep.tolist() == [[True, False]]


def test_weights_of_one_and_keep_of_another():
    """verl's token TIS with geometric rejection, in two calls."""
    old, sampled, mask = batch(3)
    weights, kept, _ = theirs(
        old, sampled, mask, rollout_is="token", rollout_is_threshold=1.5, rollout_rs="seq_mean_k1",
        rollout_rs_threshold=f"{1 / 1.05}_{1 / 0.95}",
    )  # fmt: skip
    found = rollout_correction(old, sampled, mask, high=1.5)
    keep = rollout_correction(old, sampled, mask, level="geometric", mode="mask", low=0.95, high=1.05).keep
    assert torch.allclose(found.weights, weights, rtol=CLOSE, atol=0) and torch.equal(keep, kept)
    assert 0 < int(kept.sum()) < int(mask.sum())


def test_beyond_the_clamp():
    """The weights clamp alike; verl's rejection clamps each token's log-ratio before it sums, ours the sum."""
    old, sampled, mask = batch(4, scale=0.0)
    mask[0] = True
    sampled[0, 1], old[0, 2] = old[0, 1] - 30.0, old[0, 2] - 30.0
    sampled[1, 0] = old[1, 0] - 30.0
    for level in ("token", "sequence"):
        weights, _, metrics = theirs(old, sampled, mask, rollout_is=level, rollout_is_threshold=1e9)
        found = rollout_correction(old, sampled, mask, level=level, high=1e9)
        assert torch.allclose(found.weights, weights, rtol=CLOSE, atol=0)
        assert found.weights.max().item() == pytest.approx(math.exp(20), rel=1e-6)
        same(found, metrics, {"chi2_token": "chi2_token", "chi2_seq": "chi2_seq"})
    # k3's exponent is not clamped there.
    assert metrics["k3_kl"] > 1e3 * found.metrics["k3_kl"]
    # Log-ratios 20, -30, 15: their sum is 5; with -30 clamped to -20 it is 15.
    sampled[0, 1], sampled[0, 3] = old[0, 1] - 20.0, old[0, 3] - 15.0
    _, kept, _ = theirs(old, sampled, mask, rollout_rs="seq_sum_k1", rollout_rs_threshold=f"{math.exp(-10)}_2.0")
    ours = rollout_correction(old, sampled, mask, level="sequence", mode="mask", low=0.5, high=math.exp(10))
    assert ours.keep[0].all() and not kept[0].any()


def test_rows_without_a_token():
    """In verl's means over rollouts a row without a token is a weight of 0 and a ratio of 1; in ours it is none."""
    old, sampled, mask = batch(5)
    mask[2:4] = False
    _, _, metrics = theirs(old, sampled, mask, rollout_is="sequence", rollout_is_threshold=1.5)
    found = rollout_correction(old, sampled, mask, level="sequence", high=1.5)
    share = (ROLLOUTS - 2) / ROLLOUTS
    same(found, metrics, {name: name for name in ("kl", "k3_kl", "chi2_token")} | {"rollout_is_mean": "weight_mean"})
    for name, ours in (
        ("rollout_is_seq_mean", "weight_rollout_mean"), ("chi2_seq", "chi2_seq"),
        ("rollout_is_ratio_fraction_high", "fraction_high"),
    ):  # fmt: skip
        assert share * found.metrics[ours].item() == pytest.approx(metrics[name], rel=CLOSE), name


def test_nan():
    """NaN at a token is NaN in both; verl gives NaN to every padded row that holds one, too."""
    old, sampled, mask = batch(6)
    mask[0], mask[1, -1] = True, False
    sampled[0, 1] = sampled[1, -1] = math.nan
    weights, _, _ = theirs(old, sampled, mask, rollout_is="token", rollout_is_threshold=2.0)
    found = rollout_correction(old, sampled, mask)
    assert weights[0, 1].isnan() and found.weights[0, 1].isnan()
    assert weights[1, -1].isnan() and found.weights[1, -1] == 0
