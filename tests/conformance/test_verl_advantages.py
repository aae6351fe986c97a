"""Advantages beside verl 0.9.1's estimators, on unequal groups, rollouts of unequal lengths and a group of one.

GRPO and Dr. GRPO are in test_verl.py. verl whitens over tokens, by rsqrt(var + 1e-8) where ours divides by std + 1e-6.
"""

from __future__ import annotations

import pytest
import torch

from a3po_kernels import group_advantages, multi_reward_advantages

pytest.importorskip("verl")
import numpy as np
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos

pytestmark = pytest.mark.verl

GROUPS = np.array([0, 0, 0, 1, 1, 1, 1, 2, 3, 3, 0, 4])
IDS = torch.tensor(GROUPS)
ROLLOUTS, LENGTH = len(GROUPS), 9
# Theirs is fp32, and 1e-6 beside a std above .5 moves an advantage below 4 by 8e-6.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def batch(seed=0, kinds=1):
    """rewards [S, K], mask [S, T] and lengths [S]."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LENGTH + 1, (ROLLOUTS,), generator=generator)
    rewards = 3 * torch.rand(ROLLOUTS, kinds, generator=generator) - 1
    return rewards, (torch.arange(LENGTH) < lengths[:, None]).float(), lengths


def at_the_end(rewards, lengths):
    """Token rewards as verl has an outcome's: at the last token."""
    scores = torch.zeros(ROLLOUTS, LENGTH)
    scores[torch.arange(ROLLOUTS), lengths - 1] = rewards
    return scores


def per_rollout(advantages, mask):
    """[S] of advantages that are the same on each token of a rollout and 0 elsewhere."""
    assert torch.equal(advantages, advantages[:, :1] * mask)
    return advantages[:, 0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "name, estimator, weighted",
    [
        ("rloo", "rloo", False), ("opo", "opo", True), ("grpo", "grpo", False),
        ("reinforce_plus_plus_baseline", "reinforce_plus_plus_baseline", True),
        ("reinforce_plus_plus", "reinforce_plus_plus", True),
    ],
)  # fmt: skip
def test_estimators(name, estimator, weighted, seed):
    rewards, mask, lengths = batch(seed)
    compute = core_algos.get_adv_estimator_fn(name)
    theirs, _ = compute(
        token_level_rewards=at_the_end(rewards[:, 0], lengths), response_mask=mask, index=GROUPS,
        config=AlgoConfig(gamma=1.0),
    )  # fmt: skip
    ours = group_advantages(rewards[:, 0], IDS, estimator=estimator, lengths=lengths if weighted else None)
    assert torch.allclose(ours, per_rollout(theirs, mask), **CLOSE)
    if estimator.startswith("reinforce"):
        over_rollouts = group_advantages(rewards[:, 0], IDS, estimator=estimator)
        assert not torch.allclose(over_rollouts, ours, atol=1e-2), "lengths decide too little in this batch"


def test_groups_of_one():
    """verl's rloo keeps the reward, as ours; its vectorised form, which is the same elsewhere, gives 0."""
    rewards, mask, lengths = batch(3)
    compute = core_algos.get_adv_estimator_fn("rloo_vectorized")
    theirs, _ = compute(at_the_end(rewards[:, 0], lengths), mask, GROUPS)
    theirs, ours = per_rollout(theirs, mask), group_advantages(rewards[:, 0], IDS, estimator="rloo")
    alone = (IDS == 2) | (IDS == 4)
    assert torch.allclose(ours[~alone], theirs[~alone].float(), **CLOSE)
    assert not theirs[alone].any() and torch.equal(ours[alone], rewards[alone, 0])


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]])
def test_several_rewards(weights):
    """GDPO, over tokens."""
    for seed in range(3):
        rewards, mask, lengths = batch(seed, 3)
        keys = [f"reward_{k}" for k in range(3)]
        config = AlgoConfig(gdpo_reward_keys=keys, gdpo_reward_weights=weights)
        attention = torch.cat([torch.ones(ROLLOUTS, 2), mask], 1).long()
        theirs, _ = core_algos.compute_gdpo_outcome_advantage(
            at_the_end(rewards.sum(1), lengths), mask, GROUPS, config=config,
            non_tensor_batch={key: rewards[:, k].numpy() for k, key in enumerate(keys)},
            batch={"prompts": torch.zeros(ROLLOUTS, 2), "attention_mask": attention},
        )  # fmt: skip
        factors = None if weights is None else torch.tensor(weights)
        ours = multi_reward_advantages(rewards, IDS, factors, lengths=lengths)
        assert torch.allclose(ours, per_rollout(theirs, mask), **CLOSE)


def test_one_token_in_all():
    """verl raises; ours is 0, the value less its mean."""
    reward = torch.tensor([0.7])
    with pytest.raises(ValueError, match="sum of the mask is one"):
        core_algos.compute_reinforce_plus_plus_outcome_advantage(
            reward[:, None], torch.ones(1, 1), config=AlgoConfig(gamma=1.0)
        )
    ours = group_advantages(reward, None, estimator="reinforce_plus_plus", lengths=torch.tensor([1]))
    assert ours.tolist() == [0.0]
