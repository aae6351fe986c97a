"""docs/extending.md in a trainer: its blocks for verl; TRL's configuration and verl's registry in the edited copy."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import edits
import pytest

HAS_TRL, HAS_VERL = find_spec("trl") is not None, find_spec("verl") is not None
CONFIG = """
import a3po_kernels as ak
from a3po_kernels.integrations.trl import A3POConfig

options = dict(use_cpu=True, bf16=False, report_to=[])
config = A3POConfig("out", objective="logarithm", logarithm_scale=2.0, **options)
assert config.build_objective() == ak.logarithm(2.0)
assert A3POConfig("out", objective="logarithm", **options).to_dict()["logarithm_scale"] == 1.0
print(ak.__file__)
"""
REGISTRY = """
import a3po_kernels as ak
from a3po_kernels.integrations import verl
from verl.trainer.ppo.core_algos import get_policy_loss_fn

assert get_policy_loss_fn("logarithm").__name__ == "compute_policy_loss_logarithm"
print(ak.__file__)
"""


def run_in_the_copy(folder: Path, program: str) -> None:
    edits.extended(folder)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0 and str(folder) in result.stdout, result.stderr


@pytest.mark.trl
@pytest.mark.skipif(not HAS_TRL, reason="needs TRL")
def test_trls_configuration_takes_the_new_keyword(tmp_path):
    run_in_the_copy(tmp_path, CONFIG)


@pytest.mark.verl
@pytest.mark.skipif(not HAS_VERL, reason="needs verl")
def test_verl_has_the_new_preset(tmp_path):
    run_in_the_copy(tmp_path, REGISTRY)
