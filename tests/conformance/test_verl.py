"""verl's policy losses, aggregations, KL estimators and group advantages, as published, on the same tensors.

Where verl differs from SPEC.md by design, a test states the difference: GSPO's gradient with weights per token, the
clamps of k3 and of GSPO's ratio, sum-norm's count of rollouts, an empty micro-batch, equal rewards.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import a3po_kernels

pytest.importorskip("verl")
import numpy as np
from verl.trainer.ppo import core_algos
from verl.utils.torch_functional import entropy_from_logits
from verl.workers.config import ActorConfig

pytestmark = pytest.mark.verl

ROLLOUTS, LENGTH, VOCABULARY = 4, 9, 50
# fp32 on both sides: a log-prob near 8 carries a few roundings of 2^-21 = 5e-7 into the ratio; the loss averages terms
# below 3 of either sign, and the gradient of a logit is a token's share (at most 1) of a ratio below 3, times p.
LOSS, GRADIENT = 3e-6, 1e-6
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(ROLLOUTS, LENGTH, VOCABULARY, generator=generator)
    targets = torch.randint(0, VOCABULARY, (ROLLOUTS, LENGTH), generator=generator)
    current = log_prob(logits, targets)
    noise = torch.randn(3, ROLLOUTS, LENGTH, generator=generator)
    log_ratio = 0.4 * noise[0]
    log_ratio[:, :4] = torch.tensor([0.5, -0.5, 0.24, -0.2])  # on either side of every bound below, for either sign
    lengths = torch.tensor([9, 4, 0, 7])  # one rollout without a response token
    return SimpleNamespace(
        logits=logits,
        targets=targets,
        mask=(torch.arange(LENGTH) < lengths[:, None]).float(),
        advantages=torch.tensor([1.2, -0.7, 0.4, -1.5]),
        old=current - log_ratio,
        ref=current + 0.2 * noise[1],
        weights=(0.3 * noise[2]).exp(),
    )


def log_prob(logits, targets):
    return torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def config(global_batch=None, **options):
    actor = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)
    actor.global_batch_info.update(global_batch or {})
    return actor


def verl_loss(data, name, mode, actor, weights=None):
    logits = data.logits.clone().requires_grad_()
    logp = log_prob(logits, data.targets)
    advantages = data.advantages
    if advantages.ndim == 1:
        advantages = advantages.unsqueeze(-1).expand(ROLLOUTS, LENGTH)
    loss, metrics = core_algos.get_policy_loss_fn(name)(
        old_log_prob=data.old, log_prob=logp, advantages=advantages, response_mask=data.mask, loss_agg_mode=mode,
        config=actor, rollout_is_weights=weights,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), logits.grad, metrics


def our_loss(data, objective, **keywords):
    logits = data.logits.clone().requires_grad_()
    output = a3po_kernels.policy_loss(
        logits, data.targets, data.advantages, objective=objective, old_logprobs=data.old, mask=data.mask, **keywords
    )
    output.loss.backward()
    return output, logits.grad


def assert_same(theirs, ours, scale=1.0):
    """scale: how many times the mean over tokens the loss is, if it is a sum."""
    torch.testing.assert_close(ours[0].loss, theirs[0], atol=LOSS * scale, rtol=0)
    torch.testing.assert_close(ours[1], theirs[1], atol=GRADIENT * scale, rtol=0)


def scale_of(mode, data, denominator=3.0):
    """For assert_same; 3 of the rollouts have a token."""
    return data.mask.sum().item() / denominator if mode.endswith("sum") else 1.0


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_vanilla(mode, corrected):
    """PPO's clip with verl's dual clip of 3. verl's sum-norm counts non-empty rollouts x horizon: our denominator."""
    data = batch()
    actor = config(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=1.5)
    weights = data.weights if corrected else None
    theirs = verl_loss(data, "vanilla", mode, actor, weights)
    keywords = {"importance_weights": weights} if corrected else {}
    if mode == "seq-mean-token-sum-norm":
        keywords["denominator"] = 3.0 * LENGTH
    ours = our_loss(data, a3po_kernels.dapo(dual_clip=1.5, aggregation=mode), **keywords)
    assert_same(theirs, ours, scale_of(mode, data))
    metrics = ours[0].metrics
    assert theirs[2]["actor/ppo_kl"] == pytest.approx(metrics["approx_kl"].item(), abs=1e-6)
    assert theirs[2]["actor/pg_clipfrac_lower"] == pytest.approx(metrics["dual_clip_fraction"].item(), abs=1e-6)
    fraction = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    assert theirs[2]["actor/pg_clipfrac"] == pytest.approx(fraction.item(), abs=1e-6)
    assert theirs[2]["actor/pg_clipfrac"] > 0 and theirs[2]["actor/pg_clipfrac_lower"] > 0


