"""The scripts of docs/trainers/ whose frameworks are in no environment here, started as their pages say, on stand-ins.

make test-megatron runs that of Megatron-Core inside the real one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import docs_examples
import pytest
from batches import INTERPRETED
from docs_examples import ELSEWHERE, ROOT, has_message, names_in_table, strings_of
from trainer_stand_ins import MEGATRON, NEMO_RL, PRIME_RL, SLIME, printed_losses

pytestmark = pytest.mark.skipif(INTERPRETED, reason="natively")
PAGES = {page.stem: page for page in ELSEWHERE}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def the_block(name: str) -> str:
    """The page's only Python block."""
    [block] = docs_examples.blocks(PAGES[name])
    return block


def run(folder: Path, files: dict[str, str], *command: str) -> str:
    """What a Python command prints in a folder with these files."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    environment = {
        **os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        "PYTHONWARNINGS": "error::UserWarning:a3po_kernels", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_prime_rl(tmp_path):
    """Under torchrun -m, the head is ours before the model is wrapped, and called as prime-rl's forward calls it."""
    files = {**PRIME_RL, "a3po_trainer.py": the_block("prime-rl")}
    found = run(tmp_path, files, *TORCHRUN, "1", "-m", "a3po_trainer", "@", "configs/trainer.json")
    assert found.split() == ["head", "a3po_kernels.integrations.prime_rl", "True"]


def test_slime(tmp_path):
    """The option's function sets the attribute that the scoring function reads, imported by name before."""
    page = PAGES["slime"].read_text()
    assert "train.py --custom-megatron-init-path a3po_slime.swap" in page
    assert run(tmp_path, {**SLIME, "a3po_slime.py": the_block("slime")}, "actor.py").split() == ["gradient", "True"]


def test_nemo_rl(tmp_path):
    """The line at the end of NeMo-RL's module is what the forward above it calls."""
    module = "nemo_rl/distributed/model_utils.py"
    files = {**NEMO_RL, module: NEMO_RL[module] + the_block("nemo-rl")}
    assert run(tmp_path, files, "worker.py").split() == ["gradient", "True"]


def test_the_configuration_for_nemo_rl():
    yaml = pytest.importorskip("yaml")
    [written] = re.findall(r"```yaml\n(.*?)```", PAGES["nemo-rl"].read_text(), re.DOTALL)
    policy = yaml.safe_load(written)["policy"]
    assert policy["megatron_cfg"]["use_fused_linear_logprobs"] is True
    assert policy["megatron_cfg"]["distributed_data_parallel_config"] == {"overlap_param_gather": False}
    assert policy["sequence_packing"] == {"enabled": False} and policy["generation"]["temperature"] == 1.0


def test_megatron(tmp_path):
    """Four steps that lower the loss, the same on one rank and on two tensor-parallel ones."""
    files = {**MEGATRON, "train_megatron.py": the_block("megatron")}
    whole, split = (
        printed_losses(run(tmp_path, files, *TORCHRUN, ranks, "train_megatron.py", "--tp", ranks)) for ranks in "12"
    )
    assert len(whole) == 4 and abs(whole[0]) < 1e-6 and whole[3] < whole[2] < whole[1] < -1e-3
    assert split == pytest.approx(whole, abs=2e-6)


def test_every_page_is_run_here():
    tests = {name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")}
    assert set(PAGES) <= tests


@pytest.mark.parametrize("name", PAGES)
def test_the_messages_of_a_page_are_the_modules(name):
    """Those in the first column of what is refused; "..." stands for what a call fills in."""
    heading = next(line for line in PAGES[name].read_text().splitlines() if line.startswith("## What is refused"))
    quoted = names_in_table(PAGES[name], heading.removeprefix("## "))
    known = strings_of(ROOT / "a3po_kernels" / "integrations" / f"{name.replace('-', '_')}.py")
    assert len(quoted) > 1
    assert not [text for text in quoted if not any(has_message(known_text, text) for known_text in known)]
