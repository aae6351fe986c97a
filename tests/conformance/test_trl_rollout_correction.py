"""rollout_correction beside TRL's: the importance_sampling_ratio and the metrics of its trainer's own scoring.

Where they differ by design a test states it: sampled NaN, exponents beyond 20, rollouts without a token.
"""

from __future__ import annotations

import math

import pytest
import torch

from a3po_kernels import rollout_correction

pytest.importorskip("trl")
import trl_scoring
from trl import GRPOConfig, GRPOTrainer

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore::FutureWarning")]

ROLLOUTS, LENGTH = 8, 9
# Theirs is fp32: a difference of log-probs below 4 carries 2^-22 each, nine of them 2e-6 into a rollout's product.
CLOSE = 1e-5
MODES = {
    "token_truncate": ("token", "truncate"), "token_mask": ("token", "icepop"),
    "sequence_truncate": ("sequence", "truncate"), "sequence_mask": ("sequence", "icepop"),
}  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    root = tmp_path_factory.mktemp("trl")
    made = trl_scoring.make(GRPOTrainer, GRPOConfig, root / "model", root / "out")
    # Without an engine: only what it would have sampled is needed.
    made.use_vllm, made.vllm_importance_sampling_correction = True, True
    return made


def batch(seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    old = -4 * torch.rand(ROLLOUTS, LENGTH, generator=generator)
    sampled = old + scale * torch.randn(ROLLOUTS, LENGTH, generator=generator)
    old, sampled = (x - sampled.clamp(min=0.0) for x in (old, sampled))
    lengths = torch.randint(2, LENGTH + 1, (ROLLOUTS,), generator=generator)
    lengths[0] = LENGTH
    mask = torch.arange(LENGTH) < lengths[:, None]
    mask[1:, 0] = False  # a tool's
    return old, sampled, mask


def theirs(trainer, mode, low, high, old, sampled, mask):
    trainer.vllm_importance_sampling_mode = mode
    trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = low, high
    output, metrics = trl_scoring.score(trainer, torch.rand(ROLLOUTS, 1), mask=mask, old=old, sampled=sampled)
    return output["importance_sampling_ratio"].expand(ROLLOUTS, LENGTH), metrics


@pytest.mark.parametrize("low, high", [(None, 3.0), (None, 1.2), (0.8, None), (0.8, 1.2)])
@pytest.mark.parametrize("mode", MODES)
def test_ratio_and_metrics(trainer, mode, low, high):
    level, ours = MODES[mode]
    changed = 0
    for seed in range(3):
        old, sampled, mask = batch(seed)
        ratio, metrics = theirs(trainer, mode, low, high, old, sampled, mask)
        found = rollout_correction(old, sampled, mask, level=level, mode=ours, low=low, high=high)
        assert torch.allclose(found.weights[mask], ratio[mask], rtol=CLOSE, atol=0)
        assert torch.equal(found.weights[mask] == 0, ratio[mask] == 0) and torch.equal(found.keep, mask)
        mean = "weight_mean" if level == "token" else "weight_rollout_mean"
        names = {
            "importance_sampling_ratio/mean": mean, "importance_sampling_ratio/max": "weight_max",
            "importance_sampling_ratio/min": "weight_min", "sampling_logp_difference/mean": "logp_difference_mean",
            "sampling_logp_difference/max": "logp_difference_max",
        }  # fmt: skip
        for name, our_name in names.items():
            assert found.metrics[our_name].item() == pytest.approx(metrics[f"sampling/{name}"], rel=CLOSE), name
        changed += found.metrics["fraction_high"].item() if high else found.metrics["fraction_low"].item()
    assert changed or high == 3.0


@pytest.mark.parametrize("mode", MODES)
def test_sampled_nan(trainer, mode):
    """TRL takes it for a ratio of 1; ours is NaN, and theirs with the line that the docstring gives."""
    old, sampled, mask = batch(4)
    sampled[0, 3] = math.nan
    ratio, _ = theirs(trainer, mode, None, 3.0, old, sampled, mask)
    level, ours = MODES[mode]
    assert rollout_correction(old, sampled, mask, level=level, mode=ours, high=3.0).weights[0, 3].isnan()
    found = rollout_correction(
        old, torch.where(sampled.isnan(), old, sampled), mask, level=level, mode=ours, high=3.0
    )
    assert torch.allclose(found.weights[mask], ratio[mask], rtol=CLOSE, atol=0)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_beyond_the_clamp(trainer, level):
    """A ratio of e^30: ours is e^20 where the bound is higher still; theirs is e^30."""
    old, sampled, mask = batch(5)
    sampled[0] = old[0]
    sampled[0, 2] = old[0, 2] - 30.0
    ratio, _ = theirs(trainer, f"{level}_truncate", None, 1e20, old, sampled, mask)
    found = rollout_correction(old, sampled, mask, level=level, high=1e20)
    assert ratio[0, 2].item() == pytest.approx(math.exp(30), rel=1e-4)
    assert found.weights[0, 2].item() == pytest.approx(math.exp(20), rel=1e-6)


def test_a_rollout_without_a_token(trainer):
    """Its ratio is 1 in TRL's mean over rollouts; ours is over rollouts with a token."""
    old, sampled, mask = batch(6)
    mask[3] = False
    ratio, metrics = theirs(trainer, "sequence_truncate", None, 3.0, old, sampled, mask)
    found = rollout_correction(old, sampled, mask, level="sequence", high=3.0)
    assert torch.allclose(found.weights[mask], ratio[mask], rtol=CLOSE, atol=0)
    ours = (7 * found.metrics["weight_rollout_mean"].item() + 1) / 8
    assert ours == pytest.approx(metrics["sampling/importance_sampling_ratio/mean"], rel=CLOSE)
