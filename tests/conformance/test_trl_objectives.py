"""Objectives that no preset names, through A3POTrainer: your own surrogate, off-policy masks, a function as a rule."""

from __future__ import annotations

import math

import pytest
import torch

import a3po_kernels as ak

pytest.importorskip("trl")
from test_trl_integration import folders, parameters, trained, trainer  # noqa: F401 (a fixture)

from a3po_kernels.integrations.trl import A3POConfig, A3POTrainer

pytestmark = pytest.mark.trl


def own(t):
    """As anyone would write one, at the top level of a module."""
    return -t.advantages * t.ratio.clamp(max=2.0) + 0.1 * (t.logprobs - t.old_logprobs).square()


def spread(t):
    return (t.logprobs - t.batch_mean(t.logprobs)).abs()


OBJECTIVES = {
    "own": {"objective": ak.Objective(surrogate=ak.CustomSurrogate(own))},
    "a function's rule": {
        "objective": ak.Objective(shaping=(ak.TokenRule(metric=spread, source="current", side="high", rest_scale=0.5),))
    },
    "off-policy mask": {"objective": "dapo", "off_policy_mask_threshold": 0.1},
    "the squared log ratio": {"objective": "dppo", "log_ratio_coef": 1e-3, "divergence": "kl"},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_trains_off_policy_and_is_saved(name, folders, tmp_path):  # noqa: F811
    made = trained(
        A3POTrainer, A3POConfig, folders / "llama", tmp_path, num_iterations=2, max_steps=4, save_strategy="steps",
        save_steps=2, **OBJECTIVES[name],
    )  # fmt: skip
    row = made.state.log_history[-2]
    assert all(math.isfinite(row[key]) for key in ("loss", "grad_norm", "entropy", "active_fraction"))
    start = parameters(trainer(A3POTrainer, A3POConfig, folders / "llama", tmp_path))
    assert not torch.equal(parameters(made), start)
    saved = torch.load(next(tmp_path.rglob("training_args.bin")), weights_only=False)
    assert saved.build_objective() == made.policy_objective


def test_what_a_trainer_cannot_give():
    by_score = ak.Objective(shaping=(ak.TokenRule(metric="mine"),))
    with pytest.raises(ValueError, match="selects by the score 'mine'"):
        A3POConfig("out", objective=by_score, use_cpu=True)
    keep = ak.TokenRule(metric="entropy", source="current", scope="batch", quantile=0.8, side="high", rest_scale=0.0)
    with pytest.raises(ValueError, match="is not known ahead"):
        A3POConfig("out", objective=ak.Objective(shaping=(keep,), normalize_over="selected"), use_cpu=True)
    with pytest.raises(ValueError, match="vllm_importance_sampling_mode"):
        A3POConfig("out", objective="vespo", use_vllm=True, use_cpu=True)
    made = A3POConfig("out", objective="vespo", vespo_k_pos=1.5, use_cpu=True).build_objective()
    assert made.ratio_weights == (ak.Vespo(k_positive=1.5),)
