"""Every name that docs/objectives.md gives for TRL is one of the installed package."""

from __future__ import annotations

import dataclasses
from importlib import import_module

import pytest

pytest.importorskip("trl")
import objectives_page
from test_trl import batch, trl_loss
from trl import GRPOConfig

pytestmark = pytest.mark.trl
TEXT = objectives_page.PAGE.read_text(encoding="utf-8")
NAMED = objectives_page.options(TEXT, "TRL")
FIELDS = {field.name for field in dataclasses.fields(GRPOConfig)}
VESPO = {name: getattr(GRPOConfig, name) for name in sorted(FIELDS) if name.startswith("vespo_")}


def chosen(option):
    return sorted(value for name, value in NAMED if name == option and value is not None)


def test_options_are_fields_or_classes():
    assert len(NAMED) > 20
    for name, _ in NAMED:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute) if module else name in FIELDS, name


@pytest.mark.parametrize("loss_type", chosen("loss_type"))
def test_loss_types(loss_type):
    """Each is one that the trainer's loss knows."""
    assert trl_loss(batch(0), loss_type=loss_type, **VESPO)[0].isfinite()


def test_all_loss_types_are_named():
    assert chosen("loss_type") == sorted(["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"])
    with pytest.raises(ValueError, match="Unknown loss type: fipo"):
        trl_loss(batch(0), loss_type="fipo")


@pytest.mark.parametrize("option", ["vllm_importance_sampling_mode", "multi_objective_aggregation", "scale_rewards"])
def test_values_are_in_the_documentation_of_the_config(option):
    """TRL takes any string there; its docstring lists those that it knows."""
    assert chosen(option)
    documented = (GRPOConfig.__doc__ or "").split(f"{option} (")[1].split("`, *optional*")[1]
    section = documented.split("*optional*")[0]
    for value in chosen(option):
        assert f'"{value}"' in section, value
