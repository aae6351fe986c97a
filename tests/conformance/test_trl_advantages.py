"""Advantages beside the scoring of TRL's trainers: GRPOTrainer's aggregations and RLOOTrainer's baseline.

TRL divides by std + 1e-4: with our 1e-6 set to that the numbers are theirs. What differs by design is stated in a test:
groups of one, equal rewards.
"""

from __future__ import annotations

import pytest
import torch

from a3po_kernels import group_advantages, multi_reward_advantages
from a3po_kernels.losses import advantages as module

pytest.importorskip("trl")
import trl_scoring
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore::FutureWarning")]

IDS = torch.arange(8) // 4
# Theirs is fp32: advantages of a few units from rewards below 3, over a std above .1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    root = tmp_path_factory.mktemp("trl")
    rloo = trl_scoring.make(RLOOTrainer, RLOOConfig, root / "model", root / "rloo", beta=0.0)
    return trl_scoring.make(GRPOTrainer, GRPOConfig, root / "model", root / "grpo", 3), rloo


def rewards(seed, count=8, kinds=3):
    return 3 * torch.rand(count, kinds, generator=torch.Generator().manual_seed(seed))


def theirs(trainer, given, **options):
    for name, value in options.items():
        setattr(trainer, name, value)
    trainer.reward_weights = options.get("reward_weights", torch.ones(given.shape[1]))
    return trl_scoring.score(trainer, given)[0]["advantages"]


@pytest.mark.parametrize("scale, estimator", [("group", "grpo"), ("none", "dr_grpo")])
def test_sum_then_normalize(trainers, monkeypatch, scale, estimator):
    weights = torch.tensor([1.0, 0.5, 2.0])
    for seed in range(3):
        given = rewards(seed)
        want = theirs(
            trainers[0], given, scale_rewards=scale, multi_objective_aggregation="sum_then_normalize",
            reward_weights=weights,
        )  # fmt: skip
        assert torch.allclose(group_advantages(given @ weights, IDS, estimator=estimator), want, rtol=1e-3, atol=0)
        with monkeypatch.context() as patch:
            patch.setattr(module, "EPSILON", 1e-4)
            assert torch.allclose(group_advantages(given @ weights, IDS, estimator=estimator), want, **CLOSE)


def test_normalize_then_sum(trainers, monkeypatch):
    """GDPO, whitened over rollouts."""
    weights = torch.tensor([1.0, 0.5, 2.0])
    for seed in range(3):
        given = rewards(seed)
        want = theirs(
            trainers[0], given, multi_objective_aggregation="normalize_then_sum", reward_weights=weights
        )  # fmt: skip
        assert torch.allclose(multi_reward_advantages(given, IDS, weights), want, rtol=1e-3, atol=1e-4)
        with monkeypatch.context() as patch:
            patch.setattr(module, "EPSILON", 1e-4)
            assert torch.allclose(multi_reward_advantages(given, IDS, weights), want, **CLOSE)


def test_leave_one_out(trainers):
    for seed in range(3):
        given = rewards(seed, kinds=1)
        want = theirs(trainers[1], given, normalize_advantages=False)
        assert torch.allclose(group_advantages(given[:, 0], IDS, estimator="rloo"), want, **CLOSE)


def test_groups_of_one(trainers):
    """0 in both of TRL's trainers (in its evaluation); ours keeps the reward."""
    alone = torch.arange(8)
    for trainer, estimator, kinds in zip(trainers, ("grpo", "rloo"), (3, 1), strict=True):
        given = rewards(0, kinds=kinds)
        trainer.args.num_generations = 1
        try:
            want = theirs(trainer, given, scale_rewards="group", multi_objective_aggregation="sum_then_normalize")
        finally:
            trainer.args.num_generations = 4
        assert not want.any()
        assert torch.equal(group_advantages(given.sum(1), alone, estimator=estimator), given.sum(1))


def test_equal_rewards(trainers):
    """Ours are exactly zero; TRL's carry the mean's rounding over 1e-4."""
    given = torch.full((8, 3), 0.1)
    want = theirs(trainers[0], given, scale_rewards="group", multi_objective_aggregation="sum_then_normalize")
    assert want.abs().max() < 0.01
    assert not group_advantages(given.sum(1), IDS).any() and not multi_reward_advantages(given, IDS).any()
