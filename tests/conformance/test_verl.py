"""verl's policy losses, aggregations, KL estimators and group advantages, as published, on the same tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import a3po_kernels

pytest.importorskip("verl")
import numpy as np
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

pytestmark = pytest.mark.verl

ROLLOUTS, LENGTH, VOCABULARY = 4, 9, 50
# fp32 on both sides: losses of a few terms below 3, each with some roundings of 1e-7.
LOSS, GRADIENT = 3e-6, 1e-6
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(ROLLOUTS, LENGTH, VOCABULARY, generator=generator)
    targets = torch.randint(0, VOCABULARY, (ROLLOUTS, LENGTH), generator=generator)
    current = torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    noise = torch.randn(3, ROLLOUTS, LENGTH, generator=generator)
    lengths = torch.tensor([9, 4, 0, 7])  # one rollout without a response token
    return SimpleNamespace(
        logits=logits,
        targets=targets,
        mask=(torch.arange(LENGTH) < lengths[:, None]).float(),
        advantages=torch.tensor([1.2, -0.7, 0.4, -1.5]),
        old=current + 0.4 * noise[0],
        ref=current + 0.2 * noise[1],
        weights=(0.3 * noise[2]).exp(),
    )


def config(global_batch=None, **options):
    actor = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)
    actor.global_batch_info.update(global_batch or {})
    return actor


def verl_loss(data, name, mode, actor, weights=None):
    logits = data.logits.clone().requires_grad_()
    logp = torch.log_softmax(logits, -1).gather(-1, data.targets.unsqueeze(-1)).squeeze(-1)
    advantages = data.advantages.unsqueeze(-1).expand(ROLLOUTS, LENGTH)
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


def assert_same(theirs, ours):
    assert torch.allclose(theirs[0], ours[0].loss, atol=LOSS, rtol=0)
    assert torch.allclose(theirs[1], ours[1], atol=GRADIENT, rtol=0)


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
    assert_same(theirs, ours)
    metrics = ours[0].metrics
    assert theirs[2]["actor/ppo_kl"] == pytest.approx(metrics["approx_kl"].item(), abs=1e-6)
    assert theirs[2]["actor/pg_clipfrac_lower"] == pytest.approx(metrics["dual_clip_fraction"].item(), abs=1e-6)
    fraction = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    assert theirs[2]["actor/pg_clipfrac"] == pytest.approx(fraction.item(), abs=1e-6)


@pytest.mark.parametrize(
    "mode, info, denominator",
    [
        ("token-mean", {"dp_size": 2, "batch_num_tokens": 77}, 77 / 2),
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
    objective = a3po_kernels.dapo(dual_clip=3.0, aggregation=mode)
    assert_same(theirs, our_loss(data, objective, denominator=denominator))


@pytest.mark.parametrize("bound", [0.03, 0.5])
def test_gspo(bound):
    """verl gives each token its own gradient by a stop-gradient trick, we differentiate the mean.

    They coincide for an advantage that is constant in its rollout, averaged over the rollout's tokens; with weights per
    token they do not, and the loss still does.
    """
    data = batch(2)
    actor = config(clip_ratio=bound, clip_ratio_low=bound, clip_ratio_high=bound)
    objective = a3po_kernels.gspo(epsilon_low=bound, epsilon_high=bound)
    assert_same(verl_loss(data, "gspo", "seq-mean-token-mean", actor), our_loss(data, objective))
    theirs = verl_loss(data, "gspo", "seq-mean-token-mean", actor, data.weights)
    ours = our_loss(data, objective, importance_weights=data.weights)
    assert torch.allclose(theirs[0], ours[0].loss, atol=LOSS, rtol=0)
    assert not torch.allclose(theirs[1], ours[1], atol=GRADIENT, rtol=0)


def test_cispo():
    data = batch(3)
    actor = config(clip_ratio=0.2, clip_ratio_low=0.1, clip_ratio_high=0.3)
    objective = a3po_kernels.cispo(epsilon_low=0.1, epsilon_high=1.3)
    assert_same(verl_loss(data, "cispo", "token-mean", actor), our_loss(data, objective))


def test_sapo():
    data = batch(4)
    actor = config(clip_ratio=0.2)
    objective = a3po_kernels.sapo(tau_positive=actor.tau_pos, tau_negative=actor.tau_neg)
    assert_same(verl_loss(data, "sapo", "seq-mean-token-mean", actor), our_loss(data, objective))


def test_a_wrong_parameter_is_noticed():
    data = batch(5)
    theirs = verl_loss(data, "vanilla", "token-mean", config(clip_ratio=0.2, clip_ratio_c=3.0))
    ours = our_loss(data, a3po_kernels.dapo(dual_clip=3.0, epsilon_high=0.25))
    assert (theirs[1] - ours[1]).abs().max() > 100 * GRADIENT


@pytest.mark.parametrize("ours, theirs", [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl")])
def test_kl_estimators(ours, theirs):
    data = batch(6)
    logp = torch.log_softmax(data.logits, -1).gather(-1, data.targets.unsqueeze(-1)).squeeze(-1)
    expected = (core_algos.kl_penalty_forward(logp, data.ref, theirs) * data.mask).sum() / data.mask.sum()
    objective = a3po_kernels.dapo(kl_coef=0.3, kl_estimator=ours)
    output, _ = our_loss(data, objective, ref_logprobs=data.ref)
    assert output.metrics["kl"].item() == pytest.approx(expected.item(), abs=1e-6)
    without, _ = our_loss(data, a3po_kernels.dapo())
    assert (output.loss - without.loss).item() == pytest.approx(0.3 * expected.item(), abs=3e-6)


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
