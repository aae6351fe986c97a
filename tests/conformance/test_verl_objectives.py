"""verl's dppo_tv, dppo_kl, gspo, geo_mean, kl_cov, clip_cov and dro, as published, on the same tensors.

Where verl differs by design a test states the difference: the weights in geo_mean and in dro, what clip_cov draws.
"""

from __future__ import annotations

import pytest
import torch

import a3po_kernels as ak

pytest.importorskip("verl")
from test_verl import GRADIENT, LENGTH, LOSS, MODES, ROLLOUTS, assert_same, batch, config, our_loss, scale_of, verl_loss
from verl.workers.config.actor import PolicyLossConfig

pytestmark = pytest.mark.verl


def per_token(data, seed=21):
    data.advantages = torch.randn(ROLLOUTS, LENGTH, generator=torch.Generator().manual_seed(seed))
    return data


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("divergence, low, high", [("tv", 0.004, 0.006), ("kl", 0.002, 0.001)])
def test_dppo(divergence, low, high, mode, corrected):
    """verl's clip_ratio_c is the cap of the ratio. Its pg_clipfrac counts what is cut, ours by the advantage's sign."""
    data = batch(20)
    actor = config(clip_ratio=low, clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=1.2)
    theirs = verl_loss(data, f"dppo_{divergence}", mode, actor, data.weights if corrected else None)
    objective = ak.dppo(divergence, low, high, ratio_cap=1.2, aggregation=mode)
    keywords = {"importance_weights": data.weights} if corrected else {}
    ours = our_loss(data, objective, **keywords)
    # REINFORCE's loss of a token is up to 10 times its advantage: log-probs, not ratios.
    assert_same(theirs, ours, 5 * scale_of(mode, data))
    metrics = ours[0].metrics
    cut = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    assert 0 < theirs[2]["actor/pg_clipfrac"] == pytest.approx(cut.item(), abs=1e-6)
    assert 0 < theirs[2]["actor/pg_clipfrac_lower"] == pytest.approx(metrics["dual_clip_fraction"].item(), abs=1e-6)


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("bound", [0.03, 0.5])
def test_gspo_is_gspo_token(bound, mode):
    """With advantages and weights per token too, where GSPO's own gradient is another (test_verl.py)."""
    data = per_token(batch(2))
    actor = config(clip_ratio=bound, clip_ratio_low=bound, clip_ratio_high=bound)
    objective = ak.gspo_token(epsilon_low=bound, epsilon_high=bound, aggregation=mode)
    theirs = verl_loss(data, "gspo", mode, actor, data.weights)
    assert_same(theirs, our_loss(data, objective, importance_weights=data.weights), scale_of(mode, data))
    other = our_loss(data, ak.gspo(epsilon_low=bound, epsilon_high=bound, aggregation=mode))
    assert (other[1] - theirs[1]).abs().max() > 100 * GRADIENT


@pytest.mark.parametrize("low, high", [(0.21, 0.21), (0.4, 0.4), (0.1, 0.3)])
def test_geo_mean(low, high):
    """verl averages over the micro-batch's rows whatever the mode, an empty one counted: our denominator."""
    data = batch(22)
    actor = config(clip_ratio=low, clip_ratio_low=low, clip_ratio_high=high)
    for weights in (None, torch.tensor([0.7, 1.3, 1.0, 0.9]).unsqueeze(-1).expand(ROLLOUTS, LENGTH)):
        theirs = verl_loss(data, "geo_mean", "token-mean", actor, weights)
        keywords = {} if weights is None else {"importance_weights": weights}
        ours = our_loss(data, ak.gmpo(low, high), denominator=ROLLOUTS, **keywords)
        assert_same(theirs, ours)
    # verl counts a log ratio beyond either bound, of which the formula cuts one.
    metrics = ours[0].metrics
    assert theirs[2]["actor/pg_clipfrac"] >= metrics["clip_fraction_high"].item() - 1e-6 > 0
    assert theirs[2]["actor/pg_clipfrac_lower"] >= metrics["clip_fraction_low"].item() - 1e-6 > 0