def test_vanilla_by_default():
    """Clip .2/.2 and a dual clip of 3; the ratios go beyond it, two beyond e^20. Advantages per token."""
    data = batch(9)
    noise = torch.randn(ROLLOUTS, LENGTH, generator=torch.Generator().manual_seed(10))
    data.advantages = torch.randn(ROLLOUTS, LENGTH, generator=torch.Generator().manual_seed(11))
    data.old = (data.old - 1.5 * noise).clamp(max=0.0)
    data.logits[1, 1, data.targets[1, 1]] -= 45.0
    data.old[0, 0], data.old[1, 1] = data.old[0, 0] - 40.0, data.old[1, 1] - 5.0
    data.advantages[0, 0], data.advantages[1, 1] = -1.0, 1.0
    theirs = verl_loss(data, "vanilla", "token-mean", config())
    assert_same(theirs, our_loss(data, a3po_kernels.dapo(epsilon_high=0.2, dual_clip=3.0)))
    assert theirs[2]["actor/pg_clipfrac_lower"] > 1 / data.mask.sum()


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_a_token(mode):
    """verl divides 0 by 0 and gives NaN (unless it is told the global batch); we give 0."""
    data = batch(12)
    data.mask = torch.zeros_like(data.mask)
    assert verl_loss(data, "vanilla", mode, config())[0].isnan()
    output, gradient = our_loss(data, a3po_kernels.dapo(aggregation=mode))
    assert output.loss == 0 and not gradient.any()


@pytest.mark.parametrize(
    "mode, info, denominator",
    [
        ("token-mean", {"dp_size": 2, "batch_num_tokens": 77}, 77 / 2),
        ("token-sum", {"dp_size": 2}, 1 / 2),
        ("seq-mean-token-sum", {"dp_size": 2, "global_batch_size": 16}, 16 / 2),
        ("seq-mean-token-mean", {"dp_size": 4, "global_batch_size": 16}, 16 / 4),
        ("seq-mean-token-sum-norm", {"dp_size": 2, "global_batch_size": 16, "loss_scale_factor": 32}, 16 * 32 / 2),
    ],
)
def test_global_batch(mode, info, denominator):
    """verl's factor dp_size undoes the averaging of gradients over ranks: it divides our denominator."""
    data = batch(1)
    actor = config(info, clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0)
    theirs = verl_loss(data, "vanilla", mode, actor)
    aggregation = "token-mean" if mode == "token-sum" else mode
    objective = a3po_kernels.dapo(dual_clip=3.0, aggregation=aggregation)
    assert_same(theirs, our_loss(data, objective, denominator=denominator), scale_of(mode, data, denominator))


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("bound", [0.03, 0.5])
def test_gspo(bound, mode):
    """verl gives each token its own gradient by a stop-gradient trick, we differentiate the mean.

    They coincide for an advantage that is constant in its rollout, as the tokens of a rollout are weighed alike.
    """
    data = batch(2)
    actor = config(clip_ratio=bound, clip_ratio_low=bound, clip_ratio_high=bound)
    objective = a3po_kernels.gspo(epsilon_low=bound, epsilon_high=bound, aggregation=mode)
    assert_same(verl_loss(data, "gspo", mode, actor), our_loss(data, objective), scale_of(mode, data))


def test_gspo_with_weights_per_token():
    """The losses are equal, and the gradient of every log-prob in ours is the mean of its rollout's in verl's."""
    data, actor, mode = batch(2), config(), "seq-mean-token-mean"
    theirs = verl_loss(data, "gspo", mode, actor, data.weights)
    ours = our_loss(data, a3po_kernels.gspo(), importance_weights=data.weights)
    torch.testing.assert_close(ours[0].loss, theirs[0], atol=LOSS, rtol=0)
    assert (ours[1] - theirs[1]).abs().max() > 100 * GRADIENT

    leaf = log_prob(data.logits, data.targets).requires_grad_()
    loss, _ = core_algos.compute_policy_loss_gspo(
        data.old, leaf, data.advantages.unsqueeze(-1).expand(ROLLOUTS, LENGTH), data.mask, mode, actor, data.weights
    )
    loss.backward()
    mean = leaf.grad.sum(-1, keepdim=True) / data.mask.sum(-1, keepdim=True).clamp(min=1) * data.mask
    logits = data.logits.clone().requires_grad_()
    log_prob(logits, data.targets).backward(mean)
    torch.testing.assert_close(ours[1], logits.grad, atol=GRADIENT, rtol=0)


def test_gspo_of_a_mean_log_ratio_beyond_10():
    """verl stops the ratio of a rollout at e^10, we at e^20 as everywhere."""
    data = batch(13)
    data.advantages = -torch.ones(ROLLOUTS)
    data.old = log_prob(data.logits, data.targets) - 12.0
    theirs = verl_loss(data, "gspo", "seq-mean-token-mean", config())
    ours = our_loss(data, a3po_kernels.gspo())
    assert theirs[0].log().item() == pytest.approx(10.0, abs=1e-5) and theirs[1].abs().max() == 0
    assert ours[0].loss.log().item() == pytest.approx(12.0, abs=1e-5) and ours[1].abs().max() > 0


