"""The README's diffs: GRPOTrainer's run and A3POTrainer's are the same, and one line makes it A3PO."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import a3po_kernels as ak

pytest.importorskip("trl")
import tiny
from trl import GRPOTrainer

from a3po_kernels.integrations.trl import A3POTrainer

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore::FutureWarning")]

ROOT = Path(__file__).resolve().parents[2]
# A few fp32 steps: losses below 1, gradient norms below 10, a hundred roundings each.
LOSS, GRADIENT = 3e-6, 3e-5


def parameters(made):
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


def run_readme(lines, model, folder, monkeypatch):
    """The README's program on a tiny model; the trainer that it made and ran."""
    program = "\n".join(lines)
    assert program.count("Qwen/Qwen2.5-0.5B-Instruct") == program.count("max_completion_length=64") == 1
    program = program.replace("Qwen/Qwen2.5-0.5B-Instruct", str(model))
    # TRL's defaults are those of a GPU; a machine without one must be told.
    options = "max_completion_length=9, use_cpu=True, bf16=False, max_steps=3, report_to=[], logging_steps=1"
    program = program.replace("max_completion_length=64", f"{options}, learning_rate=1e-2")
    folder.mkdir()
    monkeypatch.chdir(folder)
    names = {"__name__": "readme"}
    exec(program, names)
    assert names["trainer"].state.global_step == 3
    return names["trainer"]


def test_the_diffs_of_the_readme(tmp_path, monkeypatch):
    """The first changes trainer and configuration and nothing that is computed; one line more makes it A3PO."""
    model = tmp_path / "llama"
    tiny.build("llama").save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    blocks = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    swap, line = ([row for row in block.splitlines() if row] for block in blocks if "Config" in block)
    for diff, count in ((swap, 3), (line, 1)):
        assert sum(row[0] == "+" for row in diff) == sum(row[0] == "-" for row in diff) == count
    before = [row[1:] for row in swap if row[0] in "- "]
    after = [row[1:] for row in swap if row[0] in "+ "]
    (removed,), (added,) = ([row[1:] for row in line if row[0] == sign] for sign in "-+")
    a3po = [added if row == removed else row for row in after]
    assert a3po != after
    theirs, ours, other = (
        run_readme(program, model, tmp_path / name, monkeypatch)
        for name, program in (("trl", before), ("dapo", after), ("a3po", a3po))
    )
    assert type(theirs) is GRPOTrainer and type(ours) is type(other) is A3POTrainer
    assert ours.args.build_objective() == ak.dapo(epsilon_low=theirs.args.epsilon, epsilon_high=theirs.args.epsilon)
    assert other.args.build_objective() == ak.a3po()
    rows = [[row for row in made.state.log_history if "grad_norm" in row] for made in (theirs, ours)]
    assert len(rows[0]) == len(rows[1]) == 3 and rows[0][0]["grad_norm"] > 0
    for mine, truth in zip(*reversed(rows), strict=True):
        assert mine["loss"] == pytest.approx(truth["loss"], abs=LOSS)
        assert mine["grad_norm"] == pytest.approx(truth["grad_norm"], abs=GRADIENT)
    assert torch.allclose(parameters(ours), parameters(theirs), rtol=0, atol=GRADIENT)
    assert not torch.allclose(parameters(other), parameters(ours), atol=10 * GRADIENT)