def test_geo_mean_with_weights_per_token():
    """verl multiplies a rollout's loss by the weights' geometric mean, ours by their mean."""
    data = batch(22)
    actor = config(clip_ratio=0.3, clip_ratio_low=0.3, clip_ratio_high=0.3)  # the batch has log ratios of -.2
    theirs = verl_loss(data, "geo_mean", "token-mean", actor, data.weights)
    objective = ak.gmpo(0.3, 0.3)
    ours = our_loss(data, objective, denominator=ROLLOUTS, importance_weights=data.weights)
    assert (theirs[0] - ours[0].loss).abs() > 10 * LOSS
    counts = data.mask.sum(-1, keepdim=True).clamp(min=1)
    geometric = ((data.weights.log() * data.mask).sum(-1, keepdim=True) / counts).exp().expand(ROLLOUTS, LENGTH)
    assert_same(theirs, our_loss(data, objective, denominator=ROLLOUTS, importance_weights=geometric))


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("ratio", [0.0002, 0.3, 1.0])
def test_kl_cov(ratio, mode):
    """max(1, int(ratio N)) tokens of the highest covariance; there is no clip, and weights are on the penalty too."""
    data = per_token(batch(23))
    actor = config(policy_loss=PolicyLossConfig(loss_mode="kl_cov", kl_cov_ratio=ratio, ppo_kl_coef=0.4))
    theirs = verl_loss(data, "kl_cov", mode, actor, data.weights)
    objective = ak.kl_cov(ratio, 0.4, aggregation=mode)
    ours = our_loss(data, objective, importance_weights=data.weights)
    assert_same(theirs, ours, scale_of(mode, data))
    wrong = our_loss(data, ak.kl_cov(ratio, 0.5, aggregation=mode), importance_weights=data.weights)
    assert (wrong[1] - theirs[1]).abs().max() > 100 * GRADIENT


def test_kl_cov_by_default():
    data = batch(24)
    theirs = verl_loss(data, "kl_cov", "token-mean", config(policy_loss=PolicyLossConfig(loss_mode="kl_cov")))
    assert_same(theirs, our_loss(data, ak.kl_cov()))


def clip_cov_config(ratio, low, high):
    policy = PolicyLossConfig(loss_mode="clip_cov", clip_cov_ratio=ratio, clip_cov_lb=low, clip_cov_ub=high)
    return config(policy_loss=policy, clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28)


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("low, high", [(1.0, 5.0), (0.1, 1.0), (-1.0, 0.5)])
def test_clip_cov(low, high, mode):
    """Where there are no more candidates than it takes; the clip's own tokens are none of them."""
    data = per_token(batch(25))
    theirs = verl_loss(data, "clip_cov", mode, clip_cov_config(1.0, low, high), data.weights)
    objective = ak.clip_cov(1.0, low, high, epsilon_high=0.28, aggregation=mode)
    ours = our_loss(data, objective, importance_weights=data.weights)
    assert_same(theirs, ours, scale_of(mode, data))
    assert 0 < theirs[2]["actor/pg_clipfrac"] == pytest.approx(taken(data, ours[0]), abs=1e-6)


def taken(data, output):
    """The share of the tokens that a rule selected."""
    sign = data.advantages.sign() * data.mask
    share = {s: (sign == s).sum().item() / data.mask.sum().item() for s in (1, -1)}
    metrics = output.metrics
    return (
        share[1] * metrics["selected_fraction_positive"].item()
        + share[-1] * metrics["selected_fraction_negative"].item()
    )


@pytest.mark.parametrize("ratio", [0.0002, 0.2])
def test_clip_cov_takes_as_many(ratio):
    """Of more candidates verl draws by torch's generator, we by a hash: as many of them."""
    data = per_token(batch(25))
    torch.manual_seed(0)
    theirs = verl_loss(data, "clip_cov", "token-mean", clip_cov_config(ratio, -1.0, 0.5))
    output, _ = our_loss(data, ak.clip_cov(ratio, -1.0, 0.5, epsilon_high=0.28))
    assert theirs[2]["actor/pg_clipfrac"] == pytest.approx(taken(data, output), abs=1e-6)
    assert taken(data, output) == pytest.approx(max(1, int(ratio * 20)) / 20)


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_dro(beta, mode):
    """-(A l - beta/2 (l - lo)^2): REINFORCE with log_ratio_coef beta / 2. verl's weights are on both terms."""
    data = batch(26)
    actor = config(policy_loss=PolicyLossConfig(loss_mode="dro", dro_beta=beta))
    objective = ak.Objective(surrogate=ak.Reinforce(), log_ratio_coef=beta / 2, aggregation=mode)
    theirs = verl_loss(data, "dro", mode, actor)
    ours = our_loss(data, objective)
    assert_same(theirs, ours, 5 * scale_of(mode, data))
    assert theirs[2]["actor/ppo_kl"] == pytest.approx(ours[0].metrics["approx_kl"].item(), abs=1e-6)
    weighted = verl_loss(data, "dro", mode, actor, torch.full_like(data.weights, 2.0))
    ours = our_loss(data, ak.Objective(surrogate=ak.Reinforce(), log_ratio_coef=beta, aggregation=mode),
                    importance_weights=torch.full_like(data.weights, 2.0))  # fmt: skip
    assert_same(weighted, ours, 10 * scale_of(mode, data))