@pytest.mark.parametrize("mode", MODES[:3])
def test_cispo(mode):
    data = batch(3)
    actor = config(clip_ratio=0.2, clip_ratio_low=0.1, clip_ratio_high=0.3)
    objective = a3po_kernels.cispo(epsilon_low=0.1, epsilon_high=1.3, aggregation=mode)
    theirs = verl_loss(data, "cispo", mode, actor, data.weights)
    assert_same(theirs, our_loss(data, objective, importance_weights=data.weights), scale_of(mode, data))
    unbounded, _ = our_loss(data, a3po_kernels.cispo(epsilon_high=1.3, aggregation=mode))
    assert (unbounded.loss - theirs[0]).abs() > 100 * LOSS, "the lower bound matters here"


@pytest.mark.parametrize("tau_neg", [1.05, 2.0])
@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "token-mean"])
def test_sapo(mode, tau_neg):
    """verl averages over rollouts whatever mode it is given, as our preset does."""
    data = batch(4)
    actor = config(tau_pos=1.0, tau_neg=tau_neg)
    objective = a3po_kernels.sapo(tau_positive=1.0, tau_negative=tau_neg)
    theirs = verl_loss(data, "sapo", mode, actor, data.weights)
    assert_same(theirs, our_loss(data, objective, importance_weights=data.weights))


@pytest.mark.parametrize("wrong", [{"epsilon_low": 0.15}, {"epsilon_high": 0.25}, {"dual_clip": 2.0}])
def test_a_wrong_parameter_is_noticed(wrong):
    data = batch(5)
    theirs = verl_loss(data, "vanilla", "token-mean", config(clip_ratio_high=0.28, clip_ratio_c=1.5))
    right = {"epsilon_low": 0.2, "epsilon_high": 0.28, "dual_clip": 1.5}
    assert_same(theirs, our_loss(data, a3po_kernels.dapo(**right)))
    ours = our_loss(data, a3po_kernels.dapo(**{**right, **wrong}))
    assert (theirs[1] - ours[1]).abs().max() > 100 * GRADIENT


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("ours, theirs", [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl")])
def test_kl_and_entropy_terms(ours, theirs, mode):
    """verl's actor adds kl_loss_coef x the aggregated KL, less entropy_coeff x the aggregated entropy."""
    data = batch(6)
    loss, gradient, _ = verl_loss(data, "vanilla", mode, config())
    logits = data.logits.clone().requires_grad_()
    kl = core_algos.kl_penalty(log_prob(logits, data.targets), data.ref, theirs)
    terms = 0.3 * core_algos.agg_loss(kl, data.mask, mode)
    terms = terms - 0.05 * core_algos.agg_loss(entropy_from_logits(logits), data.mask, mode)
    terms.backward()
    objective = a3po_kernels.dapo(
        epsilon_high=0.2, dual_clip=3.0, kl_coef=0.3, kl_estimator=ours, entropy_coef=0.05, aggregation=mode
    )
    output, grad = our_loss(data, objective, ref_logprobs=data.ref)
    assert_same((loss + terms.detach(), gradient + logits.grad), (output, grad), scale_of(mode, data))
    expected = (kl.detach() * data.mask).sum() / data.mask.sum()
    assert output.metrics["kl"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_k3_beyond_verls_clamp():
    """verl stops k3 at 10, without a gradient there; ours is the estimator itself, as TRL's."""
    data = batch(14)
    logits = data.logits.clone().requires_grad_()
    logp = log_prob(logits, data.targets)
    data.old, data.ref = None, logp.detach() + 3.0
    theirs = core_algos.agg_loss(core_algos.kl_penalty(logp, data.ref, "k3"), data.mask, "token-mean")
    theirs.backward()
    objective = a3po_kernels.dapo(kl_coef=1.0)
    data.advantages = torch.zeros(ROLLOUTS)
    output, gradient = our_loss(data, objective, ref_logprobs=data.ref)
    assert theirs.item() == pytest.approx(10.0) and not logits.grad.any()
    assert output.loss.item() == pytest.approx(math.exp(3.0) - 4.0, rel=1e-5) and gradient.any()


@pytest.mark.parametrize("normalize, by_std", [("std", True), ("none", False)])
def test_group_advantages(normalize, by_std):
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.25, 0.0, 2.0, 0.0, 0.0])
    groups = [0, 0, 0, 1, 1, 1, 1, 2, 3, 3]
    scores = torch.zeros(10, 5)
    scores[:, -1] = rewards
    expected, _ = core_algos.compute_grpo_outcome_advantage(
        scores, torch.ones(10, 5), np.array(groups), norm_adv_by_std_in_grpo=by_std
    )
    ours = a3po_kernels.group_advantages(rewards, torch.tensor(groups), normalize)
    # A group of one: verl divides the reward by 1 + 1e-6, we give it as it is.
    assert torch.allclose(ours, expected[:, 0], atol=3e-6, rtol=0)


def test_equal_rewards():
    """Ours are exactly zero; in verl's the mean's rounding is magnified by 1 / 1e-6."""
    rewards = torch.full((6,), 0.1)
    expected, _ = core_algos.compute_grpo_outcome_advantage(rewards.unsqueeze(-1), torch.ones(6, 1), np.zeros(6, int))
    ours = a3po_kernels.group_advantages(rewards, torch.zeros(6, dtype=torch.long))
    assert not ours.any()
    assert expected.abs().max() < 0.05
