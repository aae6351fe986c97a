"""Every name that docs/objectives.md gives for verl is one of the installed package."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("verl")
import objectives_page
from verl.trainer.config import AlgoConfig
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.workers.config.actor import ActorConfig, PolicyLossConfig

pytestmark = pytest.mark.verl
NAMED = objectives_page.options(objectives_page.PAGE.read_text(encoding="utf-8"), "verl")


def chosen(option):
    return {value for name, value in NAMED if name == option and value is not None}


def test_options_are_fields():
    kinds = (ActorConfig, PolicyLossConfig, RolloutCorrectionConfig, AlgoConfig)
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert len(NAMED) > 25
    assert not {name for name, _ in NAMED} - fields


def test_loss_modes():
    """All that are registered are named, but for bypass_mode, a wrapper; ours are another module's."""
    registry = {
        name for name, loss in core_algos.POLICY_LOSS_REGISTRY.items() if loss.__module__ == core_algos.__name__
    }
    assert chosen("loss_mode") == registry - {"bypass_mode"}


def test_advantage_estimators():
    assert chosen("adv_estimator") and not chosen("adv_estimator") - set(core_algos.ADV_ESTIMATOR_REGISTRY)


def test_rejection_options():
    assert chosen("rollout_rs") == rollout_corr_helper.SUPPORTED_ROLLOUT_RS_OPTIONS


def test_aggregations_kl_terms_and_weights():
    one = torch.ones(1, 2)
    for mode in chosen("loss_agg_mode"):
        assert core_algos.agg_loss(one, one, mode).isfinite()
    with pytest.raises(ValueError, match="loss_agg_mode"):
        core_algos.agg_loss(one, one, "seq-mean")
    for kind in chosen("kl_loss_type"):
        assert core_algos.kl_penalty(one, one, kind).isfinite().all()
    with pytest.raises(NotImplementedError):
        core_algos.kl_penalty(one, one, "k4")
    for level in chosen("rollout_is"):
        assert rollout_corr_helper.compute_rollout_correction_weights(0 * one, one, level)[0].isfinite().all()
    with pytest.raises(ValueError, match="rollout_is"):
        rollout_corr_helper.compute_rollout_correction_weights(0 * one, one, "geometric")
    assert len(chosen("loss_agg_mode")) == 4 and len(chosen("kl_loss_type")) == 3 and len(chosen("rollout_is")) == 2
